"""Decoding on the device: prefill of a key-value cache, then a compiled loop that makes a few tokens a dispatch.

Prompts of different lengths share a batch: they are padded on the right, and padding has position -1. Prefill reads
all of a prompt but its last token, which is the first input of the loop, so that tokens are drawn in one place.

Shapes: B batch, T prompt position, C tokens made in one dispatch, V vocab, E stop tokens, N alternatives.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.generate.params import SamplingParams
from jaxllm.generate.penalties import Edits
from jaxllm.generate.sample import logprobs, sample
from jaxllm.model.build import Model, Params, build
from jaxllm.model.cache import Cache, make_cache
from jaxllm.weights.bind import bind

#: Tokens of each row that are prefilled at once: bounds the attention logits to 512 by the number of slots. On one CPU
#: the tokens of all rows together (`_rows_at_once`).
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
    length_B: jax.Array
    """How long the row would be in all, for position embeddings that go by it."""
    must_B: jax.Array
    """Tokens to make before a stop token may be; 0 or less when it may."""
    edits: Edits | None
    """None, for which another loop is compiled, where no row has penalties or a bias."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """What stays the same from token to token."""

    sampling: SamplingParams
    stop_BE: jax.Array
    """Tokens that end the row; -1 for none."""
    banned_V: jax.Array
    """Whether the token is never made."""
    adapters_B: jax.Array | None = None
    """The adapter of each row, -1 for none; None where the weights do not hold several."""


def unstack(params: Params, *, free: bool = False) -> Params:
    """The weights laid out for decoding: each stacked one as a tuple with an array a layer, copied once.

    Indexing stacked weights in every step copies them (147 against 34 ms a token for 256 MiB on CPU). `free` gives the
    memory of each stacked one back as soon as it has been copied; `params` is of no more use then.
    """
    done = any(isinstance(w, tuple) for w in jax.tree.leaves(params["layers"], is_leaf=lambda w: isinstance(w, tuple)))
    if done:
        return params
    if not free:
        return {**params, "layers": _split(params["layers"])}

    def move(w):
        layers = jax.block_until_ready(_split(w))
        w.delete()
        return layers

    return {**params, "layers": jax.tree.map(move, params["layers"])}


@jax.jit
def _split(layers):
    return jax.tree.map(lambda w: tuple(w[i] for i in range(w.shape[0])), layers)


def prefill(model: Model, params: Params, prompts, rows: int, max_tokens: np.ndarray, adapters_B=None) -> Cache:
    """A cache of `rows` rows that holds all but the last token of each prompt, with room for `max_tokens` more of each.

    Prompt and cache lengths are rounded up to powers of two, so that few shapes are ever compiled.
    """
    run = compiled(model.config, model.sharding, model.kernels)
    padding = rows - len(prompts)
    read_B = np.array([len(p) - 1 for p in prompts] + [0] * padding, np.int32)
    length_B = read_B + 1 + np.append(max_tokens, [0] * padding).astype(np.int32)
    parts = _parts(int(read_B.max()))
    slots = min(power_of_two(int(length_B.max()), 64), model.config.context)
    cache = run.empty(rows, slots, max(width for _, width in parts))
    tokens_BT = np.zeros((rows, sum(parts[-1])), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt) - 1] = prompt[:-1]
    at_T = np.arange(tokens_BT.shape[1], dtype=np.int32)
    positions_BT = np.where(at_T < read_B[:, None], at_T, np.int32(-1))
    for start, width in parts:
        part = np.s_[:, start : start + width]
        cache = run.prefill(params, cache, tokens_BT[part], positions_BT[part], length_B, adapters_B)
    return cache


def _parts(tokens: int) -> list[tuple[int, int]]:
    """`[(start, width), ...]` that cover so many tokens (and at least one): PREFILL each, then what is left."""
    starts = range(0, max(tokens, 1), PREFILL)
    return [(start, min(power_of_two(tokens - start, 16), PREFILL)) for start in starts]


class Compiled(NamedTuple):
    """The jitted functions of one model."""

    empty: Callable
    prefill: Callable
    spread: Callable
    state: Callable
    decode: Callable
    end: Callable


@functools.lru_cache(maxsize=8)
def compiled(config, sharding, kernels) -> Compiled:
    """Kept by what defines a model, so that a second call of `generate` compiles nothing."""
    model = build(config, sharding, kernels)
    place = functools.partial(place_rows, model)
    return Compiled(
        empty=jax.jit(lambda *sizes: place(make_cache(config, *sizes, stored=kernels.cache)), static_argnums=(0, 1, 2)),
        prefill=jax.jit(lambda *args: place(_prefill(model, *args)), donate_argnums=1),
        spread=jax.jit(lambda cache, source_B: place(take_rows(cache, source_B))),
        state=jax.jit(lambda *parts: place(State(*parts)), donate_argnums=0),
        decode=jax.jit(functools.partial(_decode, model), donate_argnums=1, static_argnames=("chunk", "top")),
        end=jax.jit(lambda state, ended_B: place(_end(state, ended_B)), donate_argnums=0),
    )


def place_rows(model: Model, tree):
    """Lays rows and kv heads out over the mesh, always alike: a dispatch finds its input where the last one left it."""

    def place(x):
        names = ("batch", "kv_heads" if x.ndim == 4 else None, *[None] * x.ndim)[: x.ndim]
        return model.sharding.constrain(x, *names)

    return jax.tree.map(place, tree)


def everywhere(model: Model, tree):
    """Lays arrays out whole on every device, since every process reads them."""
    return jax.tree.map(lambda x: model.sharding.constrain(x, *[None] * x.ndim), tree)


def take_rows(tree, source_B):
    """The rows `source_B` of every array, in this order."""
    return jax.tree.map(lambda x: x[source_B], tree)


def next_logits(model: Model, params: Params, cache: Cache, token_B, position_B, length_B):
    """`(logits_BV, cache)` after one more token of each row; rows at position -1 write nothing into the cache."""
    where = dict(positions_BT=position_B[:, None], lengths_B=length_B)
    hidden_BTD, cache, _ = model.apply(params, token_B[:, None], cache=cache, **where)
    return model.unembed(model.head(params), hidden_BTD)[:, 0], cache


def _prefill(model: Model, params, cache: Cache, tokens_BT, positions_BT, length_B, adapters_B=None) -> Cache:
    def read(cache, tokens_BT, positions_BT, length_B, adapters_B):
        bound = bind(params, adapters_B=adapters_B)
        return model.apply(bound, tokens_BT, positions_BT=positions_BT, lengths_B=length_B, cache=cache)[1]

    args, B = (cache, tokens_BT, positions_BT, length_B, adapters_B), len(tokens_BT)
    rows = _rows_at_once(model, *tokens_BT.shape)
    if rows == B:
        return read(*args)
    groups = jax.tree.map(lambda x: x.reshape(B // rows, rows, *x.shape[1:]), args)
    return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), jax.lax.map(lambda group: read(*group), groups))


def _rows_at_once(model: Model, rows: int, width: int) -> int:
    """All rows, but on one CPU only PREFILL tokens: 8 rows of 512 together take a fifth longer than one by one.

    XLA there fuses the products of large arrays with what surrounds them, and temporaries leave the caches.
    """
    few = max(1, PREFILL // width)
    alone = jax.default_backend() == "cpu" and model.sharding.mesh.size == 1
    return few if alone and rows % few == 0 else rows


def _end(state: State, ended_B) -> State:
    return dataclasses.replace(state, left_B=jnp.where(ended_B, 0, state.left_B))


def _decode(model: Model, params, state: State, rules: Rules, *, chunk: int, top: int):
    """`(state, ids_CB, logprobs_CB, top_ids_CBN, top_logprobs_CBN)`: up to `chunk` tokens of each row.

    Ids are -1 after the row's end; the loop stops when all rows have ended.
    """

    params = bind(params, adapters_B=rules.adapters_B)

    def more(carry):
        i, state, *_ = carry
        return (i < chunk) & jnp.any(state.left_B > 0)

    def step(carry):
        i, state, *made = carry
        alive_B = state.left_B > 0
        at_B = jnp.where(alive_B, state.position_B, -1)
        logits_BV, cache = next_logits(model, params, state.cache, state.token_B, at_B, state.length_B)
        edited_BV = logits_BV if state.edits is None else state.edits.apply(logits_BV, rules.sampling)
        token_B = sample(_forbid(edited_BV, rules, state.must_B), rules.sampling, state.position_B + 1)
        new = (jnp.where(alive_B, token_B, -1), *logprobs(logits_BV, token_B, top))
        stops_B = jnp.any(token_B[:, None] == rules.stop_BE, axis=1)
        edits = None if state.edits is None else state.edits.count(token_B)
        left_B = jnp.where(alive_B & ~stops_B, state.left_B - 1, 0)
        state = State(cache, token_B, state.position_B + 1, left_B, state.length_B, state.must_B - 1, edits)
        return i + 1, state, *(whole.at[i].set(x) for whole, x in zip(made, new, strict=True))

    rows = state.token_B.shape[0]
    tops = (jnp.zeros((chunk, rows, top), jnp.int32), jnp.zeros((chunk, rows, top)))
    empty = (jnp.full((chunk, rows), -1, jnp.int32), jnp.zeros((chunk, rows)), *tops)
    _, state, *made = jax.lax.while_loop(more, step, (0, state, *empty))
    return place_rows(model, state), *everywhere(model, made)


def _forbid(logits_BV, rules: Rules, must_B):
    """-inf for the banned tokens, and for the stop tokens of rows that must go on."""
    logits_BV = jnp.where(rules.banned_V, -jnp.inf, logits_BV)
    row_B1, outside = jnp.arange(len(must_B))[:, None], logits_BV.shape[1]
    stop_BE = jnp.where((must_B[:, None] > 0) & (rules.stop_BE >= 0), rules.stop_BE, outside)
    return jax.lax.cond(
        jnp.any(must_B > 0),
        lambda: logits_BV.at[row_B1, stop_BE].set(-jnp.inf, mode="drop"),
        lambda: logits_BV,
    )


def power_of_two(n: int, least: int) -> int:
    """`n` rounded up to a power of two, and to at least `least`."""
    return max(least, 1 << (n - 1).bit_length()) if n > 0 else least
