"""Row 12: what a step is said to need against what its compiled program needs, and what is said where it cannot fit.

Programs are compiled in processes of their own, which have eight virtual devices: `python -m jaxllm.verify.memory
NUMBER OF LONG` does every OF-th of them from NUMBER on and prints what it found as JSON.
"""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jaxllm.verify.lab import Found, Lab, little_compiling

#: How far an estimate may be from the compiled program; and from what the program is given, which is counted.
NEAR, EXACT = 0.15, 1e-3
ATTN, MLP = {"heads": 4, "kv_heads": 2}, {"ffw": 384}
LATENT = {"heads": 4, "head": 32, "latent": {"kv_rank": 64, "q_rank": 64, "rope_head": 16, "v_head": 32}}
#: Six kinds of models, in the settings in which they need what the others do not: more than eight layers, which are
#: scanned on CPU as elsewhere.
RUNS: dict[str, dict[str, Any]] = {
    "grouped queries": {"model": {"layers": 10, "pattern": [{"attn": ATTN, "mlp": MLP}]}},
    "tied, remat qkv": {
        "model": {
            "vocab": 4096, "layers": 9, "tied": True, "remat": "qkv",
            "pattern": [{"attn": ATTN | {"qk_norm": "head"}, "mlp": MLP}],
        }
    },
    "experts, remat minimal": {
        "model": {
            "layers": 9, "remat": "minimal", "pattern": [{"attn": ATTN, "moe": {"experts": 4, "ffw": 192}}],
        }
    },
    "latent attention, remat full": {
        "model": {"layers": 9, "remat": "full", "pattern": [{"attn": LATENT, "mlp": MLP}]},
    },
    "adapters": {"model": {"layers": 10, "pattern": [{"attn": ATTN, "mlp": MLP}]}, "lora": {"rank": 8}},
    "windows, microbatches": {
        "model": {"layers": 10, "remat": "full", "pattern": [{"attn": ATTN | {"window": 64}, "mlp": MLP}]},
        "train": {"accumulate": 2},
    },
}  # fmt: skip
#: Devices and how they share the work; the last one by experts where there are any.
MESHES: dict[str, dict[str, int]] = {"one device": {}, "fsdp": {"fsdp": 4}, "fsdp and tensor": {"fsdp": 2, "tensor": 2}}
EXPERTS = {"fsdp": 2, "expert": 2}
#: Shares of what a step needs that a device is said to have, where the step is to be refused.
SHARES = (0.85, 0.6, 0.4)
#: So many settings are to be named; and processes compile.
NAMED, WORKERS = 3, 2


def settings(name: str, mesh: str) -> dict[str, Any]:
    """The settings of a run whose text need not be there."""
    run = RUNS[name]
    parallel = EXPERTS if mesh == "fsdp and tensor" and name.startswith("experts") else MESHES[mesh]
    return {
        "model": {"vocab": 1024, "embed": 128, "context": 512} | run["model"],
        "data": {"sources": [{"name": "text", "path": "text"}], "vocab": 4096},
        "train": {"steps": 10, "seq_len": 256, "batch": 16, "init": "absent" if "lora" in run else None}
        | run.get("train", {}),
        "parallel": {"fsdp": 1} | parallel,
        "lora": run.get("lora"),
    }


CASES = [(name, mesh) for name in RUNS for mesh in MESHES]


def estimated(lab: Lab) -> Found:
    """Estimates against compiled programs; and steps that cannot fit, refused with what would make them fit."""
    workers = [_worker(lab, number) for number in range(WORKERS)]
    try:
        failures, rows = _run_that_is_refused(lab), [row for worker in workers for row in _rows(worker)]
    finally:
        for worker in workers:
            worker.kill()
    compiled, told = ([row for row in rows if key in row] for key in ("compiled", "wrong"))
    failures += [text for row in compiled for text in judged(row)]
    failures += [f"{row['name']}: {text}" for row in told for text in row["wrong"]]
    worst = max((abs(row["estimate"] / row["compiled"] - 1) for row in compiled), default=0.0)
    if len(compiled) < len(CASES) or not told:
        failures.append(f"{len(compiled)} of {len(CASES)} programs were compiled, {len(told)} refusals looked at")
    figure = (
        f"{len(compiled)} programs of {len(RUNS)} models, the worst estimate {worst:.0%} off; {len(told) + 1} "
        "steps that cannot fit refused, with settings that make them fit"
    )
    return Found(len(rows) + 1, tuple(failures), figure)


def judged(row: dict[str, Any]) -> list[str]:
    """What is wrong with an estimate. What is there before the step is known exactly, but for the step's number."""
    error, state = row["estimate"] / row["compiled"] - 1, row["state"] / row["arguments"] - 1
    failures = [f"{row['name']}: {error:+.0%} of the {row['compiled']:,} bytes of its program"] * (abs(error) > NEAR)
    wrong = f"{row['name']}: weights, optimizer state and batch {state:+.1%} of the {row['arguments']:,} bytes"
    return failures + [f"{wrong} that its program is given"] * (abs(state) > EXACT)


