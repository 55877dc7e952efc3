"""Grouped-query attention: projections, positions and norms around the attention kernel.

Shapes: B batch, T query position, S key position, D embed, N query heads, K kv heads, H head dim.
"""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxllm.kernels.attention import Form, PerHead, Where, attention
from jaxllm.model.cache import LayerCache
from jaxllm.model.param import norm_scale, normal, rms, zeros
from jaxllm.model.rope import alibi_slopes, rotate
from jaxllm.model.spec import AttnSpec, Kernels, ModelConfig
from jaxllm.sharding import Sharding
from jaxllm.weights.seam import einsum, unwrap


class Attention(nnx.Module):
    """One attention layer; see `AttnSpec` for what it can be."""

    def __init__(self, spec: AttnSpec, config: ModelConfig, rngs: nnx.Rngs):
        self.spec, self.config = spec, config
        D, N, K, H = config.embed, spec.heads, spec.kv_heads or spec.heads, config.head_dim(spec)
        self.q = normal(rngs, (D, N, H), ("embed", "heads", "head"), fan_in=D)
        self.k = normal(rngs, (D, K, H), ("embed", "kv_heads", "head"), fan_in=D)
        self.v = normal(rngs, (D, K, H), ("embed", "kv_heads", "head"), fan_in=D)
        # GPT-2's rule: sublayers that add to the residual stream start smaller by sqrt(2 * layers).
        self.o = normal(rngs, (N, H, D), ("heads", "head", "embed"), fan_in=N * H, gain=(2 * config.layers) ** -0.5)
        if spec.qkv_bias:
            self.q_bias = zeros((N, H), ("heads", "head"))
            self.k_bias = zeros((K, H), ("kv_heads", "head"))
            self.v_bias = zeros((K, H), ("kv_heads", "head"))
        if spec.out_bias:
            self.o_bias = zeros((D,), ("embed",))
        if spec.qk_norm == "head":
            self.q_norm, self.k_norm = (norm_scale(config, (H,), ("head",)) for _ in "qk")
        if spec.qk_norm == "all":
            self.q_norm = norm_scale(config, (N, H), ("heads", "head"))
            self.k_norm = norm_scale(config, (K, H), ("kv_heads", "head"))
        if spec.sinks:
            self.sinks = zeros((N,), ("heads",))

    def __call__(
        self, x_BTD, *, positions_BT, segments_BT, rope, sharding, kernels: Kernels, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        """`(y_BTD, cache)`; `rope` holds `cos_BTR, sin_BTR`, or None; with a cache, queries see what it holds."""
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD)
        # Said at once, or products would be laid out as what comes in: split by sequence, with weights gathered.
        q_BTNH = sharding.constrain(q_BTNH, "batch", "seq", "heads", None)
        k_BTKH, v_BTKH = (sharding.constrain(x, "batch", "seq", "kv_heads", None) for x in (k_BTKH, v_BTKH))
        if rope is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, *rope), rotate(k_BTKH, *rope)
        q_BTNH = checkpoint_name(sharding.constrain(q_BTNH, "batch", "seq", "heads", None), "q")
        k_BTKH, v_BTKH = checkpoint_name(k_BTKH, "k"), checkpoint_name(v_BTKH, "v")
        alone = cache is None or cache.empty
        cache = None if cache is None else cache.write(k_BTKH, v_BTKH, positions_BT)
        if alone:
            k_BKSH = sharding.constrain(k_BTKH.swapaxes(1, 2), "batch", "kv_heads", None, None)
            v_BKSH = sharding.constrain(v_BTKH.swapaxes(1, 2), "batch", "kv_heads", None, None)
            where = Where(positions_BT, positions_BT, segments_BT, segments_BT)
        else:
            k_BKSH, v_BKSH = cache.read(q_BTNH.dtype)
            where = Where(positions_BT, cache.positions_BS)
        o_BTNH = attend(self, q_BTNH, k_BKSH, v_BKSH, where, sharding, kernels if alone else None)
        o_BTNH = sharding.constrain(o_BTNH, "batch", "seq", "heads", None)
        y_BTD = einsum("BTNH,NHD->BTD", o_BTNH, self.o)
        if self.spec.out_bias:
            y_BTD = y_BTD + unwrap(self.o_bias).astype(y_BTD.dtype)
        return checkpoint_name(y_BTD, "attention_out"), cache

    def _project(self, x_BTD):
        q = einsum("BTD,DNH->BTNH", x_BTD, self.q)
        k = einsum("BTD,DKH->BTKH", x_BTD, self.k)
        v = einsum("BTD,DKH->BTKH", x_BTD, self.v)
        if self.spec.qkv_bias:
            q, k, v = (x + unwrap(b).astype(x.dtype) for x, b in ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias)))
        if self.spec.qk_norm is not None:
            q, k = self._norm(q, self.q_norm), self._norm(k, self.k_norm)
        return q, k, v

    def _norm(self, x_BTNH, scale):
        if self.spec.qk_norm == "head":
            return rms(self.config, x_BTNH, scale)
        flat = x_BTNH.reshape(*x_BTNH.shape[:2], -1)
        return rms(self.config, flat, unwrap(scale).reshape(-1)).reshape(x_BTNH.shape)


def attend(layer: nnx.Module, q_BTNH, k_BKSH, v_BKSH, where: Where, sharding: Sharding, kernels: Kernels | None):
    """The attention kernel with what the spec of this layer says: scale, window, soft-cap, slopes and sinks.

    kernels: None where keys are those of a cache, which only the reference reads.
    """
    spec = layer.spec
    scale = spec.scale if spec.scale is not None else layer.config.qk_dim(spec) ** -0.5
    slopes = jax.numpy.asarray(alibi_slopes(spec.heads)) if spec.alibi else None
    heads = PerHead(slopes, unwrap(layer.sinks) if spec.sinks else None)
    form = Form(scale, spec.window, spec.softcap)
    how = dict(kind=kernels.attention, ring=kernels.context == "ring") if kernels else dict(kind="reference")
    return attention(q_BTNH, k_BKSH, v_BKSH, form, where, heads, sharding=sharding, **how)
