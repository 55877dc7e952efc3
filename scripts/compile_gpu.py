"""Compiles the training step of Llama 3.1 8B for eight H100, on a machine that has none.

    pip install -e '.[cuda]'         # in an environment of its own: 4 GB, and no driver is needed
    python scripts/compile_gpu.py    # or with --tokens 4096 --rows 4 --layers 8

Packed rows, bfloat16, AdamW, weights split over the eight GPUs, layers recomputed but for the results of attention.
Prints the memory of one GPU as XLA laid it out. Exits with 1 unless the program has cuDNN's attention in both
directions, and no array of tokens by tokens. What cuDNN takes as workspace is known on a GPU only: at most 8 bytes for
each of 2 x rows x tokens x heads x head_dim here.
"""

import argparse
import os
import re
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from jaxllm.data.batch import TokenBatch
from jaxllm.model.build import build
from jaxllm.model.spec import AttnSpec, Kernels, LayerSpec, MlpSpec, ModelConfig, RopeSpec
from jaxllm.objectives.lm import lm
from jaxllm.optim.config import OptimConfig
from jaxllm.optim.optimizers import make_optimizer
from jaxllm.sharding import ParallelConfig, make_sharding
from jaxllm.train.step import abstract_state, make_train_step

#: An H100 SXM as XLA describes it (its device_description.proto), by NVIDIA's data sheet and CUDA's limits for 9.0.
H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  runtime_version: "13.0.0" driver_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.2"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 2 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def model_config(layers: int, tokens: int) -> ModelConfig:
    """Llama 3.1 8B, or fewer layers of it."""
    rope = RopeSpec(base=5e5, scaling="llama3", factor=8, original_context=8192)
    layer = LayerSpec(attn=AttnSpec(heads=32, kv_heads=8, rope=rope), mlp=MlpSpec(ffw=14336))
    return ModelConfig(
        vocab=128256, embed=4096, layers=layers, pattern=(layer,), context=tokens, dtype="bfloat16", norm_eps=1e-5,
        remat=("attention",),
    )  # fmt: skip


def lower_step(layers: int, rows: int, tokens: int):
    """The step as JAX wrote it; `rows` of each GPU."""
    devices = topologies.get_topology_desc("h100", "cuda", topology="1x1x8", target_config=H100).devices
    sharding = make_sharding(ParallelConfig(), devices)
    model = build(model_config(layers, tokens), sharding, Kernels(attention="cudnn"))
    tx = make_optimizer(OptimConfig(name="adamw"), 1000, model.axes)
    state = abstract_state(model, tx)
    by_row = NamedSharding(sharding.mesh, sharding.rows_spec(2))
    ints, floats = (
        jax.ShapeDtypeStruct((rows * len(devices), tokens), dtype, sharding=by_row)
        for dtype in (jnp.int32, jnp.float32)
    )
    batch = TokenBatch(ints, ints, floats, ints, ints)
    return make_train_step(model, lm, tx, abstract=state).lower(state, batch)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, default=2, help="of each GPU")
    parser.add_argument("--tokens", type=int, default=8192, help="of a row")
    args = parser.parse_args()
    started = time.time()
    lowered = lower_step(args.layers, args.rows, args.tokens)
    compiled = lowered.compile()
    print(f"compiled in {time.time() - started:.0f} s with jax {jax.__version__}")
    print("GiB of a GPU:", ", ".join(f"{name} {n / 2**30:.2f}" for name, n in memory(compiled).items()))
    text = compiled.as_text()
    calls = [text.count(f'custom_call_target="__cudnn$fmhaSoftmax{way}"') for way in ("", "Backward")]
    print(f"calls of cuDNN: {calls[0]} forward, {calls[1]} backward")
    # XLA's own text also has activations as arrays of other shapes, of 8192 x 8192 by chance.
    arrays = {tuple(map(int, dims.split("x"))) for dims in re.findall(r"tensor<((?:\d+x)*\d+)x", lowered.as_text())}
    square = [dims for dims in arrays if dims.count(args.tokens) > 1]
    print(f"arrays of {args.tokens} x {args.tokens}: {square or 'none'}")
    return 0 if all(calls) and not square else 1


def memory(compiled) -> dict[str, int]:
    """Bytes of one GPU by kind."""
    found = compiled.memory_analysis()
    parts = dict(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
    )
    return parts | {"all": sum(parts.values())}


if __name__ == "__main__":
    sys.exit(main())
