"""Multi-head latent attention: all heads' keys and values come from one short vector a token (DeepSeek-V2).

arXiv 2405.04434, section 2.1 and appendix C; unchanged in DeepSeek-V3, arXiv 2412.19437, section 2.1.1.

Shapes: B batch, T query position, S key position, D embed, N heads, H head dim without position, R rotated dim, U value
dim, C width of the short vector of keys and values, Q width of the one of queries.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxllm.kernels.attention import Where
from jaxllm.model.attention import attend
from jaxllm.model.cache import LayerCache
from jaxllm.model.param import norm_scale, normal, rms, zeros
from jaxllm.model.rope import rotate
from jaxllm.model.spec import AttnSpec, Kernels, ModelConfig
from jaxllm.sharding import Sharding
from jaxllm.weights.seam import einsum, unwrap


class LatentAttention(nnx.Module):
    """One layer of latent attention; see `LatentSpec`."""

    def __init__(self, spec: AttnSpec, config: ModelConfig, rngs: nnx.Rngs):
        self.spec, self.config, latent = spec, config, spec.latent
        D, N, C, Q, R, U = config.embed, spec.heads, latent.kv_rank, latent.q_rank, latent.rope_head, latent.v_head
        H, wide = config.head_dim(spec), config.qk_dim(spec)
        if Q is None:
            self.q = normal(rngs, (D, N, wide), ("embed", "heads", "head"), fan_in=D)
        else:
            self.q_down = normal(rngs, (D, Q), ("embed", "rank"), fan_in=D)
            self.q_norm = norm_scale(config, (Q,), ("rank",))
            self.q_up = normal(rngs, (Q, N, wide), ("rank", "heads", "head"), fan_in=Q)
        self.kv_down = normal(rngs, (D, C), ("embed", "rank"), fan_in=D)
        self.kv_norm = norm_scale(config, (C,), ("rank",))
        self.k_rope = normal(rngs, (D, R), ("embed", "rank"), fan_in=D)
        self.k_up = normal(rngs, (C, N, H), ("rank", "heads", "head"), fan_in=C)
        self.v_up = normal(rngs, (C, N, U), ("rank", "heads", "head"), fan_in=C)
        self.o = normal(rngs, (N, U, D), ("heads", "head", "embed"), fan_in=N * U, gain=(2 * config.layers) ** -0.5)
        if spec.out_bias:
            self.o_bias = zeros((D,), ("embed",))
        if spec.sinks:
            self.sinks = zeros((N,), ("heads",))

    def __call__(
        self, x_BTD, *, positions_BT, segments_BT, rope, sharding, kernels: Kernels, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        """`(y_BTD, cache)`; `rope` holds `cos_BTR, sin_BTR`, or None; with a cache, queries see what it holds."""
        q_BTNH, q_BTNR = self._queries(x_BTD)
        c_BTC = self._norm(einsum("BTD,DC->BTC", x_BTD, self.kv_down), self.kv_norm)
        k_BT1R = einsum("BTD,DR->BTR", x_BTD, self.k_rope)[:, :, None]
        if rope is not None:
            q_BTNR, k_BT1R = rotate(q_BTNR, *rope), rotate(k_BT1R, *rope)
        alone = cache is None or cache.empty
        if cache is not None:
            cache = cache.write(jnp.concatenate([c_BTC[:, :, None], k_BT1R], axis=-1), None, positions_BT)
        if alone:
            where = Where(positions_BT, positions_BT, segments_BT, segments_BT)
            o_BTNU = self._expanded(q_BTNH, q_BTNR, c_BTC, k_BT1R, where, sharding, kernels)
        else:
            o_BTNU = self._compressed(q_BTNH, q_BTNR, cache, Where(positions_BT, cache.positions_BS), sharding)
        y_BTD = einsum("BTNU,NUD->BTD", o_BTNU, self.o)
        if self.spec.out_bias:
            y_BTD = y_BTD + unwrap(self.o_bias).astype(y_BTD.dtype)
        return checkpoint_name(y_BTD, "attention_out"), cache

    def _queries(self, x_BTD):
        """The parts of the queries without and with position."""
        if self.spec.latent.q_rank is None:
            q = einsum("BTD,DNH->BTNH", x_BTD, self.q)
        else:
            c_BTQ = self._norm(einsum("BTD,DQ->BTQ", x_BTD, self.q_down), self.q_norm)
            q = einsum("BTQ,QNH->BTNH", c_BTQ, self.q_up)
        H = self.config.head_dim(self.spec)
        return q[..., :H], q[..., H:]

    def _expanded(self, q_BTNH, q_BTNR, c_BTC, k_BT1R, where: Where, sharding: Sharding, kernels: Kernels):
        """Keys and values of every head in full, as the equations have it."""
        k_BTNH = einsum("BTC,CNH->BTNH", c_BTC, self.k_up)
        k_BTNR = jnp.broadcast_to(k_BT1R, q_BTNR.shape)
        q = sharding.constrain(jnp.concatenate([q_BTNH, q_BTNR], axis=-1), "batch", "seq", "heads", None)
        k = checkpoint_name(jnp.concatenate([k_BTNH, k_BTNR], axis=-1), "k").swapaxes(1, 2)
        v = checkpoint_name(einsum("BTC,CNU->BTNU", c_BTC, self.v_up), "v").swapaxes(1, 2)
        k, v = (sharding.constrain(x, "batch", "heads", None, None) for x in (k, v))
        return attend(self, checkpoint_name(q, "q"), k, v, where, sharding, kernels)

    def _compressed(self, q_BTNH, q_BTNR, cache: LayerCache, where: Where, sharding: Sharding):
        """The same on what the cache holds, with k_up taken into the queries and v_up into the outputs.

        (q k_up^T) c = q (k_up^T c), so one short key, shared by all heads, stands for theirs (section 2.1.2).
        """
        q_BTNC = einsum("BTNH,CNH->BTNC", q_BTNH, self.k_up)
        q = sharding.constrain(jnp.concatenate([q_BTNC, q_BTNR], axis=-1), "batch", "seq", "heads", None)
        # The values are the keys' first C dimensions: a slice of the cache would be copied, one of the output is not.
        k_BKSH, _ = cache.read(q.dtype)
        o_BTNC = attend(self, q, k_BKSH, k_BKSH, where, sharding, None)[..., : q_BTNC.shape[-1]]
        return einsum("BTNC,CNU->BTNU", o_BTNC, self.v_up)

    def _norm(self, x, scale):
        return rms(self.config, x, scale, self.spec.latent.norm_eps)
