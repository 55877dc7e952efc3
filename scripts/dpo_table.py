"""The table of docs/finetuning.md on preferences: sums with right and wrong answers (`examples/arithmetic.py`).

    jaxllm demo
    python scripts/dpo_table.py runs/demo [folder]

takes about five minutes on two cores: fine-tunes the demo model on right answers, then prefers them to wrong ones, and
measures both models, and the one that they started from, on held-out pairs.
"""

import functools
import math
import sys
from pathlib import Path

import numpy as np

from jaxllm import api
from jaxllm.data.config import DataConfig
from jaxllm.data.prepare import prepare_source
from jaxllm.data.sources import Source
from jaxllm.objectives import dpo
from jaxllm.train.config import load_dpo, load_sft
from jaxllm.train.preferences import PairEvaluator
from jaxllm.train.reference import reference_of

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import arithmetic  # noqa: E402

LENGTH, BATCH, BETA = 256, 8, 0.1
COMMON = [f"train.seq_len={LENGTH}", f"train.batch={BATCH}", "train.eval_every=1000", "data.heldout=0"]
SFT = [*COMMON, "train.steps=200", "optim.lr=1e-3"]
DPO = [*COMMON, "train.steps=200", "optim.lr=2e-4", f"dpo.beta={BETA}"]
HEAD = [
    "",
    "nats of the right answer",
    "right one more probable",
    "by nats",
    "reward of the right one higher",
    "margin",
]


def main(
    base: str, folder: Path, *, pairs: int = 6000, heldout: int = 600, sft_more=(), dpo_more=()
) -> dict[str, list[float]]:
    """Prints the table and gives its rows; `sft_more` and `dpo_more` are more settings of the two runs."""
    arithmetic.main(str(folder), pairs, heldout)
    config, _ = load_sft(base, [str(folder / "chats.jsonl")], [*SFT, f"out={folder / 'sft'}", *sft_more])
    api.train(config, quiet=True)
    here = [f"train.init={folder / 'sft'}", f"data.sources.0.path={folder / 'pairs.jsonl'}", f"out={folder / 'dpo'}"]
    config, _ = load_dpo("dpo", [*here, *DPO, *dpo_more])
    api.train(config, quiet=True)
    models = {"demo model": base, "fine-tuned on right answers": folder / "sft", "then dpo": folder / "dpo"}
    rows = measure({name: api.load(path) for name, path in models.items()}, folder / "heldout.jsonl")
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    for name, (nats, likelier, by, rewarded, margin) in rows.items():
        reward = [percent(rewarded, heldout), f"{margin:.3f}"] if name == "then dpo" else ["", ""]
        print("| " + " | ".join([name, f"{nats:.2f}", percent(likelier, heldout), f"{by:.2f}", *reward]) + " |")
    return rows


def measure(models: dict[str, api.Loaded], path: Path) -> dict[str, list[float]]:
    """Columns of the table; the second of the models is the reference of the rewards."""
    _, tuned, _ = models.values()
    source = Source(name="sums", path=str(path), format="pairs")
    store = prepare_source(source, tuned.tokenizer, Path(DataConfig(sources=(source,)).cache))
    options, rows = dict(batch=BATCH, truncate="error"), {}
    reference = reference_of(tuned.model, tuned.params, store, length=LENGTH, **options)
    for name, loaded in models.items():
        # Without a reference and with beta 1, a reward is the log-probability of an answer.
        of = {"logprob": (np.zeros_like(reference), 1.0), "reward": (reference, BETA)}
        found = {}
        for kind, (base, beta) in of.items():
            objective = functools.partial(dpo.dpo, config=dpo.DpoConfig(beta=beta))
            evaluator = PairEvaluator(
                loaded.model, {"sums": store}, {"sums": base}, objective, seq_len=LENGTH, **options
            )
            found[kind] = evaluator(loaded.params)
        keys = [("logprob", "reward_chosen"), *((kind, key) for kind in of for key in ("accuracy", "margin"))]
        rows[name] = [found[kind][f"heldout_{key}"] for kind, key in keys]
        rows[name][0] *= -1
    return rows


def percent(share: float, count: int) -> str:
    """With its standard error."""
    return f"{100 * share:.1f} % ± {100 * math.sqrt(share * (1 - share) / count):.1f}"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "runs/dpo-table"))
