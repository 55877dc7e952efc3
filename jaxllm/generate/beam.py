"""Beam search with length penalty: the whole search is one compiled loop on the device.

Shapes: P prompt, M beams, B row (P x M), T new token, V vocab, E stop tokens.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import SettingsError, UserError
from jaxllm.generate import decode
from jaxllm.generate.request import NOT_FINITE, check_request, sources
from jaxllm.generate.tokens import Generation
from jaxllm.model.build import Model, Params, build
from jaxllm.model.cache import Cache
from jaxllm.weights.bind import bind


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
    """New tokens of some hypotheses of each prompt; those that do not exist have the score -inf."""

    ids_PMT: jax.Array
    """-1 after the end."""
    logprobs_PMT: jax.Array
    score_PM: jax.Array
    """Live ones: the sum of their log-probabilities; ended ones: that over length ** length_penalty, falling."""

    def take(self, index_PM, score_PM) -> "Texts":
        """These hypotheses of each prompt, with these scores."""
        ids, logprobs = (jnp.take_along_axis(x, index_PM[..., None], 1) for x in (self.ids_PMT, self.logprobs_PMT))
        return Texts(ids, logprobs, score_PM)

    def add(self, i, token_PM, logprob_PM) -> "Texts":
        """With one more token, at place `i`."""
        ids, logprobs = self.ids_PMT.at[..., i].set(token_PM), self.logprobs_PMT.at[..., i].set(logprob_PM)
        return dataclasses.replace(self, ids_PMT=ids, logprobs_PMT=logprobs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Search:
    """What the loop carries."""

    cache: Cache
    token_B: jax.Array
    position_B: jax.Array
    live: Texts
    ended: Texts
    over_P: jax.Array
    """Whether nothing can change the best `n` any more."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Task:
    """What stays the same."""

    max_P: jax.Array
    """0 for rows of padding."""
    min_P: jax.Array
    stop_PE: jax.Array
    banned_V: jax.Array
    length_penalty: jax.Array
    n: jax.Array


def beam_search(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | Sequence[int],
    beams: int,
    n: int = 1,
    length_penalty: float = 1.0,
    min_tokens: int | Sequence[int] = 0,
    stop_ids: Sequence[int] | Sequence[Sequence[int]] = (),
    banned_ids: Sequence[int] = (),
    adapters: Sequence[int] | None = None,
    **ignored,
) -> list[Generation]:
    """The `n` best continuations of each prompt, best first: those of the first prompt, then of the second, ...

    The score is the sum of log-probabilities over length ** length_penalty, the stop token included in both
    (Wu et al. 2016, arXiv 1609.08144, section 7, in the simple form that transformers uses). A continuation has
    ended at a stop token or at `max_tokens`; it counts when it is among the `beams` best candidates of its step. A
    search is over once no live beam can reach the n best (`early_stopping="never"` in transformers).
    Other arguments as for `tokens.stream`. Raises SettingsError as that does, and for `n` above `beams`.
    """
    if ignored:
        raise SettingsError(f"beam search does not sample and would ignore {', '.join(ignored)}; leave that out")
    lengths = dict(max_tokens=max_tokens, min_tokens=min_tokens)
    ids = dict(stop_ids=stop_ids, banned_ids=banned_ids)
    request = check_request(model, prompts, **lengths, **ids, adapters=adapters)
    if not 1 <= n <= beams or not np.isfinite(length_penalty):
        raise SettingsError(
            f"beams={beams}, n={n}, length_penalty={length_penalty}: n must be from 1 to beams, and the penalty finite"
        )
    source_P, real_P = sources(model, len(prompts), 1)
    source_B = np.repeat(source_P, beams)
    ends = (request.max_P[source_P] * real_P, request.min_P[source_P], request.stop_PE()[source_P])
    task = Task(*ends, request.banned_V, np.float32(length_penalty), np.int32(n))
    params = decode.unstack(params)
    cache = request.read(model, params, source_B, beams)
    params = bind(params, adapters_B=request.adapters(source_B))
    room = decode.power_of_two(int(request.max_P.max()), 16)
    search = _compiled(model.config, model.sharding, model.kernels)
    task = jax.device_put(task, model.sharding.replicated())
    found, _ = search(params, cache, *request.last(source_B), task, beams=beams, room=room)
    return [_read(found, p, i, request.stops[p]) for p in range(len(prompts)) for i in range(n)]


def _read(found: Texts, p: int, i: int, stops: list[int]) -> Generation:
    if np.isnan(found.score_PM[p]).any():
        raise UserError(NOT_FINITE)
    if found.score_PM[p, i] == -np.inf:
        raise SettingsError(f"prompt {p} has only {i} continuations within max_tokens; set n={i} or less")
    ids = np.asarray(found.ids_PMT[p, i])
    ids = ids[ids >= 0].tolist()
    finish = "stop" if ids[-1] in stops else "length"
    return Generation(ids, np.asarray(found.logprobs_PMT[p, i])[: len(ids)].tolist(), finish, [])


