"""What the data looks like, as text for people."""

import numpy as np

from jaxllm.data.pack import Rows
from jaxllm.data.store import TokenStore
from jaxllm.data.tokenizer import Tokenizer


def inspect(store: TokenStore, tokenizer: Tokenizer, n: int = 2, *, length: int = 512, pack: bool = True) -> str:
    """Counts of a store, its first `n` documents, and the first row of `length` tokens with its segments."""
    rows = Rows(store, length, pack=pack)
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


def summary(store: TokenStore, rows: Rows) -> list[str]:
    """The counts: documents, tokens, bytes, the longest document, padding, and what is cut."""
    longest = int(np.argmax(store.lengths))
    lines = [
        f"source {store.name}: {store.documents:,} documents, {store.tokens:,} tokens, {store.text_bytes:,} bytes",
        f"  {store.text_bytes / store.tokens:.2f} bytes a token, vocabulary {store.vocab:,}, "
        f"fingerprint {store.fingerprint[:12]}",
        f"  longest document {longest}: {store.lengths[longest]:,} tokens; median {int(np.median(store.lengths)):,}",
        f"  rows of {rows.length}: {rows.per_epoch:,} an epoch, {100 * rows.padding:.2f} % padding",
    ]
    documents, tokens = rows.cut
    return lines + ([f"  {documents:,} documents are cut, {tokens:,} tokens lost an epoch"] if documents else [])


def _show(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Pieces apart from each other, on one line, nothing in them that a terminal would obey."""
    text = "|".join(tokenizer.piece(i) for i in ids).replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "�" for c in text)
