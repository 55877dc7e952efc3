"""What is said about a model without running it, and the tokens it takes."""

import jax
import numpy as np
import pytest
import tiny

from jaxllm import tree
from jaxllm.errors import SettingsError
from jaxllm.model.build import active_parameters, check_tokens
from jaxllm.weights.axes import is_matrix

LATENT = {"kv_heads": None, "latent": {"kv_rank": 12, "q_rank": 8, "rope_head": 4, "v_head": 5}, "sinks": True}
BIASED = {"bias": True, "router_bias": True, "balance": "bias", "experts_per_token": 3, "shared_ffw": 16}


@pytest.mark.fast
def test_layers_are_stacked_by_slot_of_the_pattern():
    """Five layers of a pattern of two: two periods stacked, one layer left over; every axis has its name."""
    model = tiny.one_device(tiny.DENSE)
    shapes = {path: leaf.shape for path, leaf in tree.flatten(model.abstract).items()}
    assert shapes["layers/0/attn/q"] == shapes["layers/1/attn/q"] == (2, 32, 4, 8)
    assert shapes["suffix/0/attn/q"] == (32, 4, 8) and "suffix/1/attn/q" not in shapes
    assert shapes["embed"] == (64, 32) and "head" not in shapes
    assert "layers/1/attn/q_norm" in shapes and "layers/0/attn/q_norm" not in shapes
    names = tree.flatten(model.axes, is_leaf=lambda x: isinstance(x, tuple))
    assert {path: len(axes) for path, axes in names.items()} == {path: len(s) for path, s in shapes.items()}
    assert names["layers/0/attn/q"] == ("layers", "embed", "heads", "head")


@pytest.mark.parametrize("kind", ["dense", "moe", "learned"])
def test_active_parameters_are_those_in_matrix_products(kind):
    """Of two embedding tables one is a product; of four experts two are."""
    config = {"dense": tiny.DENSE, "moe": tiny.MOE, "learned": tiny.config({"rope": None}, positions="learned")}[kind]
    model = tiny.one_device(config)
    sizes = {path: leaf.size for path, leaf in tree.flatten(model.abstract).items()}
    total, active = active_parameters(config, model.abstract)
    assert total == sum(sizes.values())
    expected = sizes["head" if "head" in sizes else "embed"]
    for path, size in sizes.items():
        last = path.split("/")[-1]
        if last in ("q", "k", "v", "o", "router"):
            expected += size
        if last in ("gate", "up", "down"):
            expected += size // 2 if "/moe/" in path and "/shared/" not in path else size
    assert active == expected


def test_active_parameters_of_latent_attention_and_experts_with_biases():
    """Whatever the optimizer takes for a matrix is in a product; a prefix, two periods and a remainder."""
    moe = BIASED | {"groups": 2, "groups_per_token": 2, "group_score": "top2"}
    pattern = [tiny.layer(LATENT, moe=moe), tiny.layer({"qkv_bias": True, "qk_norm": "all"}, {"bias": True})]
    config = tiny.config(pattern=pattern, prefix=[tiny.layer(LATENT)], layers=6, norm="rms_unit_offset")
    model = tiny.one_device(config)
    axes = tree.flatten(model.axes, is_leaf=lambda x: isinstance(x, tuple))
    expected = 0
    for path, leaf in tree.flatten(model.abstract).items():
        if is_matrix(axes[path]) and path != "embed":
            expected += leaf.size * 3 // 4 if axes[path][-3:-2] == ("expert",) else leaf.size
    total, active = active_parameters(config, model.abstract)
    assert (total, active) == (sum(x.size for x in jax.tree.leaves(model.abstract)), expected)
    # By hand: one latent layer and its experts.
    latent = 32 * 8 + 8 * 4 * 12 + 32 * 12 + 32 * 4 + 12 * 4 * 8 + 12 * 4 * 5 + 4 * 5 * 32
    plain = 32 * 8 * (4 + 2 + 2 + 4)
    experts = 32 * 4 + 3 * 3 * 32 * 24 + 3 * 32 * 16
    assert active == 61 * 32 + 4 * latent + 2 * plain + 3 * experts + 3 * (3 * 32 * 48)


@pytest.mark.fast
def test_tokens_outside_the_model_are_named():
    config = tiny.config({"rope": None}, positions="learned")
    check_tokens(config, np.array([[0, tiny.VOCAB - 1]]))
    with pytest.raises(SettingsError, match=r"token id 61 at \[1, 2\] is outside the vocabulary of 61"):
        check_tokens(config, [[0, 1, 2], [3, 4, 61]])
    with pytest.raises(SettingsError, match=r"token id -1 at \[0\]"):
        check_tokens(config, [-1])
    with pytest.raises(SettingsError, match=r"65 tokens are more than the 64 learned positions \(model.context\)"):
        check_tokens(config, np.zeros((1, 65), int))
