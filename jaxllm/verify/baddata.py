"""Row 10: bad data. Each kind gives an error of ours with the place, or a line that counts what became of it."""

import re
import tracemalloc
from pathlib import Path

from jaxllm.errors import UserError
from jaxllm.verify.badfiles import Case, cases
from jaxllm.verify.lab import Found, Lab


def bad_data(lab: Lab) -> Found:
    """Prepares each kind of bad data as a run does; memory is what Python holds at most."""
    from jaxllm.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(lab.corpus() / "tokenizer")
    failures, peaks, tried = [], [], cases()
    for number, case in enumerate(tried):
        folder = lab.folder / str(number)
        folder.mkdir()
        problem, peak = attempt(case, folder, tokenizer)
        peaks.append(peak)
        failures += [f"{case.name}: {problem}"] * bool(problem)
    counted = sum(case.policy for case in tried)
    figure = (
        f"{len(tried)} kinds: {len(tried) - counted} refused with their place, {counted} counted in the log; at most "
        f"{max(peaks) >> 20} MiB held"
    )
    return Found(len(tried), tuple(failures), figure)


def attempt(case: Case, folder: Path, tokenizer) -> tuple[str | None, int]:
    """`(what is wrong with how a kind is met, bytes held at most)`."""
    path = folder / case.file
    path.parent.mkdir(exist_ok=True)
    if callable(case.data):
        case.data(path)
    else:
        path.write_bytes(case.data)
    tracemalloc.start()
    try:
        refused, said = _tokenised(case, path, folder, tokenizer)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    wanted = case.expected if case.policy or case.whole_folder else f"{re.escape(path.name)}{case.expected}"
    if refused is None or refused == case.policy or not re.search(wanted, said, re.DOTALL):
        verdict = {None: "crashed", True: "refused", False: "accepted"}[refused]
        return f"{verdict}, with {said[-300:]!r}, expected {wanted!r}", peak
    over = peak > case.memory
    return f"{peak >> 20} MiB held, and {case.memory >> 20} are allowed" if over else None, peak


def _tokenised(case: Case, path: Path, folder: Path, tokenizer) -> tuple[bool | None, str]:
    """`(whether it was refused, what was said)`; None for the error of another."""
    from jaxllm.data.prepare import prepare_source
    from jaxllm.data.sources import Source

    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if case.meanwhile is not None:  # said between the hash of a file and its tokens
            case.meanwhile(path)

    source = Source(**{"name": "bad", "path": str(path.parent if case.whole_folder else path)} | case.source)
    try:
        prepare_source(source, tokenizer, folder / "cache", 1, say=say)
        if case.afterwards is not None:
            case.afterwards(path)
            prepare_source(source, tokenizer, folder / "cache", 1, say=say)
    except UserError as error:
        return True, str(error)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    return False, "\n".join(lines)
