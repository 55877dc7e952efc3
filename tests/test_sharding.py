"""The mesh and the table of rules: what is laid out where, and what a user is told when it does not fit."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from jaxllm.errors import SettingsError
from jaxllm.model.build import build
from jaxllm.sharding import ParallelConfig, make_sharding


def spec_of(weight):
    return tuple(weight.sharding.spec)


@pytest.mark.fast
def test_minus_one_takes_what_is_left():
    sizes = lambda **kwargs: dict(make_sharding(ParallelConfig(**kwargs)).mesh.shape)  # noqa: E731
    assert sizes() == {"data": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 1}
    assert sizes(tensor=2)["fsdp"] == 4
    assert sizes(data=-1, fsdp=2) == {"data": 4, "fsdp": 2, "expert": 1, "context": 1, "tensor": 1}
    assert make_sharding(ParallelConfig(), jax.devices()[:1]).mesh.size == 1


MISFITS = [
    ({"tensor": 3}, r"the mesh fsdp=-1 x tensor=3 does not fit 8 devices; products that fit: 1, 2, 4, 8"),
    (
        {"fsdp": 2, "tensor": 2},
        r"the mesh fsdp=2 x tensor=2 does not fit 8 devices; the product must be 8, or set parallel.fsdp=-1",
    ),
    ({"fsdp": 1}, r"the mesh of size 1 does not fit 8 devices; the product must be 8"),
    ({"fsdp": 16}, r"fsdp=16 does not fit 8 devices"),
    ({"tensor": 0}, r"parallel.tensor=0: a size is 1 or more"),
    ({"tensor": -2}, r"parallel.tensor=-2: a size is 1 or more"),
    ({"tensor": -1}, r"more than one -1: a size is 1 or more, and one may be -1"),
    ({"rules": {"hed": "tensor"}}, r"parallel.rules: unknown logical axis hed; did you mean head\?"),
    ({"rules": {"head": "tensr"}}, r"parallel.rules.head: unknown mesh axis tensr; did you mean tensor\?"),
    (
        {"expert": 2, "rules": {"expert": None}},
        r"parallel.rules.expert=None: expert is split over \('expert',\)",
    ),
    ({"context": 2, "rules": {"batch": ["data", "context"]}}, r"parallel.rules.batch=.*leave the rule out"),
    ({"rules": {"head": ["tensor", "fsd"]}}, r"parallel.rules.head: unknown mesh axis fsd; did you mean fsdp\?"),
]


@pytest.mark.parametrize("parallel,message", MISFITS, ids=lambda x: str(x)[:40])
def test_a_mesh_that_does_not_fit_says_which_would(parallel, message):
    with pytest.raises(SettingsError, match=message):
        make_sharding(ParallelConfig(**parallel))


UNEVEN = [
    (
        {"tensor": 4, "fsdp": 2},
        tiny.config(vocab_multiple=4),
        r"^layers/0/attn/k: kv_heads=2 does not divide over tensor=4; sizes that fit: 1, 2; "
        r"or replicate the kv heads: parallel.rules.kv_heads=null$",
    ),
    (
        {"tensor": 2},
        tiny.config(),
        r"^embed: vocab=61 does not divide over tensor=2; sizes that fit: 1; "
        r"or pad the vocabulary: model.vocab_multiple=2$",
    ),
    (
        {"expert": 8, "fsdp": 1},
        tiny.config(moe={"experts": 6}),
        r"^layers/0/moe/down: expert=6 does not divide over expert=8; sizes that fit: 1, 2, 3, 6$",
    ),
    (
        {"fsdp": 4, "data": 2, "rules": {"embed": ["data", "fsdp"]}},
        tiny.config({"head": 8}, embed=36),
        r"embed=36 does not divide over data\*fsdp=8; sizes that fit: 1, 2, 3, 4, 6$",
    ),
    (
        {"rules": {"ffw": "fsdp"}},
        tiny.config({"head": 8}),
        r"^layers/0/mlp/down: fsdp would split both ffw and embed; see parallel.rules$",
    ),
]


@pytest.mark.parametrize("parallel,config,message", UNEVEN)
def test_an_axis_that_does_not_divide_is_named_with_what_fits(parallel, config, message):
    with pytest.raises(SettingsError, match=message):
        build(config, make_sharding(ParallelConfig(**parallel)))


@pytest.mark.fast
def test_what_the_errors_offer_works():
    parallel = ParallelConfig(tensor=4, fsdp=2, rules={"kv_heads": None})
    model = build(tiny.config(vocab_multiple=4), make_sharding(parallel))
    attn = model.abstract["layers"]["0"]["attn"]
    assert spec_of(attn["q"]) == (None, "fsdp", "tensor", None)
    assert spec_of(attn["k"]) == (None, "fsdp", None, None)
    assert spec_of(model.abstract["embed"]) == ("tensor", "fsdp")


def test_new_weights_are_made_where_they_live():
    model = build(tiny.config(layers=1, vocab_multiple=8), make_sharding(ParallelConfig(fsdp=4, tensor=2)))
    params = model.init(jax.random.key(0))
    one = build(model.config, make_sharding(ParallelConfig(), jax.devices()[:1])).init(jax.random.key(0))
    assert jax.tree.all(jax.tree.map(lambda x, a: x.sharding == a.sharding, params, model.abstract))
    assert params["layers"]["0"]["mlp"]["up"].addressable_shards[0].data.shape == (1, 8, 24)
    assert tiny.worst(params, one) < 1e-6


@pytest.mark.fast
def test_batches_and_activations_are_split_by_rows_and_sequence():
    sharding = make_sharding(ParallelConfig(data=2, fsdp=2, context=2))
    assert sharding.batch_size == 4
    put = sharding.batch({"x": np.arange(32).reshape(4, 8), "row": np.arange(4)})
    assert put["x"].sharding.spec == P(("data", "fsdp", "expert"), "context")
    np.testing.assert_array_equal(put["x"], np.arange(32).reshape(4, 8))
    assert put["x"].addressable_shards[0].data.shape == (1, 4) and put["row"].addressable_shards[0].data.shape == (1,)
    x = jax.jit(lambda x: sharding.constrain(x, "batch", "seq", None))(jnp.zeros((8, 6, 4)))
    assert x.sharding.shard_shape(x.shape) == (2, 3, 4)
    odd = jax.jit(lambda x: sharding.constrain(x, "batch", "seq", None))(jnp.zeros((8, 5, 4)))
    assert odd.sharding.shard_shape(odd.shape) == (2, 5, 4)  # an activation that does not divide stays whole


#: A process of two, with two devices: on a mesh of which each has rows of its own, one where both hold parts of the
#: same rows, and one whose rows do not lie together.
PROCESS = """
import sys
import jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jax.sharding import AxisType, Mesh
from jaxllm.errors import SettingsError
from jaxllm.sharding import MESH_AXES, Sharding
devices, rank = np.array(jax.devices()).reshape(2, 2), jax.process_index()
for name, devices in (("apart", devices), ("parts", devices.T), ("mixed", devices.T.reshape(4, 1))):
    mesh = Mesh(devices.reshape(1, len(devices), 1, -1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 5)
    sharding = Sharding(mesh)
    try:
        share, shares = sharding.share
        rows = np.arange(4 * 8, dtype=np.int32).reshape(4, 8)[share * 4 // shares:][:4 // shares]
        x = sharding.batch(rows)
        for shard in x.addressable_shards:
            assert (np.asarray(shard.data) == np.arange(32).reshape(4, 8)[shard.index]).all(), shard.index
        print("OK", name, share, shares, x.shape, x.addressable_shards[0].data.shape, flush=True)
    except SettingsError as error:
        print("REFUSED", name, error, flush=True)
"""


def test_processes_read_the_rows_of_their_devices():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environ = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    pipes = dict(env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ranks = [subprocess.Popen([sys.executable, "-c", PROCESS, address, str(n)], **pipes) for n in (0, 1)]
    try:
        found = [rank.communicate(timeout=90) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for rank, (out, err) in enumerate(found):
        lines = [line for line in out.splitlines() if line.startswith(("OK", "REFUSED"))]
        assert lines[0] == f"OK apart {rank} 2 (4, 8) (2, 4)", out + err
        assert lines[1] == "OK parts 0 1 (4, 8) (2, 4)", out + err
        assert lines[2].startswith("REFUSED mixed the mesh fsdp=4 gives the 2 processes rows that do not"), out + err
