"""The table of preferences in docs/finetuning.md: sums with right and wrong answers (`examples/arithmetic.py`).

    jaxllm demo
    python scripts/dpo_table.py runs/demo [folder]

takes about five minutes on two cores. It fine-tunes the demo model on right answers, then teaches it to prefer them to
wrong ones, and says of each model in how many held-out pairs the right answer is the more probable one. The answers of
a pair are as long as each other, in digits and in tokens, so that nothing is divided by lengths.
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
from jaxllm.objectives.dpo import DpoConfig, dpo
from jaxllm.train.load import load_dpo, load_sft
from jaxllm.train.preferences import PairEvaluator

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import arithmetic  # noqa: E402

COMMON = ["train.seq_len=256", "train.batch=8", "train.eval_every=1000", "data.heldout=0"]
SFT = [*COMMON, "train.steps=200", "optim.lr=1e-3"]
DPO = [*COMMON, "train.steps=250", "optim.lr=3e-4", "dpo.beta=0.5"]


def main(base: str, folder: Path, pairs: int = 6000, heldout: int = 600, more: tuple[str, ...] = ()) -> list[float]:
    """Prints the table, and gives the accuracy of each of the three models; `more`: settings of both runs."""
    arithmetic.main(str(folder), pairs, heldout)
    config, _ = load_sft(base, [str(folder / "chats.jsonl")], [*SFT, f"out={folder / 'sft'}", *more])
    api.train(config, quiet=True)
    preferred = train_dpo(folder, more).summary
    models = {"demo model": base, "fine-tuned on right answers": folder / "sft", "and on preferences": folder / "dpo"}
    print(
        f"| {heldout} held-out pairs | right one more probable | by nats | nats of the right one |\n|---|---|---|---|"
    )
    found = {name: measure(api.load(path), folder / "heldout.jsonl") for name, path in models.items()}
    for name, one in found.items():
        accuracy, by, nats = (one[f"heldout_{key}"] for key in ("accuracy", "margin", "reward_chosen"))
        print(f"| {name} | {percent(accuracy, heldout)} | {by:.2f} | {-nats:.2f} |")
    accuracy = percent(preferred["heldout_accuracy"], heldout)
    print(f"\nthe implicit reward prefers the right one in {accuracy}, margin {preferred['heldout_margin']:.3f}")
    return [one["heldout_accuracy"] for one in found.values()]


def train_dpo(folder: Path, more: tuple[str, ...]) -> api.loop.Result:
    heldout = f"data.eval_sources=[{{name: heldout, path: '{folder / 'heldout.jsonl'}', format: pairs}}]"
    paths = [f"train.init={folder / 'sft'}", f"data.sources.0.path={folder / 'pairs.jsonl'}", f"out={folder / 'dpo'}"]
    config, _ = load_dpo("dpo", [*paths, heldout, *DPO, *more])
    return api.train(config, quiet=True)


def measure(loaded: api.Loaded, path: Path) -> dict[str, float]:
    """Of held-out pairs: with a reference of nothing and beta 1, a reward is the log-probability of an answer."""
    source = Source(name="heldout", path=str(path), format="pairs")
    store = prepare_source(source, loaded.tokenizer, Path(DataConfig(sources=(source,)).cache))
    objective, nothing = functools.partial(dpo, config=DpoConfig(beta=1.0)), np.zeros(store.tokens, np.float32)
    rows = dict(seq_len=256, batch=8, truncate="error")
    return PairEvaluator(loaded.model, {"heldout": store}, {"heldout": nothing}, objective, **rows)(loaded.params)


def percent(share: float, count: int) -> str:
    """With its standard error."""
    return f"{100 * share:.1f} % ± {100 * math.sqrt(share * (1 - share) / count):.1f}"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "runs/dpo-table"))
