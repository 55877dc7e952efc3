"""Decoding on the device: prefill of a key-value cache, then a compiled loop that makes a few tokens a dispatch.

Prompts of different lengths share a batch: they are padded on the right, and padding has position -1. Prefill reads
all of a prompt but its last token, which is the first input of the loop, so that tokens are drawn in one place.

Shapes: B batch, T prompt position, C tokens made in one dispatch, V vocab.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.generate.sample import SamplingParams, sample
from jaxllm.model.build import Model, Params, build
from jaxllm.model.cache import Cache, make_cache

#: Tokens of each row that are prefilled at once: bounds the attention logits to 512 by the number of slots.
PREFILL = 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What the loop carries from token to token."""

    cache: Cache
    token_B: jax.Array
    """The last token of each row, not yet in the cache."""
    position_B: jax.Array
    """Its position."""
    left_B: jax.Array
    """Tokens still to make; 0 in rows that have ended."""


def unstack(params: Params) -> Params:
    """The weights laid out for decoding: each stacked one as a tuple with an array a layer, copied once.

    Indexing stacked weights in every step copies them (147 against 34 ms a token for 256 MiB on CPU).
    """
    done = any(isinstance(w, tuple) for w in jax.tree.leaves(params["layers"], is_leaf=lambda w: isinstance(w, tuple)))
    return params if done else {**params, "layers": _split(params["layers"])}


@jax.jit
def _split(layers):
    return jax.tree.map(lambda w: tuple(w[i] for i in range(w.shape[0])), layers)


def prefill(model: Model, params: Params, prompts, rows: int, max_tokens: int) -> State:
    """The state after all but the last token of each prompt; rows beyond the prompts have ended from the start.

    Prompt and cache lengths are rounded up to powers of two, so that few shapes are ever compiled.
    """
    run = compiled(model.config, model.sharding, model.kernels)
    lengths = np.array([len(p) for p in prompts] + [1] * (rows - len(prompts)))
    longest = int(lengths.max())
    cache = run.empty(rows, min(power_of_two(longest + max_tokens, 64), model.config.context))
    width = min(power_of_two(longest - 1, 16), PREFILL)
    tokens_BT = np.zeros((rows, -(-(longest - 1) // width) * width), np.int32)
    last_B = np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt) - 1], last_B[row] = prompt[:-1], prompt[-1]
    at_T = np.arange(tokens_BT.shape[1], dtype=np.int32)
    positions_BT = np.where(at_T < lengths[:, None] - 1, at_T, np.int32(-1))
    for start in range(0, tokens_BT.shape[1], width):
        part = np.s_[:, start : start + width]
        cache = run.prefill(params, cache, tokens_BT[part], positions_BT[part])
    left_B = np.where(np.arange(rows) < len(prompts), max_tokens, 0).astype(np.int32)
    return run.state(cache, last_B, lengths.astype(np.int32) - 1, left_B)


class Compiled(NamedTuple):
    """The jitted functions of one model."""

    empty: Callable
    state: Callable
    prefill: Callable
    decode: Callable


@functools.lru_cache(maxsize=8)
def compiled(config, sharding, kernels) -> Compiled:
    """Kept by what defines a model, so that a second call of `generate` compiles nothing."""
    model = build(config, sharding, kernels)
    place = functools.partial(_place, model)
    return Compiled(
        empty=jax.jit(lambda rows, slots: place(make_cache(config, rows, slots)), static_argnums=(0, 1)),
        state=jax.jit(lambda *parts: place(State(*parts)), donate_argnums=0),
        prefill=jax.jit(lambda *args: place(_prefill(model, *args)), donate_argnums=1),
        decode=jax.jit(functools.partial(_decode, model), donate_argnums=1, static_argnames="chunk"),
    )


def _place(model: Model, tree):
    """Lays rows and kv heads out over the mesh, always alike: a dispatch finds its input where the last one left it."""
    names = ("batch", "kv_heads", None, None)
    return jax.tree.map(lambda x: model.sharding.constrain(x, *(names if x.ndim == 4 else names[:1])), tree)


def _prefill(model: Model, params, cache: Cache, tokens_BT, positions_BT) -> Cache:
    return model.apply(params, tokens_BT, positions_BT=positions_BT, cache=cache)[1]


def _decode(model: Model, params, state: State, sampling: SamplingParams, stop_V, banned_V, *, chunk: int):
    """`(state, ids_CB, logprobs_CB)`: up to `chunk` tokens of each row, -1 after its end; stops when all have ended."""

    def more(carry):
        i, state, *_ = carry
        return (i < chunk) & jnp.any(state.left_B > 0)

    def step(carry):
        i, state, ids_CB, logprobs_CB = carry
        alive_B = state.left_B > 0
        positions_BT = jnp.where(alive_B, state.position_B, -1)[:, None]
        hidden_BTD, cache, _ = model.apply(params, state.token_B[:, None], positions_BT=positions_BT, cache=state.cache)
        logits_BV = model.unembed(model.head(params), hidden_BTD)[:, 0]
        token_B, logprobs_B = sample(logits_BV, sampling, state.position_B + 1, banned_V)
        left_B = jnp.where(alive_B & ~stop_V[token_B], state.left_B - 1, 0)
        ids_CB = ids_CB.at[i].set(jnp.where(alive_B, token_B, -1))
        return i + 1, State(cache, token_B, state.position_B + 1, left_B), ids_CB, logprobs_CB.at[i].set(logprobs_B)

    rows = state.token_B.shape[0]
    empty = (jnp.full((chunk, rows), -1, jnp.int32), jnp.zeros((chunk, rows)))
    _, state, *made = jax.lax.while_loop(more, step, (0, state, *empty))
    return _place(model, state), *map(model.sharding.constrain, made)  # no axes: every process reads the tokens


def power_of_two(n: int, least: int) -> int:
    """`n` rounded up to a power of two, and to at least `least`."""
    return max(least, 1 << (n - 1).bit_length()) if n > 0 else least
