"""The table of distillation in docs/finetuning.md: a student of a quarter of the demo model's size, with it as a
teacher and by cross-entropy alone, on the same tokens in the same order from the same first weights.

    jaxllm demo
    python scripts/distill_table.py runs/demo [folder] [section.key=value ...]

takes about fifteen minutes on two cores: six runs of configs/runs/distill.yaml, three seeds each way; the settings
count for all. Exits with 1 unless the student of every seed has a lower loss on all held-out text with the teacher.
What the teacher says is kept in the folder by the order of the data, for other weights on the same rows.
"""

import dataclasses
import sys
from pathlib import Path

from jaxllm import api
from jaxllm.train.load import load_distill

SEEDS = (0, 1, 2)


def main(teacher: str, folder: Path, more: list[str], seeds: tuple[int, ...] = SEEDS) -> bool:
    """Prints the table; whether the bar is held."""
    found = []
    print("| seed | cross-entropy alone | with the teacher | difference |\n|---|---|---|---|")
    for seed in seeds:
        alone, taught = losses(teacher, folder / str(seed), [f"distill.cache={folder / 'teacher'}", *more], seed)
        found.append(taught - alone)
        print(f"| {seed} | {alone:.4f} | {taught:.4f} | {taught - alone:+.4f} |", flush=True)
    print(
        f"\nlower in {sum(one < 0 for one in found)} of {len(found)}, by {-sum(found) / len(found):.4f} nats on average"
    )
    return max(found) < 0


def losses(teacher: str, folder: Path, settings: list[str], seed: int) -> tuple[float, float]:
    """`(alone, taught)`: the loss of all held-out text after two runs that differ in nothing but the teacher."""
    same = [f"distill.teacher={teacher}", f"train.seed={seed}", f"data.seed={seed}", *settings]
    taught, _ = load_distill("distill", [*same, f"out={folder / 'taught'}"])
    alone = dataclasses.replace(taught, distill=None, out=str(folder / "alone"))
    return tuple(api.train(config, quiet=True).summary["heldout_loss"] for config in (alone, taught))


if __name__ == "__main__":
    arguments = sys.argv[2:]
    folder = arguments.pop(0) if arguments and "=" not in arguments[0] else "runs/distill-table"
    sys.exit(0 if main(sys.argv[1], Path(folder), arguments) else 1)
