"""The table of pruning: one model made smaller in several ways, and brought back a little by distillation.

    python scripts/prune_table.py runs/demo [--steps 40] [--out runs/prune-table]

Perplexity on the held-out standard library, after pruning and after recovery: so many steps with the unpruned model as
the teacher, on the text of its training. The first line trains the unpruned model as long. A line is printed as soon as
it is there; with the demo model all take about eight minutes on two cores.
"""

import argparse
from pathlib import Path

from jaxllm import api
from jaxllm.adapt.prune import PruneConfig
from jaxllm.compress.prune import counts
from jaxllm.compress.slices import StructuredConfig, sizes
from jaxllm.train.load import load_distill

HELDOUT, TEXT = "python-stdlib:heldout", "python-stdlib:train"


def ways(loaded: api.Loaded) -> dict[str, PruneConfig | StructuredConfig]:
    """What is tried, where the model has enough of it."""
    config = loaded.model.config
    largest = {
        part: max(sizes(spec).get(part, 0) for spec in config.layer_specs) for part in ("heads", "neurons", "experts")
    }
    found = {
        "half of the weights, magnitude": PruneConfig(sparsity=0.5),
        "half of the weights, Wanda": PruneConfig(sparsity=0.5, method="wanda"),
        "2:4, magnitude": PruneConfig(nm="2:4"),
        "2:4, Wanda": PruneConfig(nm="2:4", method="wanda"),
    }
    for part, size in largest.items():
        if size > 1:
            name = {"heads": "kv heads"}.get(part, part)
            found[f"{size // 2} of {size} {name}"] = StructuredConfig(**{part: size // 2})
    for left in (config.layers - 1, config.layers - 2):
        if left > 0:
            found[f"{left} of {config.layers} layers"] = StructuredConfig(layers=left)
    return found


def recovered(teacher: str, init: str, folder: Path, steps: int) -> float:
    """Perplexity of the held-out text after so many steps; the teacher's answers are kept for all ways."""
    where = [f"distill.teacher={teacher}", f"train.init={init}", f"out={folder}", f"distill.cache={folder.parent}/kept"]
    config, _ = load_distill("recover", [*where, f"train.steps={steps}", "train.eval_every=100000"])
    return api.train(config, quiet=True).summary["perplexity"]


def perplexity(loaded: api.Loaded) -> float:
    return api.evaluate(loaded, HELDOUT, seq_len=256)["perplexity"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/prune-table"))
    args = parser.parse_args()
    loaded = api.load(args.model)
    parameters, before = counts(loaded.params)[0], perplexity(loaded)
    print(f"| | weights left | perplexity | after {args.steps} steps |\n|---|---|---|---|", flush=True)
    after = recovered(args.model, args.model, args.out / "unpruned", args.steps)
    print(f"| unpruned | 100% | {before:.1f} | {after:.1f} |", flush=True)
    for number, (name, config) in enumerate(ways(loaded).items(), 1):
        less, _ = api.prune(loaded, config, TEXT if config.calibrated else None)
        pruned, after = args.out / f"pruned-{number}", args.out / f"recovered-{number}"
        api.save(less, pruned)
        end = recovered(args.model, str(pruned), after, args.steps)
        share = counts(less.params)[1] / parameters
        print(f"| {name} | {share:.0%} | {perplexity(less):.1f} | {end:.1f} |", flush=True)


if __name__ == "__main__":
    main()
