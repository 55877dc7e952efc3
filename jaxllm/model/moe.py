"""Mixture-of-experts layers: a router, a layout of rows by expert, grouped matrix products, and the way back.

Shapes: B batch (rows), T position, D embed, F ffw, E experts, X experts chosen per token, C capacity, M rows laid out
by expert.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxllm.kernels import exchange, lending
from jaxllm.kernels.experts import block_size, rows_needed
from jaxllm.model.mlp import GATED, Mlp, activate
from jaxllm.model.param import normal, zeros
from jaxllm.model.spec import Kernels, MlpSpec, ModelConfig, MoeSpec
from jaxllm.sharding import Sharding
from jaxllm.weights.seam import einsum, grouped_matmul, unwrap


class MoeAux(NamedTuple):
    """What a layer reports beside its output; losses are means over a row's real tokens, so that rows add up."""

    loss_B: jax.Array
    """Balance and z-loss with their coefficients."""
    balance_B: jax.Array
    """The load-balancing term alone, without its coefficient: 1 when balanced."""
    z_B: jax.Array
    """The router z term alone."""
    dropped_B: jax.Array
    """Choices dropped for lack of capacity, as a share."""
    load_E: jax.Array
    """Choices of real tokens per expert."""


class Moe(nnx.Module):
    """Router and experts; see `MoeSpec`."""

    def __init__(self, spec: MoeSpec, config: ModelConfig, rngs: nnx.Rngs):
        self.spec = spec
        D, F, E = config.embed, spec.ffw, spec.experts
        self.router = normal(rngs, (D, E), ("embed", None), fan_in=D)
        if spec.router_bias:
            self.router_bias = zeros((E,), (None,))
        if spec.balance == "bias":
            self.bias = zeros((E,), (None,))
        if spec.activation in GATED:
            self.gate = normal(rngs, (E, D, F), ("expert", "embed", "ffw"), fan_in=D)
        self.up = normal(rngs, (E, D, F), ("expert", "embed", "ffw"), fan_in=D)
        gain = (2 * config.layers) ** -0.5
        self.down = normal(rngs, (E, F, D), ("expert", "ffw", "embed"), fan_in=F, gain=gain)
        if spec.bias:
            if spec.activation in GATED:
                self.gate_bias = zeros((E, F), ("expert", "ffw"))
            self.up_bias = zeros((E, F), ("expert", "ffw"))
            self.down_bias = zeros((E, D), ("expert", "embed"))
        if spec.shared_ffw:
            shared = MlpSpec(ffw=spec.shared_ffw, activation=spec.activation, bias=spec.bias)
            self.shared = Mlp(shared, config, rngs)

    def __call__(
        self, x_BTD: jax.Array, real_BT: jax.Array, sharding: Sharding, kernels: Kernels | None = None
    ) -> tuple[jax.Array, MoeAux]:
        """`(y_BTD, aux)`; `real_BT` marks the tokens that count in the losses and take capacity."""
        logits_BTE = einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), self.router)
        if self.spec.router_bias:
            logits_BTE = logits_BTE + unwrap(self.router_bias)
        scores_BTE = jax.nn.softmax(logits_BTE) if self.spec.score == "softmax" else jax.nn.sigmoid(logits_BTE)
        chosen_BTX, gates_BTX = self._choose(scores_BTE)
        choice, axis = (chosen_BTX, gates_BTX.astype(x_BTD.dtype)), sharding.across("expert")
        if self.spec.capacity_factor is None:
            lends = kernels is not None and kernels.experts == "lend"
            y_BTD, kept_BTX = self._dropless(x_BTD, *choice, axis, sharding.by_row if lends else ())
        else:
            y_BTD, kept_BTX = self._with_capacity(x_BTD, *choice, real_BT, axis)
        if self.spec.shared_ffw:
            y_BTD = y_BTD + self.shared(x_BTD, sharding)
        return checkpoint_name(y_BTD, "mlp_out"), self._aux(
            logits_BTE, scores_BTE, chosen_BTX, kept_BTX, real_BT, sharding
        )

    def _choose(self, scores_BTE):
        """The experts of each token and their weights; a balancing bias moves the choice, never the weight."""
        ranking = jax.lax.stop_gradient(scores_BTE)
        if self.spec.balance == "bias":
            ranking = ranking + jax.lax.stop_gradient(unwrap(self.bias))
        if self.spec.groups > 1:
            ranking = self._within_best_groups(ranking)
        _, chosen_BTX = jax.lax.top_k(ranking, self.spec.experts_per_token)
        gates_BTX = jnp.take_along_axis(scores_BTE, chosen_BTX, axis=-1)
        if self.spec.renormalize:
            gates_BTX = gates_BTX / (jnp.sum(gates_BTX, axis=-1, keepdims=True) + 1e-20)
        return chosen_BTX, gates_BTX * self.spec.scale

    def _within_best_groups(self, ranking_BTE):
        """The ranking with -inf for experts outside of a token's best groups (DeepSeek-V2, section 2.2.2)."""
        spec = self.spec
        grouped = ranking_BTE.reshape(*ranking_BTE.shape[:2], spec.groups, -1)
        best, _ = jax.lax.top_k(grouped, 1 if spec.group_score == "max" else 2)
        _, chosen = jax.lax.top_k(jnp.sum(best, axis=-1), spec.groups_per_token)
        allowed = jnp.any(jax.nn.one_hot(chosen, spec.groups, dtype=bool), axis=2)
        return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(ranking_BTE.shape)

    def _dropless(self, x_BTD, chosen_BTX, gates_BTX, axis: str | None, lend: tuple[str, ...]):
        """Every choice is computed: rows are sorted by expert and multiplied group by group.

        `axis`: the mesh axis whose devices hold an equal part of the experts each; rows travel there and back. `lend`:
        the mesh axes over which devices agree whether hot experts travel as well; none where they never do.
        """
        B, T, D = x_BTD.shape
        X, E = self.spec.experts_per_token, self.spec.experts
        rows, flat = B * T * X, x_BTD.reshape(B * T, D)
        if axis is None:
            block = block_size(rows, E)
            slot_R, sizes_E = _layout(chosen_BTX.reshape(-1), E, block)
            token_M = jnp.full((rows_needed(rows, E, block),), B * T, jnp.int32)
            token_M = token_M.at[slot_R].set(jnp.arange(rows, dtype=jnp.int32) // X)
            y_MD = self._grouped(jnp.take(flat, token_M, axis=0, mode="fill", fill_value=0), sizes_E, block)
            y_RD = y_MD[slot_R]
        else:
            ways = jax.lax.axis_size(axis)
            block = block_size(rows * ways, E)
            slot_R, counts_E = _layout(chosen_BTX.reshape(-1), E, 1)
            if lend:
                travel, sizes_E, borrowed = lending.plan(counts_E, axis, block, lend)
            else:
                (travel, sizes_E), borrowed = exchange.plan(counts_E, axis, block), None
            token_R = jnp.zeros(rows, jnp.int32).at[slot_R].set(jnp.arange(rows, dtype=jnp.int32) // X)
            x_MD = travel.out(flat[token_R], rows_needed(rows * ways, sizes_E.shape[0], block))
            y_RD = travel.back(self._grouped(x_MD, sizes_E, block, borrowed), rows)[slot_R]
        return jnp.einsum("BTXD,BTX->BTD", y_RD.reshape(B, T, X, D), gates_BTX), jnp.ones(chosen_BTX.shape, bool)

    def _grouped(self, x_MD, sizes_E, block: int, borrowed: lending.Borrowed | None = None):
        """The experts on rows laid out expert-major: those at hand, then those that are borrowed."""

        def all_of(weight):
            return weight if borrowed is None else borrowed.widen(unwrap(weight), x_MD.dtype)

        def spread(bias):
            expert_M = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(x_MD.shape[0]), side="right")
            return jnp.take(
                all_of(bias), expert_M, axis=0, mode="clip"
            )  # nobody reads the rows after the last expert's

        return self._experts(lambda x, w: grouped_matmul(x, all_of(w), sizes_E, block=block), spread, x_MD)

    def _with_capacity(self, x_BTD, chosen_BTX, gates_BTX, real_BT, axis: str | None):
        """Each expert takes at most C tokens of a row, in order of choice, then position (GShard, arXiv 2006.16668).

        Rows are separate, so what is dropped does not depend on accumulation, nor on how many devices split the batch.
        Devices that hold parts of a row (`parallel.context`) each drop within their part, of T tokens, by its C.
        """
        B, T, D = x_BTD.shape
        X, E = self.spec.experts_per_token, self.spec.experts
        C = max(1, math.ceil(T * X / E * self.spec.capacity_factor))
        chosen_BXT = jnp.swapaxes(chosen_BTX, 1, 2).reshape(B, X * T)
        wants_BRE = jax.nn.one_hot(chosen_BXT, E, dtype=jnp.int32) * jnp.tile(real_BT, (1, X))[..., None]
        place_BR = jnp.sum((jnp.cumsum(wants_BRE, axis=1) - 1) * wants_BRE, axis=-1)
        keep_BR = (place_BR < C) & jnp.tile(real_BT, (1, X))
        slot_BR = jnp.where(keep_BR, chosen_BXT * C + place_BR, E * C)
        row_B1, token_R = jnp.arange(B)[:, None], jnp.tile(jnp.arange(T), X)
        token_BS = jnp.full((B, E * C), T, jnp.int32).at[row_B1, slot_BR].set(token_R, mode="drop")
        padded_BTD = jnp.concatenate([x_BTD, jnp.zeros((B, 1, D), x_BTD.dtype)], axis=1)
        x_BECD = padded_BTD[row_B1, token_BS].reshape(B, E, C, D)
        if axis is not None:  # each device its experts, with the rows of all
            x_BECD = jax.lax.all_to_all(x_BECD, axis, split_axis=1, concat_axis=0, tiled=True)
        y_BECD = self._experts(lambda x, w: einsum("BECD,EDF->BECF", x, w), lambda bias: bias[:, None], x_BECD)
        if axis is not None:
            y_BECD = jax.lax.all_to_all(y_BECD, axis, split_axis=0, concat_axis=1, tiled=True)
        y_BSD = y_BECD.reshape(B, E * C, D)
        y_BRD = jnp.where(keep_BR[..., None], y_BSD[row_B1, jnp.minimum(slot_BR, E * C - 1)], 0)
        y_BTXD = jnp.swapaxes(y_BRD.reshape(B, X, T, D), 1, 2)
        kept_BTX = jnp.swapaxes(keep_BR.reshape(B, X, T), 1, 2)
        return jnp.einsum("BTXD,BTX->BTD", y_BTXD, gates_BTX), kept_BTX

    def _experts(self, matmul, spread, x):
        """The experts on rows x; `spread` lays a bias with a row an expert out to be added to them."""

        def linear(name, x):
            y = matmul(x, getattr(self, name))
            return y + spread(unwrap(getattr(self, f"{name}_bias"))).astype(y.dtype) if self.spec.bias else y

        gate = checkpoint_name(linear("gate", x), "gate") if self.spec.activation in GATED else None
        up = checkpoint_name(linear("up", x), "up")
        return linear("down", activate(self.spec.activation, gate, up))

    def _aux(self, logits_BTE, scores_BTE, chosen_BTX, kept_BTX, real_BT, sharding: Sharding) -> MoeAux:
        spec, E = self.spec, self.spec.experts
        real_BT1, row_total = real_BT[..., None].astype(jnp.float32), sharding.row_total
        counts_BE = jnp.sum(jax.nn.one_hot(chosen_BTX, E).sum(axis=2) * real_BT1, axis=1)
        tokens_B = jnp.maximum(row_total(jnp.sum(real_BT1, axis=(1, 2))), 1)
        probs_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True) if spec.score == "sigmoid" else scores_BTE
        # Switch Transformer (arXiv 2101.03961), equation 4, with X choices: E * sum_e share_e * mean probability_e.
        share_BE = row_total(counts_BE) / (tokens_B[:, None] * spec.experts_per_token)
        prob_BE = row_total(jnp.sum(probs_BTE * real_BT1, axis=1)) / tokens_B[:, None]
        if spec.balance == "batch":
            total, share_E, prob_E = sharding.total((jnp.sum(tokens_B), tokens_B @ share_BE, tokens_B @ prob_BE))
            share_BE, prob_BE = (jnp.broadcast_to(x_E / total, share_BE.shape) for x_E in (share_E, prob_E))
        balance_B = E * jnp.sum(share_BE * prob_BE, axis=-1)
        z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)) * real_BT
        z_B = row_total(jnp.sum(z_BT, axis=1)) / tokens_B
        coef = (
            (0.01 if spec.balance_coef is None else spec.balance_coef) if spec.balance in ("sequence", "batch") else 0.0
        )
        dropped_B = row_total(jnp.sum(~kept_BTX & real_BT[..., None], axis=(1, 2))) / (
            tokens_B * spec.experts_per_token
        )
        return MoeAux(coef * balance_B + spec.z_coef * z_B, balance_B, z_B, dropped_B, jnp.sum(counts_BE, axis=0))


