"""A weight type of one's own passes through the whole model and its training without an edit of either."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxllm import tree
from jaxllm.kernels.experts import grouped_matmul
from jaxllm.model.build import build
from jaxllm.objectives.lm import lm
from jaxllm.sharding import ParallelConfig, make_sharding
from jaxllm.train.step import make_state, make_train_step

BATCH = tiny.batch()
CONFIG = tiny.config(prefix=[tiny.layer()], layers=3, moe={"shared_ffw": 16}, tied=True, vocab_multiple=8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """An int8 matrix and one float32 factor, each with the leading axis of a stack of layers."""

    data: jax.Array
    scale: jax.Array

    def einsum(self, equation, x, *, dtype=None):
        y = jnp.einsum(equation, x, self.data.astype(x.dtype), preferred_element_type=dtype)
        return y * self.scale.astype(y.dtype)

    def grouped_matmul(self, x_MD, sizes_E, *, block):
        return grouped_matmul(x_MD, self.data.astype(x_MD.dtype), sizes_E, block=block) * self.scale.astype(x_MD.dtype)

    def take(self, ids, dtype):
        return (self.data[ids] * self.scale).astype(dtype)


def is_scaled(x):
    return isinstance(x, Scaled)


def wide(scale, ndim):
    """The factors with an axis of size 1 for each axis of a matrix."""
    return scale.reshape(*scale.shape, *[1] * (ndim - scale.ndim))


def quantised(model):
    """The weights with every matrix replaced, and plain weights of the same values; NumPy compiles nothing."""

    def replace(path, w, axes):
        stacked = axes[0] == "layers"
        if len(axes) - stacked < 2:
            return w
        values = np.asarray(w)
        scale = np.max(np.abs(values), axis=tuple(range(stacked, w.ndim))) / np.float32(127)
        data = np.round(values / wide(scale, w.ndim)).astype(np.int8)
        return Scaled(jax.device_put(data, w.sharding), jax.device_put(scale, model.sharding.replicated()))

    def plain(x):
        if not is_scaled(x):
            return x
        return jax.device_put(np.asarray(x.data) * wide(np.asarray(x.scale), x.data.ndim), x.data.sharding)

    params = tree.map_with_path(replace, tiny.weights(model), model.axes)
    assert sum(map(is_scaled, jax.tree.leaves(params, is_leaf=is_scaled))) == 19
    return params, jax.tree.map(plain, params, is_leaf=is_scaled)


@pytest.fixture(scope="module")
def expected():
    model = tiny.one_device(CONFIG)
    return np.asarray(jax.jit(model.logits)(quantised(model)[1], BATCH.tokens_BT, **tiny.where(BATCH)))


@pytest.mark.parametrize("how", ["unrolled", "scan", "remat", "mesh"])
def test_a_weight_type_gives_the_logits_of_its_values(expected, how):
    config = dataclasses.replace(CONFIG, remat="minimal" if how == "remat" else "none")
    model = tiny.one_device(config, unroll=99 if how == "unrolled" else 0)
    if how == "mesh":
        model = build(config, make_sharding(ParallelConfig(fsdp=2, expert=2, tensor=2)), model.kernels)
    logits = jax.jit(model.logits)(quantised(model)[0], BATCH.tokens_BT, **tiny.where(BATCH))
    assert tiny.relative(logits[..., : tiny.VOCAB], expected[..., : tiny.VOCAB]) < 1e-5


def test_a_weight_type_trains_by_the_leaves_chosen():
    """Factors learn by the gradient of plain weights, integers stay; the tied head is a weight type too."""
    model = tiny.one_device(CONFIG, unroll=0)
    params, plain = quantised(model)
    tx = optax.sgd(1.0)
    state = make_state(model, tx, jax.random.key(0), params=quantised(model)[0], trainable="**/scale")
    state, metrics = make_train_step(model, lm, tx, trainable="**/scale")(state, BATCH)
    # The factor's gradient is the sum over the matrix of gradient * integer.
    count = BATCH.mask_BT.sum()
    loss, gradients = jax.jit(jax.value_and_grad(lambda p: lm(model, p, BATCH)[0] / count))(plain)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for path, old in tree.flatten(params, is_leaf=is_scaled).items():
        new, gradient = (tree.flatten(t, is_leaf=is_scaled)[path] for t in (state.params, gradients))
        if is_scaled(old):
            assert tiny.bit_equal(new.data, old.data)
            axes = tuple(range(old.scale.ndim, old.data.ndim))
            moved = np.asarray(old.scale) - np.asarray(new.scale)
            assert tiny.relative(moved, np.sum(np.asarray(gradient) * np.asarray(old.data), axis=axes)) < 1e-3, path
        elif not path.endswith("scale"):
            assert tiny.bit_equal(new, old)
