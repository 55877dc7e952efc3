"""A training run small enough for a test: two kinds of text, a tokenizer of 400 pieces, a model of 40,000 weights."""

import json
from pathlib import Path

import numpy as np

from jaxllm import checkpoint, tree

MODEL = {
    "embed": 32,
    "layers": 2,
    "context": 64,
    "pattern": [{"attn": {"heads": 4, "kv_heads": 2}, "mlp": {"ffw": 48}}],
}
MOE = MODEL | {"pattern": [MODEL["pattern"][0] | {"mlp": None, "moe": {"experts": 4, "ffw": 24, "balance": "bias"}}]}


def write_corpus(folder: Path) -> None:
    """`code-*.txt` and `prose-*.txt`, twelve files each."""
    rng = np.random.default_rng(0)
    words = "the quick brown foxes jump over lazy dogs while five wizards vex judges and pack my box".split()
    for n in range(12):
        lines = [f"def f{i}(self, x):\n    return self.value + {rng.integers(99)}\n\n" for i in range(20)]
        (folder / f"code-{n}.txt").write_text("".join(lines))
        sentences = [" ".join(rng.choice(words, 9)).capitalize() + ".\n" for _ in range(20)]
        (folder / f"prose-{n}.txt").write_text("".join(sentences))


def settings(corpus: Path, out: Path | str, **changes) -> dict:
    """The settings of a run of 8 steps; `train__steps=4` changes `train.steps`, `model={...}` the whole section."""
    raw = {
        "out": str(out),
        "model": MODEL,
        "data": {
            "sources": [
                {"name": "code", "path": str(corpus / "code-*.txt")},
                {"name": "prose", "path": str(corpus / "prose-*.txt")},
            ],
            "heldout": 0.3,
            "tokenizer": str(corpus / "tokenizer"),
            "cache": str(corpus / "cache"),
        },
        "train": {"steps": 8, "seq_len": 32, "batch": 8, "eval_every": 4},
        "optim": {"lr": 1e-2},
        "checkpoint": {"every": 3, "keep": 4},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        raw[section] = raw.get(section, {}) | {name: value} if name else value
    return raw


def losses(out: Path) -> dict[int, str]:
    """`{step: loss}`, to the last bit."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: float.hex(row["loss"]) for row in rows if "loss" in row}


def saved(out: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint but the random key: weights, optimizer, averages, counters."""
    found = {}
    for part in ("params", "opt", "extra"):
        found |= {
            f"{part}/{path}": x for path, x in tree.flatten(checkpoint.load(out, step=step, part=part)[0]).items()
        }
    return found


def bits(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    """The same as bytes, which compare NaN and -0 as they are."""
    return {path: np.asarray(x).tobytes() for path, x in arrays.items()}
