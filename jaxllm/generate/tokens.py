"""Generation of tokens: checks what it is given, runs the loop of `decode.py`, and hands tokens out as they are made.

Shapes: B batch, C tokens made in one dispatch, V vocab.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.errors import SettingsError, UserError
from jaxllm.generate import decode
from jaxllm.generate.sample import make_sampling
from jaxllm.model.build import Model, Params, check_tokens


class Generation(NamedTuple):
    """What was made for one prompt."""

    ids: list[int]
    """New tokens; the last one is the stop token where `finish` says "stop"."""
    logprobs: list[float]
    """Log-probability of each under the model, in nats, whatever the sampling."""
    finish: str
    """"stop" after a stop token, else "length"."""


class Chunk(NamedTuple):
    """New tokens of every row; ended rows give empty lists."""

    ids: list[list[int]]
    logprobs: list[list[float]]


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop_ids: Sequence[int] = (),
    on_tokens: Callable[[Chunk], Any] | None = None,
    **options,
) -> list[Generation]:
    """Continues each prompt (a list of token ids) by up to `max_tokens` tokens.

    Args:
      params: weights, stacked or from `decode.unstack` (do that once when there are several calls).
      stop_ids: a row ends after one of these.
      on_tokens: called with the new tokens of all rows, a few at a time.
      options: as for `stream`: temperature, top_k, top_p, min_p, seed, banned_ids, chunk.

    Raises SettingsError as `stream` does.
    """
    rows = [Generation([], [], "length") for _ in prompts]
    for chunk in stream(model, params, prompts, max_tokens=max_tokens, stop_ids=stop_ids, **options):
        for row, ids, logprobs in zip(rows, *chunk, strict=True):
            row.ids.extend(ids)
            row.logprobs.extend(logprobs)
        if on_tokens is not None:
            on_tokens(chunk)
    return [row._replace(finish="stop") if row.ids and row.ids[-1] in stop_ids else row for row in rows]


def stream(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop_ids: Sequence[int] = (),
    banned_ids: Sequence[int] = (),
    chunk: int = 8,
    **sampling,
) -> Iterator[Chunk]:
    """The tokens that continue each prompt, as they are made: up to `chunk` of each row at a time.

    Args:
      banned_ids: never made.
      sampling: temperature, top_k, top_p, min_p and seed; one number each, or one for each prompt (`make_sampling`).

    Raises SettingsError for an empty prompt, an id outside the vocabulary, a prompt that leaves no room for
    `max_tokens` in the model's context, or a sampling parameter out of its range.
    """
    _check(model, prompts, max_tokens, chunk)
    rows = _rows(model, len(prompts))
    options = make_sampling(len(prompts), **sampling)
    options = jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[:1], rows - len(prompts))]), options)
    stop_V, banned_V = _mask(model, "stop", stop_ids), _mask(model, "banned", banned_ids)
    if banned_V[: model.config.vocab].all():
        raise SettingsError(f"all {model.config.vocab} ids of the vocabulary are banned; allow at least one")
    params = decode.unstack(params)
    state = decode.prefill(model, params, prompts, rows, max_tokens)
    rules = jax.device_put((options, stop_V, banned_V), model.sharding.replicated())
    step = functools.partial(decode.compiled(model.config, model.sharding, model.kernels).decode, chunk=chunk)
    return _chunks(step, params, state, rules, math.ceil(max_tokens / chunk), len(prompts), stop_V)


def _chunks(step, params, state: decode.State, rules, dispatches: int, prompts: int, stop_V) -> Iterator[Chunk]:
    ended, waiting = np.zeros(prompts, bool), None
    for _ in range(dispatches):
        state, *made = step(params, state, *rules)
        if waiting is not None:  # read while the device makes the next ones
            yield _read(waiting, ended, stop_V)
            if ended.all():
                return
        waiting = made
    yield _read(waiting, ended, stop_V)


def _read(made, ended, stop_V) -> Chunk:
    """The chunk on the host; marks rows that met a stop token."""
    ids_BC, logprobs_BC = (np.asarray(x).T[: len(ended)] for x in made)
    real_BC = ids_BC >= 0
    if not np.isfinite(logprobs_BC[real_BC]).all():
        raise UserError("the model's logits are not finite: its weights hold NaN or infinity, or its dtype overflows")
    ended |= (real_BC & stop_V[ids_BC]).any(axis=1)
    split = [[row[keep].tolist() for row, keep in zip(x, real_BC, strict=True)] for x in (ids_BC, logprobs_BC)]
    return Chunk(*split)


def _check(model: Model, prompts, max_tokens: int, chunk: int) -> None:
    context = model.config.context
    if max_tokens < 1 or chunk < 1:
        raise SettingsError(f"max_tokens={max_tokens}, chunk={chunk}: both must be at least 1")
    if not prompts:
        raise SettingsError("no prompt given")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise SettingsError(f"prompt {i} has no tokens; begin it with the begin-of-text token")
        if len(prompt) + max_tokens > context:
            room = context - len(prompt)
            hint = f"set max_tokens={room} or less" if room > 0 else "shorten the prompt"
            raise SettingsError(
                f"prompt {i} has {len(prompt)} tokens, and with max_tokens={max_tokens} it passes the model's context "
                f"of {context}; {hint}"
            )
        try:
            check_tokens(model.config, np.asarray(prompt))
        except SettingsError as error:
            raise SettingsError(f"prompt {i}: {error}") from None


def _mask(model: Model, name: str, ids: Sequence[int]) -> np.ndarray:
    bad = [i for i in ids if not 0 <= i < model.config.vocab]
    if bad:
        raise SettingsError(f"{name} id {bad[0]} is outside the vocabulary of {model.config.vocab}")
    mask_V = np.zeros(model.config.padded_vocab, bool)
    mask_V[list(ids)] = True
    return mask_V


def _rows(model: Model, prompts: int) -> int:
    """Rows of the batch: a power of two; at least 2 where XLA would widen all weights in every step of one row."""
    one_row_is_slow = jax.default_backend() == "cpu" and model.config.dtype != "float32"
    return decode.power_of_two(prompts, 2 if one_row_is_slow else 1)
