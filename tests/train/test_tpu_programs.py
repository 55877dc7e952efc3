"""Steps compiled for absent TPUs: the kernels that are in them, and the size of two that are known.

Run by `pytest -m tpu_programs` where libtpu is installed (`pip install 'jaxllm[plan]'`).
"""

import importlib.util
import json
import os
from pathlib import Path

import jax
import pytest
import tiny

pytestmark = [
    pytest.mark.tpu_programs,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]
SIZES = Path(__file__).parent / "programs.json"
ATTN = {"heads": 4, "kv_heads": 4, "head": 128}
FORMS = {
    "window, soft-cap, sinks": ({"window": 200, "softcap": 30.0, "sinks": True}, {}, {"fsdp": 4}, {}),
    "experts": ({}, {"moe": {"experts": 4, "ffw": 256}}, {"expert": 2, "fsdp": 2}, {}),
    "experts on loan": ({}, {"moe": {"experts": 4, "ffw": 256}}, {"expert": 2, "fsdp": 2}, {"experts": "lend"}),
    "keys gathered": ({"window": 700}, {}, {"context": 2, "fsdp": 2}, {}),
    "keys in a ring": ({}, {}, {"context": 2, "fsdp": 2}, {"context": "ring"}),
    "tensor": ({}, {"mlp": {"ffw": 512}}, {"tensor": 2, "fsdp": 2}, {}),
    "tensor, context": ({}, {"mlp": {"ffw": 512}}, {"tensor": 2, "context": 2}, {}),
    "tensor, experts": ({}, {"moe": {"experts": 4, "ffw": 256}}, {"tensor": 2, "expert": 2}, {}),
}
#: What a program of each form has beside gathers and sums: collectives, kernels.
HAS = {
    "window, soft-cap, sinks": (set(), {"splash"}),
    "experts": ({"ragged-all-to-all"}, {"splash", "gmm", "tgmm"}),
    "experts on loan": ({"ragged-all-to-all"}, {"splash", "gmm", "tgmm"}),
    "keys gathered": (set(), {"splash"}),
    "keys in a ring": ({"collective-permute"}, set()),
    "tensor": (set(), {"splash"}),
    "tensor, context": (set(), {"splash"}),
    "tensor, experts": ({"ragged-all-to-all"}, {"splash"}),
}
#: Ragged exchanges of two layers, each forward, again, and backward: rows there and back; the three weights of experts.
RAGGED = {"experts": 2 * 3 * 2, "experts on loan": 2 * 3 * (2 + 3)}


@pytest.fixture(scope="module")
def devices():
    from jaxllm.plan.topology import parse_topology, topology_devices

    return {name: topology_devices(parse_topology(name), 1) for name in ("v5e:2x2",)}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_compiles_with_its_kernels(form, devices):
    import optax
    from jax.sharding import NamedSharding

    from jaxllm.model.build import build
    from jaxllm.objectives.lm import lm
    from jaxllm.plan.program import facts
    from jaxllm.sharding import ParallelConfig, make_sharding
    from jaxllm.train.step import abstract_state, make_train_step

    attn, ffw, parallel, kernels = FORMS[form]
    config = tiny.config(ATTN | attn, embed=256, vocab=1024, dtype="bfloat16", remat="full", **ffw)
    sharding = make_sharding(ParallelConfig(**{"fsdp": 1} | parallel), devices["v5e:2x2"])
    model, tx = build(config, sharding, tiny.Kernels(**kernels)), optax.sgd(1.0)
    batch = tiny.batch(4, 1024)
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(sharding.mesh, sharding.rows_spec(x.ndim))
        ),
        batch,
    )
    state = abstract_state(model, tx)
    program = facts(make_train_step(model, lm, tx, abstract=state).lower(state, rows).compile(), sharding.mesh)
    collectives, kernels = HAS[form]
    assert collectives <= {one.kind for one in program.collectives}
    assert kernels == {name.split("_")[0] for name in (one.name for one in program.kernels)} & {"splash", "gmm", "tgmm"}
    if form in RAGGED:
        assert RAGGED[form] == sum(one.count for one in program.collectives if one.kind == "ragged-all-to-all")


def test_experts_in_float32_fit_the_kernel():
    """Tiles of 1024 x 1024 in 4 bytes do not fit the VMEM that a kernel has on v5p."""
    from jax.sharding import SingleDeviceSharding

    from jaxllm.kernels.backend import tracing_for
    from jaxllm.kernels.experts import grouped_matmul
    from jaxllm.plan.topology import parse_topology, topology_devices

    place = SingleDeviceSharding(topology_devices(parse_topology("v5p:2x2x1"), 1)[0])
    shapes = (((2048, 2048), "float32"), ((4, 2048, 2048), "float32"), ((4,), "int32"))
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]

    def loss(x, w, sizes):
        return grouped_matmul(x, w, sizes, block=1).sum()

    with tracing_for("tpu", 1):
        text = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile().as_text()
    assert "tgmm" in text


@pytest.mark.parametrize("name", ["llama2-7b-v5p", "llama3.1-8b-v5p"])
def test_a_program_has_not_grown(name):
    """Memory and bytes sent within 3 % of what was recorded: JAXLLM_SIZES=write records them anew."""
    import sys

    from jaxllm import bench_programs

    found = bench_programs._run([sys.executable, "-m", "jaxllm.bench_programs", name])
    version = ".".join(jax.__version__.split(".")[:2])
    known = json.loads(SIZES.read_text()) if SIZES.exists() else {}
    if os.environ.get("JAXLLM_SIZES") == "write":
        known.setdefault(version, {})[name] = {key: round(found[key], 2) for key in ("memory_gib", "wire_gb")}
        SIZES.write_text(json.dumps(known, indent=1) + "\n")
    assert version in known, f"no sizes recorded for jax {version}; see {SIZES}"
    for key, size in known[version][name].items():
        assert found[key] < 1.03 * size, f"{key}: {found[key]:.2f} and not {size}"