def compared(cases: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """`name`, `estimate`, `compiled`, `state` and `arguments` of each, in bytes of a device.

    One of them also with the first settings that are named where a device has less than it needs.
    """
    from jaxllm.train.estimate.advice import Place, applied, ways_to_fit

    for name, mesh in cases:
        config = _config(settings(name, mesh))
        yield {"name": f"{name}, {mesh}"} | _both(config)
        if mesh == "fsdp" and name == "grouped queries":
            place = Place(4, "cpu", 0.0)
            ways = ways_to_fit(config, Place(4, "cpu", SHARES[1] * place.total(config)))
            words = [word for one in ways[0] for word in one.overrides]
            yield {"name": f"{name}, {mesh}, with {' '.join(words)}"} | _both(applied(config, words))


def refusals(cases: Sequence[tuple[str, str]], long: bool) -> Iterator[dict[str, Any]]:
    """`name` and what is `wrong` with the settings named where a device has too little; quick: one for each model."""
    for name, mesh in cases:
        quick = SHARES[1:2] if mesh == "fsdp" else ()
        for share in SHARES if long else quick:
            yield {"name": f"{name}, {mesh}, at {share:.0%}", "wrong": refused(settings(name, mesh), share)}


def _both(config) -> dict[str, float]:
    import jax

    from jaxllm.train.estimate.held import held_by
    from jaxllm.train.estimate.step import make_step
    from jaxllm.train.memory import program_bytes

    parallel = config.parallel
    step = make_step(config, jax.devices("cpu")[: parallel.fsdp * parallel.expert * parallel.tensor])
    held, compiled = held_by(step, "cpu"), step.lower().compile()
    given = compiled.memory_analysis().argument_size_in_bytes
    return {"estimate": held.total, "compiled": program_bytes(compiled), "state": held.state, "arguments": given}


def refused(raw: dict[str, Any], share: float) -> list[str]:
    """What is wrong with the settings that are named where a device has this share of what a step needs."""
    from jaxllm.train.estimate.advice import Place, ways_to_fit

    config, devices = _config(raw), _devices(raw)
    need = _total(config, devices)
    ways = ways_to_fit(config, Place(devices, "cpu", share * need))
    if (count := sum(map(len, ways))) < NAMED:
        return [f"{count} settings are named, not {NAMED}: {ways}"]
    return [text for way in ways for text in _wrong(config, devices, way, share * need)]


def _wrong(config, devices: int, way, capacity: float) -> list[str]:
    """Each setting applied after those before it: it saves what was said, and with the last one it fits."""
    from jaxllm.train.estimate.advice import applied

    failures, need = [], _total(config, devices)
    for one in way:
        config, devices = applied(config, one.overrides), one.devices or devices
        now = _total(config, devices)
        if abs(need - now - one.saves) > 1e-6 * need:
            failures.append(f"{one.words} saves {need - now:,.0f} bytes, not {one.saves:,.0f}")
        need = now
    return failures + [f"with {way[-1].words} it needs {need:,.0f} bytes of {capacity:,.0f}"] * (need > capacity)


def _total(config, devices: int) -> float:
    """Bytes that a device needs, by formulas."""
    from jaxllm.train.estimate.held import held_by
    from jaxllm.train.estimate.step import describe

    return held_by(describe(config, devices), "cpu").total


def _devices(raw: dict[str, Any]) -> int:
    parallel = raw["parallel"]
    return parallel["fsdp"] * parallel.get("tensor", 1) * parallel.get("expert", 1)


def _config(raw: dict[str, Any]):
    from jaxllm.train.load import load_run

    return load_run(raw)[0]


def _run_that_is_refused(lab: Lab) -> list[str]:
    """A run whose rows cannot fit this machine: `jaxllm train` says what a step holds, and what would make it fit."""
    import psutil

    path = lab.settings(lab.folder / "large", train__batch=8 << (psutil.virtual_memory().total // 2**13).bit_length())
    with lab.started(path) as process:
        code, text = process.wait(120), process.said()
    kinds = ("parameters", "gradients", "optimizer state", "activations", "logits", "temporaries")
    failures = [f"the table has no {kind}" for kind in kinds if f"\n  {kind}" not in text]
    named = re.findall(r"^  \w+\.\w+=.* saves .*: .* needed$", text, re.M)
    failures += [f"{len(named)} settings are named"] * (len(named) < 2)
    failures += [f"exit code {code}, not 2"] * (code != 2)
    return [f"a run too large for this machine: {', '.join(failures)}: {text[-300:]}"] if failures else []


def _worker(lab: Lab, number: int) -> subprocess.Popen:
    # What LLVM does to the code takes most of the time, and changes no memory.
    env = lab.environ(devices=8)
    env["XLA_FLAGS"] += f" {little_compiling()}"
    command = [sys.executable, "-m", "jaxllm.verify.memory", str(number), str(WORKERS), str(int(lab.long))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def _rows(worker: subprocess.Popen) -> list[dict[str, Any]]:
    said, errors = worker.communicate(timeout=3600)
    if worker.returncode:
        raise RuntimeError(f"compiling ended with {worker.returncode}: {errors[-500:]}")
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


if __name__ == "__main__":
    number, of, long = map(int, sys.argv[1:])
    mine = CASES[number::of]
    for row in itertools.chain(refusals(mine, bool(long)), compared(mine)):
        print(json.dumps(row), flush=True)
