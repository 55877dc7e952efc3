"""Step times that `jaxllm plan` predicts against published ones, as a table: python scripts/plan_table.py [ROW ...]

Published figures are MaxText's own, as its pages state them; its settings (rows a device, rematerialisation) are not
all known, so ours stand in the table. Each row compiles the real training step, which takes minutes.
"""

import sys

from jaxllm.plan.target import parse_target, prepare_environment

KEPT = "model.remat=[q,k,v,attention,attention_out]"
#: name: (model, topology, settings, tokens/s of a chip, MFU), the last two as published.
ROWS = {
    "llama2-70b-v5p": ("llama2-70b", "v5p:8x8x8", ["train.batch=1024", KEPT], 692, 0.654),
    "llama3.1-8b-v6e": ("llama3.1-8b", "v6e:16x16", [*"train.batch=512 train.accumulate=2".split(), KEPT], 7207, 0.455),
    "llama3.1-70b-v6e": ("llama3.1-70b", "v6e:16x16", ["train.batch=256"], 960, 0.503),
    "mixtral-v5p": ("mixtral-8x7b", "v5p:4x8x8", ["train.batch=512", "train.seq_len=4096"], 2909, 0.526),
    "mixtral-v6e": ("mixtral-8x7b", "v6e:16x16", ["train.batch=256", "train.seq_len=4096"], 3899, 0.352),
}
COLUMNS = (
    "model, topology", "settings", "memory (formulas)", "a step, s", "tokens/s/chip, predicted", "with all waits",
    "published", "error", "MFU, predicted", "published",
)  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def row(name: str) -> str:
    """One line of the table."""
    model, topology, overrides, published, mfu = ROWS[name]
    target = parse_target(topology)
    prepare_environment(target)
    from jaxllm.plan.plan import plan
    from jaxllm.plan.read import read

    found = plan(read(model, overrides, devices=target.devices).config, target)
    if not found["memory"]["fits"]:
        return f"| {model}, {topology} | {' '.join(overrides)} | {found['advice']} |"
    memory, step, speed = found["memory"], found["step"], found["speed"]
    each = speed["tokens_per_second_per_chip"]
    waits = found["run"]["tokens"] / step["with_waits"] / target.chips
    room = f"{memory['total'] / 2**30:.1f} of {memory['capacity'] / 2**30:.1f} GiB ({memory['estimate']['error']:+.0%})"
    cells = (
        f"{model}, {topology}", f"`{' '.join(overrides)}`", room, f"{step['seconds']:.2f}", f"{each:,.0f}",
        f"{waits:,.0f}", f"{published:,}", f"{each / published - 1:+.0%} to {waits / published - 1:+.0%}",
        f"{speed['mfu']:.1%}", f"{mfu:.1%}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main(names: list[str]) -> None:
    print(HEAD)
    for name in names or ROWS:
        print(row(name), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
