"""What the data looks like, as text for people."""

from collections.abc import Iterable
from itertools import groupby

import numpy as np

from jaxllm.data.answers import Answers
from jaxllm.data.mixture import Mixture
from jaxllm.data.origin import held, places_of
from jaxllm.data.pack import Rows
from jaxllm.data.prepare import rewritten
from jaxllm.data.store import TokenStore
from jaxllm.data.tokenizer import Tokenizer

#: Some tokens as text: whether they are learnt, whether it is a control token.
Run = tuple[bool, bool, str]
LEGEND: list[Run] = [(True, False, "learnt"), (False, False, "read"), (False, True, "control token")]


def inspect(store: TokenStore, tokenizer: Tokenizer, n: int = 2, *, length: int = 512, **options) -> str:
    """Counts of a store, its first `n` documents, and the first row of `length` tokens with its segments.

    `options`: those of `Rows`.
    """
    rows = Rows(store, length, **options)
    lines = [*summary(store, rows), ""]
    for i in range(min(n, store.documents)):
        lines.append(f"document {i}: {store.lengths[i]:,} tokens, {store.bytes[i]:,} bytes")
        lines += ["  " + _show(tokenizer, store.doc(i, 0, 40)), ""]
    row = rows.row(0)
    lines.append(f"row 0 of {rows.per_epoch:,}: {int(row.mask.sum())} of {length} positions predict a token")
    for segment in range(1, int(row.segments.max()) + 1):
        tokens = row.tokens[row.segments == segment]
        lines += [f"  segment {segment}: {len(tokens)} tokens", "    " + _show(tokenizer, tokens[:24])]
    return "\n".join(lines)


def inspect_rows(stream: Mixture, rows: Iterable[int], tokenizer: Tokenizer) -> str:
    """The documents that rows of a stream hold, where they stand in the files, and how their parts begin."""
    lines, last = [], None
    for one in held(stream, rows):
        if one.row != last:
            lines.append(f"row {one.row}, of {one.store.name}")
        last = one.row
        stop = one.first + one.count + 1
        part = "" if one.count + 1 >= one.store.lengths[one.document] else f", tokens {one.first:,} to {stop:,}"
        if one.first:
            line = 1 + sum(
                tokenizer.bytes_of[i].count(b"\n") for i in one.store.doc(one.document, 0, one.first).tolist()
            )
            part += f", from line {line:,} of its text"
        lines.append(f"  document {one.document}{part}: {places_of(one.store, [one.document])[0]}")
        lines.append("    " + _show(tokenizer, one.store.doc(one.document, one.first, min(stop, one.first + 24))))
    return "\n".join(lines)


def inspect_chat(
    store: TokenStore, tokenizer: Tokenizer, n: int = 2, *, length: int | None = None, color: bool = False, **options
) -> str:
    """Counts of a store of conversations, and the first `n` as rows hold them, with what is learnt and what is not.

    `length`: of the rows; None takes the longest conversation's. `color`: for a terminal, else in plain marks.
    """
    rows = Rows(store, length or int(store.lengths.max()) - 1, **options)
    marks = "the template's own marks" if Answers(tokenizer).by_marks else "comparing what the template renders"
    lines = [*summary(store, rows), f"  {rows.targets:,} tokens an epoch are learnt, found by {marks}"]
    lines += [f"  {rewritten(store)}"] if store.untrained else []
    lines.append("  " + "  ".join(_paint([run], color) for run in LEGEND))
    for i in rows.kept.documents[:n]:
        first, last = int(rows.kept.first[i]), int(rows.kept.first[i] + rows.kept.counts[i] + 1)
        ids, learnt = store.doc(i, first, last), store.learnt(i, first, last)
        of = f" of {store.lengths[i]:,}" if len(ids) < store.lengths[i] else ""
        lines += ["", f"conversation {i}: {len(ids):,}{of} tokens, {np.count_nonzero(learnt[1:]):,} learnt"]
        lines.append("  " + _paint(_runs(tokenizer, ids, learnt), color).rstrip("\n").replace("\n", "\n  "))
    return "\n".join(lines)


def _runs(tokenizer: Tokenizer, ids: np.ndarray, learnt: np.ndarray) -> list[Run]:
    """Each control token by itself, and the text between."""
    control = {i: content for content, i in tokenizer.control.items()}
    runs = []
    pairs = zip(ids.tolist(), learnt.tolist(), strict=True)
    for (said, name), run in groupby(pairs, key=lambda pair: (pair[1], control.get(pair[0]))):
        if name is not None:
            runs += [(said, True, _printable(name)) for _ in run]
            continue
        lines = b"".join(tokenizer.bytes_of[i] for i, _ in run).decode("utf-8", errors="replace").split("\n")
        runs.append((said, False, "⏎\n".join(map(_printable, lines))))
    return runs


def _paint(runs: list[Run], color: bool) -> str:
    """What is learnt in green, the rest dim, control tokens reversed; or `[learnt]` and `‹control token›`."""
    if color:
        return "".join(f"\033[{32 if said else 2}{';7' * control}m{text}\033[0m" for said, control, text in runs)
    texts = ((said, f"‹{text}›" if control else text) for said, control, text in runs)
    groups = ((said, "".join(text for _, text in group)) for said, group in groupby(texts, key=lambda run: run[0]))
    return "".join(f"[{text}]" if said else text for said, text in groups)


def summary(store: TokenStore, rows: Rows) -> list[str]:
    """The counts: documents, tokens, bytes, the longest document, padding, and what is cut."""
    longest, kind = int(np.argmax(store.lengths)), "conversations" if store.chat else "documents"
    tokens = int(store.targets.sum()) if store.chat else store.tokens
    lines = [
        f"source {store.name}: {store.documents:,} {kind}, {store.tokens:,} tokens, {store.text_bytes:,} bytes"
        + " of the assistant's" * store.chat,
        f"  {store.text_bytes / tokens:.2f} bytes a token, vocabulary {store.vocab:,}, "
        f"fingerprint {store.fingerprint[:12]}",
        f"  longest {kind[:-1]} {longest}: {store.lengths[longest]:,} tokens; median {int(np.median(store.lengths)):,}",
        f"  rows of {rows.length}: {rows.per_epoch:,} an epoch, {100 * rows.padding:.2f} % padding",
    ]
    return lines + ([f"  {rows.news}"] if rows.news else [])


def _show(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Pieces apart from each other, on one line."""
    return _printable("|".join(tokenizer.piece(i) for i in ids).replace("\n", "⏎"))


def _printable(text: str) -> str:
    """Nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else "�" for c in text.replace("\t", "⇥"))
