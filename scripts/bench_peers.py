"""Training speed of jaxllm beside MaxText's and nanodo's, taken in turn so that all see the same machine.

All run in float32 on CPU with AdamW, the same shapes, random tokens and the same allocator setting. MaxText runs with
remat_policy=none (no rematerialisation) and its other defaults; nanodo has no grouped-query attention, no gated
feed-forward, no mixture of experts and tied embeddings, so it gets an ungated layer of equal parameters, and no W2.
Each round measures every contender once, in a process of its own; the figure is the median step of a process, and
the ratio is the median over the rounds of the ratios within a round. `scripts/bench_peers.sh` shows the set-up.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from jaxllm.bench import WORKLOADS, Workload
from jaxllm.launch import TUNABLE

ENVIRON = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2", "GLIBC_TUNABLES": TUNABLE}
WARMUP = 2


def run(command: list, cwd=None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRON, cwd=cwd)
    if done.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def ours(options, name: str) -> float:
    """Median seconds of a step."""
    out = run([sys.executable, "-m", "jaxllm.bench", name, str(options.steps)])
    return json.loads(out[out.index('{"workload"') :].splitlines()[0])["step_ms"] / 1e3


def nanodo(options, name: str) -> float:
    """Median seconds of a step."""
    script = Path(__file__).with_name("peer_nanodo.py")
    steps = str(options.steps + WARMUP)
    out = run([options.nanodo_python, script, options.nanodo, json.dumps(sizes(WORKLOADS[name])), steps])
    seconds = next(json.loads(line) for line in out.splitlines() if line.startswith("["))
    return statistics.median(seconds[WARMUP:])


def maxtext(options, name: str) -> float:
    """Median seconds of a step, as MaxText logs them."""
    settings = maxtext_settings(WORKLOADS[name], options.steps + WARMUP)
    with tempfile.TemporaryDirectory() as folder:
        settings["base_output_directory"] = folder
        arguments = [f"{key}={value}" for key, value in settings.items()]
        out = run([options.maxtext_python, "-m", "maxtext.trainers.pre_train.train", *arguments], cwd=folder)
    seconds = [float(s) for s in re.findall(r"completed step: \d+, seconds: ([\d.]+)", out)]
    return statistics.median(seconds[WARMUP:])


def sizes(workload: Workload) -> dict[str, int]:
    model, (layer,) = workload.model, workload.model.pattern
    return {
        "vocab": model.vocab,
        "embed": model.embed,
        "layers": model.layers,
        "heads": layer.attn.heads,
        "kv_heads": layer.attn.kv_heads,
        "ffw": (layer.mlp or layer.moe).ffw,
        "rows": workload.rows,
        "length": workload.length,
    }


def maxtext_settings(workload: Workload, steps: int) -> dict[str, object]:
    size, moe = sizes(workload), workload.model.pattern[0].moe
    settings = {
        "run_name": "bench",
        "hardware": "cpu",
        "skip_jax_distributed_system": "true",
        "dataset_type": "synthetic",
        "steps": steps,
        "decoder_block": "llama2",
        "base_emb_dim": size["embed"],
        "base_num_decoder_layers": size["layers"],
        "base_num_query_heads": size["heads"],
        "base_num_kv_heads": size["kv_heads"],
        "head_dim": size["embed"] // size["heads"],
        "base_mlp_dim": size["ffw"],
        "vocab_size": size["vocab"],
        "max_target_length": size["length"],
        "per_device_batch_size": size["rows"],
        "dtype": "float32",
        "weight_dtype": "float32",
        "attention": "dot_product",
        "remat_policy": "none",
    }
    if moe:
        settings |= {"decoder_block": "mixtral", "num_experts": moe.experts, "base_moe_mlp_dim": moe.ffw}
        settings |= {"num_experts_per_tok": moe.experts_per_token, "megablox": "false", "sparse_matmul": "false"}
    off = ("enable_checkpointing", "enable_tensorboard", "log_config", "save_config_to_gcs", "gcs_metrics")
    off += ("enable_goodput_recording", "monitor_goodput")
    return settings | dict.fromkeys(off, "false")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maxtext-python", help="interpreter of an environment with maxtext")
    parser.add_argument("--nanodo-python", default=sys.executable, help="interpreter with jax, flax and optax")
    parser.add_argument("--nanodo", help="a checkout of nanodo")
    parser.add_argument("--workloads", nargs="+", default=["W1", "W2"], choices=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    for name in options.workloads:
        contenders = {"jaxllm": ours}
        if options.maxtext_python:
            contenders["MaxText"] = maxtext
        if options.nanodo and not WORKLOADS[name].model.pattern[0].moe:
            contenders["nanodo"] = nanodo
        compare(options, name, contenders)


def compare(options, name: str, contenders: dict) -> None:
    seconds = {who: [] for who in contenders}
    for number in range(options.rounds):
        for who, measure in contenders.items():
            seconds[who].append(measure(options, name))
            print(f"{name} round {number + 1} {who}: {seconds[who][-1] * 1e3:.0f} ms", file=sys.stderr, flush=True)
    tokens = WORKLOADS[name].rows * WORKLOADS[name].length
    for who, times in seconds.items():
        ratio = statistics.median(theirs / mine for theirs, mine in zip(times, seconds["jaxllm"], strict=True))
        speed = tokens / statistics.median(times)
        print(f"{name} {who:8} {speed:8,.0f} tokens/s   jaxllm is {ratio:.2f} times as fast", flush=True)


if __name__ == "__main__":
    main()
