"""The report of a compression: sizes, errors and what it cost in quality, as a table, as JSON and as a plot."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: The measures of a text, by their names in a report, and how they are printed.
MEASURES = {"perplexity": "{:,.3f}", "bits_per_byte": "{:.4f}", "heldout_loss": "{:.4f}"}


def report(
    settings: Mapping[str, Any],
    sizes: tuple[int, int],
    errors: Mapping[str, Sequence[float]],
    quality: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `report.json` holds.

    Args:
      settings: how it was made, as plain dicts.
      sizes: bytes of the weights before and after.
      errors: `{path: relative error of each layer}`.
      quality: what `api.compare` gives, or None where there was no text.
    """
    before, after = sizes
    sizes = {"bytes_before": before, "bytes_after": after, "compression": before / after}
    return {"settings": settings, **sizes, "errors": dict(errors), **(quality or {})}


def show(found: Mapping[str, Any]) -> str:
    """The report as text: sizes, a line for each measure, a line for each weight."""
    lines = [
        f"{'bytes':<16} {found['bytes_before']:>14,} -> {found['bytes_after']:,}, "
        f"{found['compression']:.2f} times smaller"
    ]
    for name, form in MEASURES.items():
        if name in found:
            before, after = found[name]["before"], found[name]["after"]
            change = f", {after / before - 1:+.2%}" if name == "perplexity" else ""
            lines.append(f"{name:<16} {form.format(before):>14} -> {form.format(after)}{change}")
    if "greedy_agreement" in found:
        lines.append(f"{'same likeliest':<16} {found['greedy_agreement']:>14.2%} of {found['positions']:,} positions")
    return "\n".join([*lines, "", *_errors(found["errors"])])


def _errors(errors: Mapping[str, Sequence[float]]) -> list[str]:
    wide = max(map(len, errors), default=0)
    lines = [f"{'relative error of':<{wide}}  layers   mean  worst"]
    for path, values in errors.items():
        lines.append(f"{path:<{wide}}  {len(values):>6} {sum(values) / len(values):>6.2%} {max(values):>6.2%}")
    return lines


def write(found: Mapping[str, Any], folder: Path) -> None:
    """Writes `report.json` and `report.png` into the folder."""
    (folder / "report.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    draw(found).savefig(folder / "report.png")


def draw(found: Mapping[str, Any]):
    """A matplotlib figure: the relative error of each weight by layer, and what it cost above."""
    from matplotlib.figure import Figure  # slow to load

    title = f"{found['compression']:.2f} times smaller"
    if "perplexity" in found:
        title += f", perplexity {found['perplexity']['before']:,.3f} -> {found['perplexity']['after']:,.3f}"
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="layer of its slot", ylabel="relative error of the weights", title=title)
    kinds: dict[str, list[tuple[str, Sequence[float]]]] = {}
    for path, values in found["errors"].items():
        kinds.setdefault("/".join(path.split("/")[2:]) or path, []).append((path, values))
    for index, (kind, of) in enumerate(kinds.items()):
        for number, (_, values) in enumerate(of):
            style = dict(color=f"C{index % 10}", marker="os^v"[index // 10 % 4], markersize=4, linewidth=1)
            axes.plot(range(len(values)), values, label=kind if number == 0 else None, **style)
    axes.set_ylim(0, 1.1 * max((max(v) for v in found["errors"].values()), default=0.1))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3, fontsize="small")
    return figure
