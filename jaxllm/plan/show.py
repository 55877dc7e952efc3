"""A plan as text for a person, and as bars in a picture."""

from typing import Any

from jaxllm.train.estimate.held import NAMES, table
from jaxllm.train.memory import size


def show(found: dict[str, Any]) -> str:
    """The dict of `plan` as lines."""
    parts = [_head(found), _memory(found), _flops(found), _network(found), _time(found), _training(found)]
    return "\n\n".join(part for part in parts if part)


def _head(found) -> str:
    where, run, count = found["topology"], found["run"], found["parameters"]
    mesh = " x ".join(f"{axis} {n}" for axis, n in found["mesh"].items())
    slices = f"{where['slices']} slices, " if where["slices"] > 1 else ""
    changes = f", {', '.join(run['changes'])}" if run["changes"] else ""
    micro = f" in {run['accumulate']} microbatches" if run["accumulate"] > 1 else ""
    remat = run["remat"] if isinstance(run["remat"], str) else " ".join(run["remat"])
    lines = [
        f"{where['name']}: {slices}{where['chips']:,} chips, {mesh}",
        f"{count['total']:,} parameters, {count['active']:,} in matrix products, {count['trained']:,} trained",
        f"{run['rows']:,} rows x {run['seq_len']:,} = {run['tokens']:,} tokens a step{micro}, {run['dtype']}, "
        f"remat {remat}, {run['optimizer']}{changes}",
    ]
    if run["assumed"]:
        lines.append(f"a model by itself; assumed: {', '.join(run['assumed'])}")
    if found["compiled"]:
        versions = ", ".join(
            f"{name} {found['compiled'][name]}" for name in ("jax", "libtpu") if name in found["compiled"]
        )
        done = "compiled in" if found["compiled"]["fits"] else "refused as too large, after"
        lines.append(f"{done} {found['compiled']['seconds']:.0f} s by {versions}")
    return "\n".join(lines)


def _memory(found) -> str:
    memory = found["memory"]
    total, capacity = memory["total"], memory["capacity"]
    of = f" of {size(capacity)}, {total / capacity:.0%}" if capacity else ""
    lines = [f"memory of a device, by {memory['source']}: {size(total)}{of}" + " (too much)" * (not memory["fits"])]
    if memory["capacity_how"]:
        lines.append(f"  ({memory['capacity_how']})")
    lines += table(memory["kinds"], memory["most"])
    if memory["estimate"]["error"] is not None:
        estimate = memory["estimate"]
        lines.append(f"  formulas say {size(estimate['total'])}, {estimate['error']:+.1%}")
    return "\n".join(lines)


def _flops(found) -> str:
    flops, parts = found["flops"], found["flops"]["analytic"]
    lines = [
        f"FLOPs of a device and step, by {flops['source']}: {flops['executed']:.4g}; the model asks for "
        f"{flops['model']:.4g}"
    ]
    names = ("matmul", "attention", "recomputed", "optimizer")
    lines += [f"  {name:<18}{parts[name]:>12.4g}" for name in names if parts.get(name)]
    if flops["error"] is not None:
        lines.append(f"  formulas say {parts['total']:.4g}, {flops['error']:+.2%}")
    return "\n".join(lines)


def _network(found) -> str:
    if not (rows := [row for row in found["network"] if row["wire_bytes"] >= 1e6]):
        return "network: nothing to send"
    lines = ["bytes that a device sends in a step" + "; of formulas it is not known what overlaps" * _unknown(rows)]
    for row in rows:
        axes, seconds = " ".join(row["axes"]) or "all", "" if row["seconds"] is None else f"{row['seconds']:9.3f} s"
        line = f"  {row['kind']:<19}{axes:<14}{row['network']:<5}{row['wire_bytes'] / 1e9:>10.2f} GB{seconds}"
        if row["overlapped_bytes"] is not None:
            line += f"  {row['overlapped_bytes'] / row['wire_bytes']:4.0%} beside compute"
        lines.append(line)
    return "\n".join(lines)


def _unknown(rows) -> bool:
    return all(row["overlapped_bytes"] is None for row in rows)


