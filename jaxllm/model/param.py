"""Parameters and norms: a weight's shape, logical axes and initialiser on one line."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.model.spec import ModelConfig
from jaxllm.sharding import Sharding
from jaxllm.weights.seam import unwrap


def normal(rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str], fan_in: int, gain: float = 1.0) -> nnx.Param:
    """A matrix drawn from N(0, gain^2 / fan_in)."""
    value = jax.random.normal(rngs.params(), shape, jnp.float32) * (gain / math.sqrt(fan_in))
    return nnx.Param(value, axes=tuple(axes))


def zeros(shape: Sequence[int], axes: Sequence[str]) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=tuple(axes))


def ones(shape: Sequence[int], axes: Sequence[str]) -> nnx.Param:
    return nnx.Param(jnp.ones(shape, jnp.float32), axes=tuple(axes))


def norm_scale(config: ModelConfig, shape: Sequence[int], axes: Sequence[str]) -> nnx.Param:
    """The weight of a norm that starts as the identity."""
    return zeros(shape, axes) if config.norm == "rms_unit_offset" else ones(shape, axes)


def rms(config: ModelConfig, x, scale, eps: float | None = None):
    """RMSNorm over the last axis, in float32 (Zhang and Sennrich 2019, arXiv 1910.07467).

    `norm=rms_unit_offset` stores weights less one (Gemma). `eps` replaces the model's.
    """
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + (config.norm_eps if eps is None else eps))
    scale = unwrap(scale).astype(jnp.float32)
    return (y * (1 + scale if config.norm == "rms_unit_offset" else scale)).astype(x.dtype)


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the residual stream."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.scale = norm_scale(config, (config.embed,), ("embed",))
        if config.norm == "layer":
            self.bias = zeros((config.embed,), ("embed",))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        if self.config.norm != "layer":
            return rms(self.config, x_BTD, self.scale)
        x = x_BTD.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.config.norm_eps)
        return (x * unwrap(self.scale) + unwrap(self.bias)).astype(x_BTD.dtype)


def dropout(x_BTD: jax.Array, rate: float, key: jax.Array | None, sharding: Sharding) -> jax.Array:
    """Zeroes a share `rate` of x and scales the rest up; without a key (evaluation) x itself."""
    if key is None or rate == 0:
        return x_BTD
    keep_BTD = by_row(key, x_BTD.shape, sharding, lambda key, shape: jax.random.bernoulli(key, 1 - rate, shape))
    return jnp.where(keep_BTD, x_BTD / (1 - rate), 0).astype(x_BTD.dtype)


def by_row(key: jax.Array, shape: tuple[int, int, int], sharding: Sharding, draw) -> jax.Array:
    """Random numbers `[B, T, D]`, those of a row by its place in the whole batch: as many devices draw as one."""
    rows_B = sharding.first_row(shape[0]) + jnp.arange(shape[0])
    whole = sharding.row_length(shape[1]), shape[2]
    return sharding.part(jax.vmap(lambda row: draw(jax.random.fold_in(key, row), whole))(rows_B))
