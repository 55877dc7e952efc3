"""The state of an optimizer lives where its weight does, whole or as rows and columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.optim.placement import like, owner_of

MESH = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("fsdp", "expert", "tensor"), axis_types=(AxisType.Auto,) * 3)


def weight(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, P(*spec)))


Q = weight((4, 32, 8, 6), None, "fsdp", "tensor", None)
EXPERTS = weight((4, 2, 32, 48), None, "expert", "fsdp", "tensor")


@pytest.mark.fast
@pytest.mark.parametrize(
    "owner, shape, spec",
    [
        (Q, (4, 32, 8, 6), P(None, "fsdp", "tensor", None)),
        (Q, (4, 32, 48), P(None, "fsdp", "tensor")),  # heads * head: blocks of heads
        (Q, (4, 32), P(None, "fsdp")),
        (Q, (4, 48), P(None, "tensor")),
        (Q, (4,), P(None)),
        (Q, (4, 1), P(None, None)),
        (Q, (), P()),
        (Q, (5, 7), P(None, None)),
        (EXPERTS, (4, 2, 32), P(None, "expert", "fsdp")),
        (EXPERTS, (4, 2, 48), P(None, "expert", "tensor")),
        (EXPERTS, (4, 2, 32 * 48), P(None, "expert", None)),  # tensor would cut across the rows of fsdp
        (weight((32, 8)), (32, 8), P(None, None)),  # a spec may be shorter than the shape
    ],
)
def test_axes_are_found_again(owner, shape, spec):
    assert like(owner, shape).spec == spec
    like(owner, shape).shard_shape(shape)


def test_the_longest_path_inside_is_the_owner():
    weights = {"embed": "table", "layers/0/attn/q": "q", "layers/0/mlp/embed": "inner"}
    for path, owner in {
        "1/0/embed/0/v/0": "table",
        "1/0/mu/layers/0/attn/q": "q",
        "1/inner/layers/0/mlp/embed/0/v_row": "inner",
        "1/0/count": None,
        "1/embedding/0": None,
    }.items():
        assert owner_of(path, weights) == owner
