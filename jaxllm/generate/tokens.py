"""Generation of tokens: runs the loop of `decode.py`, and hands tokens out as they are made.

Shapes: P prompt, B row, C tokens made in one dispatch, N alternatives.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.errors import SettingsError, UserError
from jaxllm.generate import decode
from jaxllm.generate.params import SamplingParams, make_sampling
from jaxllm.generate.penalties import check_bias, make_edits
from jaxllm.generate.request import NOT_FINITE, Request, check_request, sources
from jaxllm.model.build import Model, Params

#: The most likely tokens at one place: `[(id, log-probability), ...]`.
Top = list[tuple[int, float]]


class Generation(NamedTuple):
    """What was made for one prompt, or one of its samples."""

    ids: list[int]
    """New tokens; the last one is the stop token where `finish` says "stop"."""
    logprobs: list[float]
    """Log-probability of each under the model, in nats, whatever the sampling."""
    finish: str
    """"stop" after a stop token, else "length"."""
    top: list[Top]
    """The `top_logprobs` most likely tokens in the place of each; [] where none were asked for."""


class Chunk(NamedTuple):
    """New tokens of every row; ended rows give empty lists."""

    ids: list[list[int]]
    logprobs: list[list[float]]
    top: list[list[Top]]


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | Sequence[int],
    on_tokens: Callable[[Chunk], Any] | None = None,
    **options,
) -> list[Generation]:
    """Continues each prompt (a list of token ids): `n` samples of the first one, then `n` of the second, ...

    Args:
      params: weights, stacked or from `decode.unstack` (do that once when there are several calls).
      on_tokens: called with the new tokens of all rows, a few at a time.
      options: as for `stream`.

    Raises SettingsError as `stream` does.
    """
    chunks = stream(model, params, prompts, max_tokens=max_tokens, **options)
    rows = [Generation([], [], "length", []) for _ in chunks.stopped]
    for chunk in chunks:
        for row, ids, logprobs, top in zip(rows, *chunk, strict=True):
            row.ids.extend(ids)
            row.logprobs.extend(logprobs)
            row.top.extend(top)
        if on_tokens is not None:
            on_tokens(chunk)
    return [row._replace(finish="stop") if stopped else row for row, stopped in zip(rows, chunks.stopped, strict=True)]


def stream(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | Sequence[int],
    min_tokens: int | Sequence[int] = 0,
    stop_ids: Sequence[int] | Sequence[Sequence[int]] = (),
    banned_ids: Sequence[int] = (),
    logit_bias: Mapping[int, float] | Sequence[Mapping[int, float]] | None = None,
    adapters: Sequence[int] | None = None,
    n: int = 1,
    top_logprobs: int = 0,
    chunk: int = 8,
    **sampling,
) -> "Stream":
    """The tokens that continue each prompt, as they are made: up to `chunk` of each row at a time.

    Lengths, stop_ids, logit_bias and sampling parameters are one for all prompts, or a sequence with one for each.

    Args:
      max_tokens: the most to make.
      min_tokens: no stop token is made before these.
      stop_ids: a row ends after one of these.
      banned_ids: never made.
      logit_bias: `{id: bias}`, added to the logits.
      adapters: the adapter of each prompt, -1 for none, where the weights hold several (`adapt.gather`).
      n: samples of each prompt, which is read once; sample i (from 0) draws with the seed of its prompt plus i.
      top_logprobs: how many of the most likely tokens to report in each place.
      sampling: see `params.PARAMETERS`.

    Raises SettingsError for an empty prompt, an id outside the vocabulary, a prompt that leaves no room for
    `max_tokens` in the model's context, a number out of its range, or samples that would all be the same.
    """
    lengths = dict(max_tokens=max_tokens, min_tokens=min_tokens)
    ids = dict(stop_ids=stop_ids, banned_ids=banned_ids)
    request = check_request(model, prompts, **lengths, **ids, adapters=adapters)
    options = make_sampling(len(prompts), **sampling)
    biases = check_bias(logit_bias, len(prompts), model.config.vocab)
    _check_counts(model, options, n, top_logprobs, chunk)
    params = decode.unstack(params)
    state, rules = _start(model, params, request, options, biases, n)
    run = decode.compiled(model.config, model.sharding, model.kernels)
    top = decode.power_of_two(top_logprobs, 4) if top_logprobs else 0
    step = functools.partial(run.decode, params, rules=rules, chunk=chunk, top=min(top, model.config.padded_vocab))
    ends = [(int(request.max_P[p]), {*request.stops[p]}) for p in range(len(prompts)) for _ in range(n)]
    return Stream(step, run.end, state, ends, chunk, top_logprobs)


def _start(model: Model, params: Params, request: Request, options: SamplingParams, biases, n: int):
    """`(state, rules)`: every row with its prompt read."""
    source_B, real_B = sources(model, len(request.prompts), n)
    options = jax.tree.map(lambda x: x[source_B], options)
    sample_B = (np.arange(len(source_B)) % n).astype(np.uint32)
    options = dataclasses.replace(options, seed_B=options.seed_B + sample_B)
    prompts, biases = [request.prompts[p] for p in source_B], [biases[p] for p in source_B]
    edits = make_edits(options, prompts, biases, model.config.padded_vocab)
    rules = decode.Rules(options, request.stop_PE()[source_B], request.banned_V, request.adapters(source_B))
    run = decode.compiled(model.config, model.sharding, model.kernels)
    token_B, position_B = request.last(source_B)
    left_B, length_B = request.max_P[source_B] * real_B, position_B + 1 + request.max_P[source_B]
    cache = request.read(model, params, source_B, n)
    state = run.state(cache, token_B, position_B, left_B, length_B, request.min_P[source_B] * real_B, edits)
    return state, jax.device_put(rules, model.sharding.replicated())


def _check_counts(model: Model, options: SamplingParams, n: int, top_logprobs: int, chunk: int) -> None:
    vocab = model.config.vocab
    if n < 1 or chunk < 1 or not 0 <= top_logprobs <= vocab:
        raise SettingsError(
            f"n={n}, chunk={chunk}, top_logprobs={top_logprobs}: n and chunk must be at least 1, and top_logprobs "
            f"from 0 to the vocabulary of {vocab}"
        )
    if n > 1 and not options.temperature_B.all():
        raise SettingsError(f"n={n} samples at temperature 0 would all be the same; set a temperature, or n=1")


class Stream:
    """Chunks of new tokens, made while they are read."""

    def __init__(self, step, end, state: decode.State, ends: list[tuple[int, set[int]]], chunk: int, top: int):
        """`ends`: the most tokens and the stop tokens of each row."""
        self.stopped = [False for _ in ends]
        """Rows that a stop token ended."""
        self._left, self._stops = [most for most, _ in ends], [stops for _, stops in ends]
        self._step, self._end, self._top = step, end, top
        self._given_up = False
        self._chunks = self._run(state, math.ceil(max(self._left) / chunk))

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def end(self, row: int) -> None:
        """Nothing more comes of this row, and work on it ends with the dispatch that is under way."""
        self._left[row], self._given_up = 0, True

    def _run(self, state: decode.State, dispatches: int) -> Iterator[Chunk]:
        waiting = None
        for _ in range(dispatches):
            if self._given_up:
                padding = [0] * (len(state.left_B) - len(self._left))
                state, self._given_up = self._end(state, np.array(self._left + padding) == 0), False
            state, *made = self._step(state)
            if waiting is not None:  # read while the device makes the next ones
                yield self._read(*waiting)
                if not any(self._left):
                    return
            waiting = made
        yield self._read(*waiting)

    def _read(self, ids_CB, logprobs_CB, top_ids_CBN, top_CBN) -> Chunk:
        """The chunk on the host; marks rows that have ended."""
        ids_CB, logprobs_CB = np.asarray(ids_CB), np.asarray(logprobs_CB)
        if not np.isfinite(logprobs_CB[ids_CB >= 0]).all():
            raise UserError(NOT_FINITE)
        top_ids_CBN, top_CBN = (np.asarray(x)[..., : self._top] for x in (top_ids_CBN, top_CBN))
        chunk = Chunk([], [], [])
        for row, left in enumerate(self._left):
            made = np.flatnonzero(ids_CB[:, row] >= 0) if left else []
            ids = ids_CB[made, row].tolist()
            chunk.ids.append(ids)
            chunk.logprobs.append(logprobs_CB[made, row].tolist())
            tops = zip(top_ids_CBN[made, row].tolist(), top_CBN[made, row].tolist(), strict=True)
            chunk.top.append([list(zip(*top, strict=True)) for top in tops] if self._top else [])
            self.stopped[row] |= bool(ids) and ids[-1] in self._stops[row]
            self._left[row] = 0 if self.stopped[row] else left - len(ids)
        return chunk
