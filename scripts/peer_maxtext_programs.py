"""A training step of MaxText compiled for an absent TPU slice, as one line of JSON; run with MaxText's own Python.

    PYTHONPATH=. MAXTEXT_PYTHON scripts/peer_maxtext_programs.py MODEL TOPOLOGY ROWS TOKENS REMAT

Rows are those of a device. Fully sharded over all devices, splash attention, AdamW in float32: MaxText's defaults.
"""

import json
import math
import os
import sys
import tempfile
import time

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"


def main(model: str, topology: str, rows: str, tokens: str, remat: str) -> None:
    from maxtext.trainers.pre_train import train_compile

    from jaxllm.plan.bounds import speed_of
    from jaxllm.plan.program import facts
    from jaxllm.plan.target import parse_target

    compile_step = train_compile.jit_and_compile

    def timed(func, inputs, kwargs, mesh, *rest):
        start = time.perf_counter()
        compiled = compile_step(func, inputs, kwargs, mesh, *rest)
        seconds = time.perf_counter() - start
        target = parse_target(topology)
        found = facts(compiled, mesh, target.chip, speed_of(target, dict(mesh.shape)))
        print("RESULT " + json.dumps(found.to_dict() | {"compile_seconds": seconds}), flush=True)
        return compiled

    train_compile.jit_and_compile = timed
    settings = {
        "model_name": model,
        "compile_topology": name_of(topology),
        "compile_topology_num_slices": 1,
        "per_device_batch_size": rows,
        "max_target_length": tokens,
        "remat_policy": remat,
        "attention": "flash",
        "dataset_type": "synthetic",
        "run_name": "programs",
        "base_output_directory": tempfile.mkdtemp(),
    }
    train_compile.main([sys.argv[0], *(f"{key}={value}" for key, value in settings.items())])


def name_of(topology: str) -> str:
    """MaxText's name: v5p by its cores, two a chip."""
    chip, _, shape = topology.partition(":")
    return f"{chip}-{math.prod(map(int, shape.split('x'))) * (2 if chip == 'v5p' else 1)}"


if __name__ == "__main__":
    main(*sys.argv[1:])