def _time(found) -> str:
    if found["step"] is None:
        return "time: no speed of these devices is known"
    step, speed = found["step"], found["speed"]
    lines = [f"a step takes {step['seconds']:.3f} s at least, by {_called(step['bound'])}"]
    for name, bound in found["bounds"].items():
        lines.append(f"  {_called(name):<18}{bound['seconds']:>9.3f} s  {bound['how']}")
    if step.get("with_waits"):
        lines.append(f"  and {step['with_waits']:.3f} s if it waits for all that the schedule does not overlap")
    lines.append(
        f"MFU {speed['mfu']:.1%}, {speed['tokens_per_second']:,.0f} tokens/s, "
        f"{speed['tokens_per_second_per_chip']:,.0f} per chip"
    )
    return "\n".join(lines)


def _called(bound: str) -> str:
    return {"ici": "links", "dcn": "slow network"}.get(bound, bound)


def _training(found) -> str:
    training, rules = found["training"], found["formulas"]
    lines = [f"{training['tokens']:,.0f} tokens in {training['steps']:,} steps"]
    if training["days"] is not None:
        lines[0] += f": {training['days']:,.2f} days, {training['chip_hours']:,.0f} chip-hours"
        lines[0] += _money(training["money"])
    if training["how"]:
        lines.append(f"  ({training['how']})")
    lines += ["rules of thumb, and the exact figures:"]
    six, active = rules["6ND"], rules["6ND_active"]
    lines.append(f"  {'C = 6ND':<26}{six['rule']:>12.4g} FLOPs a step   {six['exact']:>12.4g}")
    if active["rule"] != six["rule"]:
        lines.append(f"  {'C = 6ND, N in products':<26}{active['rule']:>12.4g} FLOPs a step   {active['exact']:>12.4g}")
    tokens, memory = rules["chinchilla"], rules["memory"]
    lines.append(f"  {'Chinchilla, 20 tokens a N':<26}{tokens['rule']:>12.4g} tokens         {tokens['exact']:>12.4g}")
    name = f"N x {memory['bytes']} bytes x 1.2"
    lines.append(f"  {name:<26}{size(memory['rule']):>12} a device      {size(memory['exact']):>12}")
    return "\n".join(lines)


def _money(money) -> str:
    if money is None:
        return ""
    if money["total"] is None:
        return f"; no price of this chip in {money['file']}"
    where = f"{money['file']}, {money['date']}"
    return f", {money['total']:,.0f} {money['currency']} at {money['chip_hour']:g} a chip-hour ({where})"


def chart(found: dict[str, Any], path: str) -> None:
    """Writes bars of memory, traffic and time as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4.2), constrained_layout=True)
    _memory_bars(left, found)
    rows = [row for row in found["network"] if row["wire_bytes"] >= 1e6][:8]
    names = [f"{row['kind']}\n{' '.join(row['axes']) or 'all'}" for row in rows]
    hidden = [(row["overlapped_bytes"] or 0) / 1e9 for row in rows]
    rest = [row["wire_bytes"] / 1e9 - beside for row, beside in zip(rows, hidden, strict=True)]
    middle.barh(names, hidden, label="beside compute")
    middle.barh(names, rest, left=hidden, label="exposed" if any(hidden) else "sent")
    middle.invert_yaxis()
    middle.set(xlabel="GB", title="sent by a device in a step")
    if rows:
        middle.legend()
    bounds = found["bounds"] or {}
    right.barh([_called(name) for name in bounds], [bound["seconds"] for bound in bounds.values()])
    right.invert_yaxis()
    right.set(xlabel="s", title="bounds of a step")
    where = found["topology"]
    figure.suptitle(f"{found['parameters']['total'] / 1e9:.3g}B parameters on {where['name']} x {where['slices']}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _memory_bars(axes, found) -> None:
    memory, bottom = found["memory"], 0.0
    for kind, value in memory["kinds"].items():
        if value > 0.005 * memory["total"]:
            axes.bar([0], [value / 2**30], bottom=[bottom], label=NAMES[kind], width=0.5)
            bottom += value / 2**30
    if memory["capacity"]:
        axes.axhline(memory["capacity"] / 2**30, color="black", linestyle="--", label="the device has")
    axes.set(xlim=(-0.5, 1.6), xticks=[], ylabel="GiB", title="memory of a device")
    axes.legend(loc="upper right", fontsize="small")
