"""Row 10: bad data. Each kind gives an error of ours with the place, or a line that counts what became of it."""

import contextlib
import re
import threading
import tracemalloc
from pathlib import Path

from jaxllm.errors import UserError
from jaxllm.verify.badfiles import RESIDENT, Case, cases
from jaxllm.verify.lab import Found, Lab


def bad_data(lab: Lab) -> Found:
    """Prepares each kind of bad data as a run does, and watches the memory that it takes."""
    from jaxllm.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(lab.corpus() / "tokenizer")
    failures, most, tried = [], (0, 0), cases()
    for number, case in enumerate(tried):
        folder = lab.folder / str(number)
        folder.mkdir()
        problem, peaks = attempt(case, folder, tokenizer)
        most = tuple(map(max, most, peaks))
        failures += [f"{case.name}: {problem}"] * bool(problem)
    counted = sum(case.policy for case in tried)
    figure = (
        f"{len(tried)} kinds: {len(tried) - counted} refused with their place, {counted} counted in the log; at most "
        f"{most[0] >> 20} MiB of Python's, {most[1] >> 20} MiB of the process"
    )
    return Found(len(tried), tuple(failures), figure)


def attempt(case: Case, folder: Path, tokenizer) -> tuple[str | None, tuple[int, int]]:
    """`(what is wrong with how a kind is met, bytes that Python held at most and by which the process grew)`."""
    path = folder / case.file
    path.parent.mkdir(exist_ok=True)
    if callable(case.data):
        case.data(path)
    else:
        path.write_bytes(case.data)
    with _watched() as peaks:
        refused, said = _tokenised(case, path, folder, tokenizer)
    held, grown = peaks
    wanted = case.expected if case.policy or case.whole_folder else f"{re.escape(path.name)}{case.expected}"
    problem = None
    if refused is None or refused == case.policy or not re.search(wanted, said, re.DOTALL):
        verdict = {None: "crashed", True: "refused", False: "accepted"}[refused]
        problem = f"{verdict}, with {said[-300:]!r}, expected {wanted!r}"
    elif held > case.memory or grown > RESIDENT:
        problem = (
            f"{held >> 20} MiB of Python's and {grown >> 20} of the process, and {case.memory >> 20} and "
            f"{RESIDENT >> 20} are allowed"
        )
    return problem, (held, grown)


@contextlib.contextmanager
def _watched():
    """Gives a list that holds, after the block, the bytes of Python's at most and the growth of the process."""
    import psutil

    process, ended, peaks = psutil.Process(), threading.Event(), []
    before = most = process.memory_info().rss

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.005):
            most = max(most, process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    tracemalloc.start()
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()
        peaks += [tracemalloc.get_traced_memory()[1], most - before]
        tracemalloc.stop()


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