@functools.lru_cache(maxsize=8)
def _compiled(config, sharding, kernels):
    search = functools.partial(_search, build(config, sharding, kernels))
    return jax.jit(search, donate_argnums=1, static_argnames=("beams", "room"))


def _search(model: Model, params, cache: Cache, token_B, position_B, task: Task, *, beams: int, room: int):
    """`(the best ended texts, cache)`; the cache comes back only so that its memory can be donated."""
    prompts = len(task.max_P)
    ids, logprobs = jnp.full((prompts, beams, room), -1, jnp.int32), jnp.zeros((prompts, beams, room))
    none_PM = jnp.full((prompts, beams), -jnp.inf)
    live = Texts(ids, logprobs, none_PM.at[:, 0].set(0))  # one beam at first: all are the prompt itself
    start = Search(cache, token_B, position_B, live, Texts(ids, logprobs, none_PM), over_P=task.max_P == 0)

    def step(carry):
        i, search = carry
        return i + 1, decode.place_rows(model, _step(model, params, search, task, i))

    _, search = jax.lax.while_loop(lambda carry: ~jnp.all(carry[1].over_P), step, (0, start))
    return decode.everywhere(model, search.ended), search.cache


def _step(model: Model, params, search: Search, task: Task, i) -> Search:
    P, M = search.live.score_PM.shape
    at_B = jnp.where(jnp.repeat(search.over_P, M), -1, search.position_B)
    length_B = search.position_B + 1 + jnp.repeat(task.max_P, M) - i
    logits_BV, cache = decode.next_logits(model, params, search.cache, search.token_B, at_B, length_B)
    logprobs_BV = jnp.where(task.banned_V, -jnp.inf, jax.nn.log_softmax(logits_BV))
    logprobs_PMV = logprobs_BV.reshape(P, M, -1)
    V = logprobs_PMV.shape[-1]
    stop_PE = jnp.where(task.stop_PE < 0, V, task.stop_PE)
    stop_PV = jnp.zeros((P, V), bool).at[jnp.arange(P)[:, None], stop_PE].set(True, mode="drop")
    may_P = i >= task.min_P
    logprobs_PMV = jnp.where((stop_PV & ~may_P[:, None])[:, None], -jnp.inf, logprobs_PMV)
    total_PMV = search.live.score_PM[..., None] + logprobs_PMV

    def best(total_PMV):
        """The M best candidates: `(texts with their token added, score_PM, token_PM, beam_PM)`."""
        score_PM, index_PM = jax.lax.top_k(total_PMV.reshape(P, M * V), M)
        beam_PM, token_PM = index_PM // V, index_PM % V
        logprob_PM = jnp.take_along_axis(logprobs_PMV.reshape(P, M * V), index_PM, axis=1)
        return search.live.take(beam_PM, score_PM).add(i, token_PM, logprob_PM), token_PM, beam_PM

    new, token_PM, _ = best(total_PMV)
    last_P = i + 1 >= task.max_P
    ends_PM = (jnp.take_along_axis(stop_PV, token_PM, axis=1) | last_P[:, None]) & ~search.over_P[:, None]
    ended = _merge(search.ended, new, jnp.where(ends_PM, new.score_PM / (i + 1.0) ** task.length_penalty, -jnp.inf))
    live, token_PM, beam_PM = best(jnp.where(stop_PV[:, None], -jnp.inf, total_PMV))
    source_B = (jnp.arange(P)[:, None] * M + beam_PM).reshape(-1)
    over_P = search.over_P | last_P | _settled(live, ended, task, i)
    return Search(decode.take_rows(cache, source_B), token_PM.reshape(-1), search.position_B + 1, live, ended, over_P)


def _merge(ended: Texts, new: Texts, score_PM) -> Texts:
    """The best of both, as many as of each."""
    both = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b], axis=1), ended, dataclasses.replace(new, score_PM=score_PM)
    )
    score_PM, index_PM = jax.lax.top_k(both.score_PM, score_PM.shape[1])
    return both.take(index_PM, score_PM)


def _settled(live: Texts, ended: Texts, task: Task, i):
    """Whether no live beam can still reach the n best: its sum only falls, over the length that flatters it most."""
    length_P = jnp.where(task.length_penalty > 0, task.max_P, i + 2).astype(jnp.float32)
    bound_P = live.score_PM[:, 0] / length_P**task.length_penalty
    return ended.score_PM[:, task.n - 1] >= bound_P
