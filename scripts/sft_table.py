"""The README's table of fine-tuning: the demo model on docstrings and bodies, in full, with LoRA and with QLoRA.

    jaxllm demo
    python scripts/sft_table.py runs/demo [folder]

takes about five minutes on two cores. Held-out loss of the answers before and after, and beside it the perplexity on
the held-out text of the first training before and after: what was forgotten.
"""

import sys
from pathlib import Path

from jaxllm import api
from jaxllm.train.load import load_sft

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import docstrings  # noqa: E402

COMMON = ["train.seq_len=256", "train.batch=8", "train.steps=120", "train.eval_every=1000", "data.heldout=0"]
LORA = ["lora.rank=16", "lora.alpha=32", "optim.lr=2e-3"]
WAYS = {
    "full": ["optim.lr=2e-4"],
    "LoRA, rank 16": LORA,
    "QLoRA, rank 16 over nf4": [*LORA, "quantize={rules: [{format: nf4, group: 32}]}"],
}


def measure(loaded: api.Loaded, chats: Path) -> tuple[float, float]:
    """`(loss of held-out answers, perplexity of the held-out standard library)`."""
    answers = api.evaluate(loaded, api.Source(name="answers", path=str(chats), format="chat"), seq_len=256)
    text = api.evaluate(loaded, "python-stdlib:heldout", seq_len=256)
    return answers["heldout_loss"], text["perplexity"]


def main(base: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    chats = folder / "docstrings.jsonl"
    if not chats.exists():
        docstrings.main(str(chats))
    train, heldout = split(chats)
    first = measure(api.load(base), heldout)
    print("| | trained | answers: loss before | after | stdlib: perplexity before | after |\n|---|---|---|---|---|---|")
    for name, settings in WAYS.items():
        out = folder / name.split(",")[0].lower()
        config, _ = load_sft(base, [str(train)], [*COMMON, *settings, f"out={out}"])
        result = api.train(config, quiet=True)
        after = measure(api.load(out), heldout)
        trained = result.summary.get("trained", result.summary["params"])
        cells = [name, f"{trained:,}", f"{first[0]:.3f}", f"{after[0]:.3f}", f"{first[1]:.1f}", f"{after[1]:.1f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def split(chats: Path) -> tuple[Path, Path]:
    """Every twentieth conversation is held out."""
    lines = chats.read_text(encoding="utf-8").splitlines(keepends=True)
    parts = [line for i, line in enumerate(lines) if i % 20], lines[::20]
    paths = chats.with_name("train.jsonl"), chats.with_name("heldout.jsonl")
    for path, part in zip(paths, parts, strict=True):
        path.write_text("".join(part), encoding="utf-8")
    return paths


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "runs/sft-table"))
