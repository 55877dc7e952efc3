"""The scorecard as a page of the docs, from what `jaxllm verify --json` wrote."""

from typing import Any

from jaxllm.verify.scorecard import ROWS

HEAD = """# Reliability

What jaxllm promises about runs, checkpoints and data, and what was found when it was tried. `jaxllm verify` tries it on
your machine; a plant for each check, in `tests/verify`, shows that it can fail. `jaxllm verify --page FILE` writes this
page, `scripts/scorecard.sh` with all cases. Its own small runs are compiled with few optimisations, but those of row
16; a run of yours is compiled as it is.

{when}

| # | property | found | |
|---|---|---|---|
"""


def page(found: dict[str, Any]) -> str:
    """Markdown. `found`: what `scorecard.run` gives."""
    promises = {row.number: row for row in ROWS}
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    dates = sorted({row["date"] for row in found["rows"]}) or [found["date"]]
    dates = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    when = f"{found['tier'].capitalize()} tier, seed {found['seed']}, {dates}, {found['machine']}: {versions}."
    out = HEAD.format(when=when)
    for row in found["rows"]:
        failures = "; ".join(row["failures"][:3])
        result = "holds" if row["passed"] else f"**does not hold**: {failures}"
        cells = [str(row["row"]), promises[row["row"]].promise, row["figure"], result]
        out += f"| {' | '.join(map(_cell, cells))} |\n"
    if absent := [str(row.number) for row in ROWS if row.number not in {one["row"] for one in found["rows"]}]:
        out += f"\nNot tried here: rows {', '.join(absent)}.\n"
    out += "\n## What this cannot show on one machine\n\n"
    limits = [f"- {row.name}: {row.limits}" for row in ROWS if row.limits]
    return out + "\n".join(limits) + "\n"


def _cell(text: str) -> str:
    """Text that stays within its cell: what a run said may have lines and bars."""
    return " ".join(text.split()).replace("|", "\\|")
