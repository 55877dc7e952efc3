"""What is said about a model without running it, and the tokens it takes."""

import jax
import numpy as np
import pytest
import tiny

from jaxllm import tree
from jaxllm.errors import SettingsError
from jaxllm.model.build import active_parameters, check_tokens
from jaxllm.model.spec import with_rope


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


def test_a_context_extension_changes_the_rope_of_every_layer_that_has_one():
    config = tiny.config(pattern=[tiny.layer({"window": 4}), tiny.layer({"rope": None})], prefix=[tiny.layer()])
    longer = with_rope(config, scaling="yarn", factor=4.0, original_context=16)
    ropes = [spec.attn.rope for spec in (*longer.prefix, *longer.pattern)]
    assert [rope and (rope.scaling, rope.factor) for rope in ropes] == [("yarn", 4.0)] * 2 + [None]
    assert longer.pattern[0].attn.window == 4
    paths = lambda c: jax.tree.map(lambda x: x.shape, tiny.one_device(c).abstract)  # noqa: E731
    assert paths(config) == paths(longer)
