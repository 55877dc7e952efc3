"""From logits to the next token: greedy, temperature, top-k, top-p and min-p, each row with its own numbers and seed.

One compiled function serves every mixture of them, so a new temperature never compiles anything.

Shapes: B batch, V vocab.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import SettingsError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How each row samples; made by `make_sampling`."""

    temperature_B: jax.Array
    """Divides the logits; 0 takes the most likely token."""
    top_k_B: jax.Array
    """Keep this many of the most likely tokens; 0 keeps all (Fan et al. 2018, arXiv 1805.04833)."""
    top_p_B: jax.Array
    """Keep the fewest most likely tokens whose probability reaches this (Holtzman et al. 2019, arXiv 1904.09751)."""
    min_p_B: jax.Array
    """Keep tokens of at least this share of the largest probability (Nguyen et al. 2024, arXiv 2407.01082)."""
    seed_B: jax.Array
    """Root of the row's randomness."""


#: Name of a parameter -> its dtype, what it may be, and the check.
RANGES = {
    "temperature": (np.float32, "0 (greedy) or more, and finite", lambda x: 0 <= x < float("inf")),
    "top_k": (np.int32, "an integer from 0 (keeps all)", lambda x: x == int(x) and 0 <= x < 2**31),
    "top_p": (np.float32, "above 0 and at most 1 (keeps all)", lambda x: 0 < x <= 1),
    "min_p": (np.float32, "from 0 (keeps all) to 1", lambda x: 0 <= x <= 1),
    "seed": (np.uint32, "an integer from 0 to 2**32 - 1", lambda x: x == int(x) and 0 <= x < 2**32),
}


def make_sampling(rows: int, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0) -> SamplingParams:
    """Parameters of `rows` rows; each argument is one number for all rows or a sequence with one for each.

    Rows with the same seed draw the same noise at the same position: a row's tokens are those it gets alone.
    Raises SettingsError for a number out of its range, or another count of them.
    """
    given = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    return SamplingParams(**{f"{name}_B": _column(name, value, rows) for name, value in given.items()})


def _column(name: str, value, rows: int) -> np.ndarray:
    dtype, allowed, check = RANGES[name]
    values = list(value) if np.ndim(value) else [value] * rows
    if len(values) != rows:
        raise SettingsError(f"{name}: {len(values)} values for {rows} prompts; give one number, or one for each prompt")
    for x in values:
        if not (x == x and check(x)):
            raise SettingsError(f"{name}={x}: must be {allowed}")
    return np.asarray(values, dtype)


def sample(
    logits_BV: jax.Array, params: SamplingParams, positions_B: jax.Array, banned_V: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`(ids_B, logprobs_B)`: the next token of each row, and its log-probability under the model itself.

    The order is temperature, top-k, top-p of what top-k left (renormalised), min-p; tokens that tie with the last one
    kept are kept. What is left is drawn from by the Gumbel-max trick. The noise of a row depends on its seed and on
    `positions_B`, the position of the token to be drawn, and on nothing else. Tokens in `banned_V` are never taken;
    logprobs_B is in nats, from the logits before temperature, bans and truncation.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    allowed_BV = jnp.where(banned_V, -jnp.inf, logits_BV)
    ids_B = jax.lax.cond(
        jnp.any(params.temperature_B > 0),
        lambda: _draw(allowed_BV, params, positions_B),
        lambda: jnp.argmax(allowed_BV, axis=-1),
    )
    return ids_B, jnp.take_along_axis(jax.nn.log_softmax(logits_BV), ids_B[:, None], axis=-1)[:, 0]


def _draw(logits_BV, params: SamplingParams, positions_B):
    noise_BV = jax.vmap(lambda s, t: jax.random.gumbel(jax.random.fold_in(jax.random.key(s), t), logits_BV.shape[1:]))(
        params.seed_B, positions_B
    )
    drawn_B = jnp.argmax(truncate(logits_BV, params) + noise_BV, axis=-1)
    return jnp.where(params.temperature_B > 0, drawn_B, jnp.argmax(logits_BV, axis=-1))


def truncate(logits_BV: jax.Array, params: SamplingParams) -> jax.Array:
    """Logits over temperature, shifted so that the largest is 0, with -inf for the tokens that may not be drawn."""
    temperature_B = jnp.where(params.temperature_B > 0, params.temperature_B, 1)
    x_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature_B[:, None]
    ranked = jnp.any((params.top_k_B > 0) | (params.top_p_B < 1))
    x_BV = jax.lax.cond(ranked, lambda: _top_k_top_p(x_BV, params), lambda: x_BV)
    return jnp.where(x_BV >= jnp.log(params.min_p_B)[:, None], x_BV, -jnp.inf)


def _top_k_top_p(x_BV, params: SamplingParams):
    rank_BV = _ordered(x_BV)
    lowest_B = _cut(rank_BV, jnp.ones_like(x_BV), params.top_k_B)
    lowest_B = jnp.where(params.top_k_B > 0, lowest_B, 0)
    x_BV = jnp.where(rank_BV >= lowest_B[:, None], x_BV, -jnp.inf)
    lowest_B = _cut(rank_BV, jax.nn.softmax(x_BV), params.top_p_B)
    lowest_B = jnp.where(params.top_p_B < 1, lowest_B, 0)
    return jnp.where(rank_BV >= lowest_B[:, None], x_BV, -jnp.inf)


def _ordered(x):
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _cut(rank_BV, mass_BV, wanted_B):
    """The largest rank at or above which there is at least the mass wanted (0 if there is not so much), bit by bit.

    32 sums instead of a sort: 10 to 20 times faster on CPU (0.07 against 0.8 ms for 4,096 tokens).
    """

    def bit(i, cut_B):
        higher_B = cut_B | jnp.uint32(1 << 31) >> i.astype(jnp.uint32)
        mass_B = jnp.sum(jnp.where(rank_BV >= higher_B[:, None], mass_BV, 0), axis=-1)
        return jnp.where(mass_B >= wanted_B, higher_B, cut_B)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros(rank_BV.shape[:1], jnp.uint32))
