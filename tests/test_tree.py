import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm import tree
from jaxllm.errors import SettingsError

PATHS = ["embed", "layers/0/attn/q", "layers/0/attn/q_norm", "layers/1/mlp/up", "norm/scale", "prefix/0/attn/q"]
PATTERNS = {
    "**": PATHS,
    "embed": ["embed"],
    "*": ["embed"],
    "layers": [],
    "layers/**": ["layers/0/attn/q", "layers/0/attn/q_norm", "layers/1/mlp/up"],
    "**/q": ["layers/0/attn/q", "prefix/0/attn/q"],
    "**/embed": ["embed"],
    "layers/*/attn/*": ["layers/0/attn/q", "layers/0/attn/q_norm"],
    "layers/*/q": [],
    "**/attn/**": ["layers/0/attn/q", "layers/0/attn/q_norm", "prefix/0/attn/q"],
    "**/q*": ["layers/0/attn/q", "layers/0/attn/q_norm", "prefix/0/attn/q"],
    "!**/attn/**": ["embed", "layers/1/mlp/up", "norm/scale"],
    "embed, norm/*": ["embed", "norm/scale"],
    "!embed,norm/*": ["layers/0/attn/q", "layers/0/attn/q_norm", "layers/1/mlp/up", "prefix/0/attn/q"],
    "layers/0/attn/.": [],
}


def nested():
    out = {}
    for i, path in enumerate(PATHS):
        *keys, last = path.split("/")
        inner = out
        for key in keys:
            inner = inner.setdefault(key, {})
        inner[last] = np.full((i + 1,), i, np.float32)
    return out


@pytest.mark.fast
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_choose_these_paths(pattern):
    assert [path for path in PATHS if tree.matches(pattern, path)] == PATTERNS[pattern]


def test_a_pattern_that_matches_nothing_names_the_nearest_path():
    with pytest.raises(SettingsError, match=r"no parameter matches 'layers/0/attn/w'; did you mean layers/0/attn/q\?"):
        tree.select(nested(), "layers/0/attn/w")


@pytest.mark.fast
def test_integers_are_never_chosen():
    weights = {"values": np.zeros(2, np.float32), "mask": np.zeros(2, np.uint8)}
    assert tree.select(weights, "**") == {"values": True, "mask": False}
    with pytest.raises(SettingsError, match="no parameter matches 'mask'"):
        tree.select(weights, "mask")


@pytest.mark.fast
def test_partition_and_combine_are_inverse():
    weights = nested()
    chosen, rest = tree.partition(weights, tree.select(weights, "**/attn/**"))
    assert set(tree.flatten(chosen)) == set(PATTERNS["**/attn/**"])
    assert not set(tree.flatten(chosen)) & set(tree.flatten(rest))
    assert tiny.bit_equal(tree.combine(chosen, rest), weights)


def test_paths_name_the_fields_of_a_weight_type():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Pair:
        data: jax.Array
        scale: jax.Array

    weights = {"layers": {"0": Pair(jnp.zeros(3, jnp.int8), jnp.ones(2))}}
    assert list(tree.flatten(weights)) == ["layers/0/data", "layers/0/scale"]
    assert tree.count(weights) == 5 and tree.nbytes(weights) == 11
    named = tree.map_with_path(lambda path, x, y: (path, x is y), weights, weights)
    assert named["layers"]["0"].data == ("layers/0/data", True)
