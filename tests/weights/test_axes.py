import pytest
import tiny

from jaxllm import tree
from jaxllm.weights.axes import is_linear_map, is_matrix, sides

EVERY_VECTOR = {
    "attn": {"qkv_bias": True, "out_bias": True, "sinks": True, "qk_norm": "all"},
    "mlp": {"bias": True},
    "norm": "layer",
    "positions": "learned",
}
TABLE = [
    # axes, stack, inputs, outputs, decayed, Muon
    (("layers", "embed", "heads", "head"), (0,), (1,), (2, 3), True, True),  # q
    (("layers", "embed", "kv_heads", "head"), (0,), (1,), (2, 3), True, True),  # k, v
    (("layers", "heads", "head", "embed"), (0,), (1, 2), (3,), True, True),  # o
    (("embed", "ffw"), (), (0,), (1,), True, True),  # gate, up, unscanned
    (("layers", "ffw", "embed"), (0,), (1,), (2,), True, True),  # down
    (("layers", "expert", "embed", "ffw"), (0, 1), (2,), (3,), True, True),  # an expert's gate
    (("layers", "embed", "expert"), (0,), (1,), (2,), True, False),  # router
    (("vocab", "embed"), (), (0,), (1,), True, False),  # embedding, head
    (("layers", "embed", None), (0,), (1,), (2,), True, False),  # router whose experts are not split
    ((None, "embed"), (), (0,), (1,), True, False),  # learned positions
    (("layers", "embed", "rank"), (0,), (1,), (2,), True, True),  # LoRA, down
    (("layers", "rank", "heads", "head"), (0,), (1,), (2, 3), True, True),  # LoRA, up
    (("layers", "embed"), (0,), (1,), (), False, False),  # norm
    (("layers", "head"), (0,), (1,), (), False, False),  # QK-norm
    (("layers", "heads", "head"), (0,), (1, 2), (), False, False),  # bias of q: two axes, one side
    (("layers", "heads"), (0,), (1,), (), False, False),  # sinks
    (("layers", "expert", "ffw"), (0, 1), (2,), (), False, False),  # bias of an expert
    (("layers", "expert"), (0, 1), (), (), False, False),  # bias of the router
    ((), (), (), (), False, False),
]


@pytest.mark.parametrize("axes, stack, inputs, outputs, decayed, muon", TABLE)
def test_sides(axes, stack, inputs, outputs, decayed, muon):
    assert sides(axes) == (stack, inputs, outputs)
    assert (is_matrix(axes), is_linear_map(axes)) == (decayed, muon)


@pytest.mark.parametrize("config", [tiny.MOE, tiny.config(**EVERY_VECTOR)], ids=["moe", "every vector"])
def test_weights_of_the_model(config):
    """Every weight that is a matrix by name, and no norm, bias or sink, is decayed; Muon leaves the tables out."""
    axes = tree.flatten(tiny.one_device(config).axes, is_leaf=lambda x: isinstance(x, tuple))
    maps, tables = {"q", "k", "v", "o", "gate", "up", "down"}, {"embed", "head", "positions", "router"}
    for path, names in axes.items():
        name = path.split("/")[-1]
        assert is_matrix(names) == (name in maps | tables), path
        assert is_linear_map(names) == (name in maps), path
    assert {path.split("/")[-1] for path in axes} >= maps | {"embed", "scale"}
