"""Conversations to fine-tune on, made of Python's standard library: the docstring of a function to its body.

    python examples/docstrings.py docstrings.jsonl
    jaxllm sft runs/demo --data docstrings.jsonl train.seq_len=256 lora.rank=16

Functions of the files that the demo holds out are left out, and each body is taken once.
"""

import ast
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from jaxllm.data.stdlib import files

LONGEST = 3000  # characters of a question or an answer
ASKED = "Write the body of this Python function.\n\n"


def functions(path: str) -> Iterator[tuple[str, str]]:
    """`(signature with its docstring, body)` of each documented function of a file."""
    source = Path(path).read_text(encoding="utf-8", errors="replace")
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node) or len(node.body) < 2:
            continue
        first, rest = node.body[0], node.body[1:]
        head = textwrap.dedent("\n".join(lines[node.lineno - 1 : first.end_lineno]))
        yield head, textwrap.dedent("\n".join(lines[rest[0].lineno - 1 : rest[-1].end_lineno]))


def main(out: str, count: int = 6000) -> None:
    """Writes the `count` shortest conversations, or as many as there are."""
    found: dict[str, str] = {}
    for path in files("python-stdlib:train"):
        for head, body in functions(path):
            if len(head) <= LONGEST and len(body) <= LONGEST:
                found.setdefault(body, head)
    pairs = sorted(found.items(), key=lambda pair: len(pair[0]) + len(pair[1]))[:count]
    with open(out, "w", encoding="utf-8") as file:
        for body, head in pairs:
            print(json.dumps({"prompt": ASKED + head, "completion": body}), file=file)
    print(f"{out}: {len(pairs):,} conversations")


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["docstrings.jsonl"])
