"""The report of a compression: sizes, errors and what it cost in quality, as a table, as JSON and as a plot."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: The measures of a text, by their names in a report, and how they are printed.
MEASURES = {"perplexity": "{:,.3f}", "bits_per_byte": "{:.4f}", "heldout_loss": "{:.4f}"}

#: What is known of each layer, by its name in a report, and what it is.
KINDS = {"errors": "relative error of", "removed": "importance lost of"}


def report(
    settings: Mapping[str, Any],
    sizes: tuple[int, int],
    errors: Mapping[str, Sequence[float]],
    quality: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What `report.json` holds.

    Args:
      settings: how it was made, as plain dicts.
      sizes: bytes of the weights before and after.
      errors: `{path: relative error of each layer}`.
      quality: what `api.compare` gives, or None where there was no text.
      more: of pruning: `parameters` and `nonzeros` before and after, and what `api.prune` gives.
    """
    before, after = sizes
    sizes = {"bytes_before": before, "bytes_after": after, "compression": before / after}
    return {"settings": settings, **sizes, "errors": dict(errors), **(quality or {}), **more}


def show(found: Mapping[str, Any]) -> str:
    """The report as text: sizes, a line for each measure, a line for each weight or part."""
    smaller = f", {found['compression']:.2f} times smaller" if found["compression"] > 1 else ""
    lines = [f"{'bytes':<16} {found['bytes_before']:>14,} -> {found['bytes_after']:,}{smaller}"]
    for name in ("parameters", "nonzeros"):
        if name in found:
            before, after = found[name]["before"], found[name]["after"]
            lines.append(f"{name:<16} {before:>14,} -> {after:,}, {after / before:.1%}")
    for name, form in MEASURES.items():
        if name in found:
            before, after = found[name]["before"], found[name]["after"]
            change = f", {after / before - 1:+.2%}" if name == "perplexity" else ""
            lines.append(f"{name:<16} {form.format(before):>14} -> {form.format(after)}{change}")
    if "greedy_agreement" in found:
        lines.append(f"{'same likeliest':<16} {found['greedy_agreement']:>14.2%} of {found['positions']:,} positions")
    if "dropped" in found:
        gone = ", ".join(f"{i} ({found['influence'][i]:.4f})" for i in found["dropped"])
        lines.append(f"{'without layer':<16} {gone} (block influence)")
    parts = [(kind, found[key]) for key, kind in KINDS.items() if found.get(key)]
    return "\n".join(lines + [line for part in parts for line in _by_layer(*part)])


def _by_layer(kind: str, of: Mapping[str, Sequence[float]]) -> list[str]:
    wide = max(len(kind), *map(len, of))
    lines = ["", f"{kind:<{wide}}  layers   mean  worst"]
    for path, values in of.items():
        lines.append(f"{path:<{wide}}  {len(values):>6} {sum(values) / len(values):>6.2%} {max(values):>6.2%}")
    return lines


def write(found: Mapping[str, Any], folder: Path) -> None:
    """Writes `report.json` and `report.png` into the folder."""
    (folder / "report.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    draw(found).savefig(folder / "report.png")


def draw(found: Mapping[str, Any]):
    """A matplotlib figure: what each layer lost, and what it cost above."""
    from matplotlib.figure import Figure  # slow to load

    kind, shown = _shown(found)
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="layer of its slot", ylabel=kind, title=_title(found))
    kinds: dict[str, list[tuple[str, Sequence[float]]]] = {}
    for path, values in shown.items():
        kinds.setdefault("/".join(path.split("/")[2:]) or path, []).append((path, values))
    for index, (kind, of) in enumerate(kinds.items()):
        for number, (_, values) in enumerate(of):
            style = dict(color=f"C{index % 10}", marker="os^v"[index // 10 % 4], markersize=4, linewidth=1)
            axes.plot(range(len(values)), values, label=kind if number == 0 else None, **style)
    axes.set_ylim(0, 1.1 * max((max(v) for v in shown.values()), default=0.1))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3, fontsize="small")
    return figure


def _shown(found: Mapping[str, Any]) -> tuple[str, Mapping[str, Sequence[float]]]:
    """What the plot is of: errors of weights; else the parts that went; else the layers, of which some went."""
    if found.get("removed"):
        return "share of the importance that went", found["removed"]
    if "influence" in found:
        return "1 - cosine of what goes in and out", {"block influence": found["influence"]}
    return "relative error of the weights", found["errors"]


def _title(found: Mapping[str, Any]) -> str:
    title = f"{found['compression']:.2f} times smaller"
    if "nonzeros" in found:
        title = f"{found['nonzeros']['after'] / found['nonzeros']['before']:.1%} of the weights left"
    if "perplexity" in found:
        title += f", perplexity {found['perplexity']['before']:,.3f} -> {found['perplexity']['after']:,.3f}"
    return title