def _layout(expert_R: jax.Array, experts: int, block: int) -> tuple[jax.Array, jax.Array]:
    """The slot of each row in the expert-major layout, and each expert's rows there, padded to whole blocks.

    Example: experts [1, 0, 1], block 2 -> slots [2, 0, 3], sizes [2, 2].
    """
    rows = expert_R.shape[0]
    order_R = jnp.argsort(expert_R, stable=True)
    counts_E = jnp.bincount(expert_R, length=experts)
    sizes_E = -(-counts_E // block) * block
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    first_E = jnp.cumsum(counts_E) - counts_E
    sorted_R = expert_R[order_R]
    slots_sorted = starts_E[sorted_R] + jnp.arange(rows) - first_E[sorted_R]
    slot_R = jnp.zeros(rows, jnp.int32).at[order_R].set(slots_sorted.astype(jnp.int32))
    return slot_R, sizes_E.astype(jnp.int32)


def update_bias(bias_E: jax.Array, load_E: jax.Array, rate: float) -> jax.Array:
    """Loss-free balancing: overloaded experts lose `rate`, underloaded ones gain it (arXiv 2408.15664, algorithm 1)."""
    return bias_E + rate * jnp.sign(jnp.mean(load_E, axis=-1, keepdims=True) - load_E)
