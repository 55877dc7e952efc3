"""Log-likelihoods of continuations: what a model gives a text after another.

Shapes: B batch, T position, W place in the continuation, J places of a chunk, C chunks, D embed, V vocab.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError, SettingsError, UserError
from jaxllm.generate.decode import power_of_two
from jaxllm.generate.request import NOT_FINITE
from jaxllm.model.build import Model, Params, build, check_tokens
from jaxllm.objectives.lm import CHUNK_LOGITS

#: Places times rows in a chunk of logits, at least: 8 of them against 262,144 ids are half as fast on CPU.
ROWS = 128


class Pair(NamedTuple):
    """A context and what follows it, as token ids; neither is empty."""

    context: list[int]
    continuation: list[int]


class Score(NamedTuple):
    """What the model gives a continuation."""

    logprob: float
    """Of the whole continuation, in nats."""
    tokens: int
    greedy: bool
    """Whether every token is the likeliest in its place (the first of equal ones)."""


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """The ids of both, cut where `context` alone would end; as in lm-eval.

    White space at the end of the context goes to the continuation, since most tokenizers begin a word with its space.
    What the tokenizer puts before a text comes first. Where the two meet within the last token, that token is scored.
    Without a context the begin-of-text id is the context, or the end-of-text id where there is none.
    Raises DataError for a continuation without text, or where there is neither id.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    if not continuation:
        raise DataError("a continuation without text cannot be scored")
    if not kept:
        return Pair(prefix(tokenizer), tokenizer.encode(continuation).tolist())
    whole = tokenizer.encode(kept + continuation, bos=True).tolist()
    cut = min(len(tokenizer.encode(kept, bos=True)), len(whole) - 1)
    return Pair(whole[:cut] or prefix(tokenizer), whole[cut:])


def prefix(tokenizer: Tokenizer) -> list[int]:
    """What stands before a text's first token, so that this one can be scored too. Raises DataError for none."""
    if tokenizer.before:
        return list(tokenizer.before)
    if tokenizer.eos is None:
        raise DataError(
            "the tokenizer has neither a begin-of-text nor an end-of-text id, so nothing can stand before a text's "
            "first token; give every item a prompt"
        )
    return [tokenizer.eos]


def loglikelihoods(
    model: Model,
    params: Params,
    pairs: Sequence[Pair],
    *,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """The score of each continuation after its context, in the order given.

    Rows of like length share a batch, padded on the right to powers of two so that few shapes are compiled; a row's
    score does not depend on the others. (A mixture of experts with a `capacity_factor` is the exception: what it drops
    goes by the padded length.)

    Raises SettingsError for a pair that is longer than the model's context, an id outside the vocabulary or a batch
    below 1; UserError where logits are not finite.
    """
    if batch < 1:
        raise SettingsError(f"batch={batch}: must be at least 1")
    for i, pair in enumerate(pairs):
        _check(model, i, pair)
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    found: list[Score | None] = [None] * len(pairs)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        for i, score in zip(chosen, _batch(model, params, [pairs[i] for i in chosen]), strict=True):
            found[i] = score
        if progress is not None:
            progress(start + len(chosen), len(order))
    return found


def check_length(model: Model, pair: Pair) -> None:
    """Raises SettingsError where the model cannot see the pair at once; the last token is predicted and never read."""
    if sum(map(len, pair)) - 1 > model.config.context:
        raise SettingsError(
            f"{len(pair.context)} tokens of context and {len(pair.continuation)} to score are more than the model's "
            f"context of {model.config.context} (and the one it predicts last); shorten the prompt, or give fewer shots"
        )


def _check(model: Model, i: int, pair: Pair) -> None:
    try:
        if not pair.context or not pair.continuation:
            raise SettingsError("context and continuation need a token each")
        check_length(model, pair)
        check_tokens(model.config, np.asarray([*pair.context, *pair.continuation]), model.config.context)
    except SettingsError as error:
        raise SettingsError(f"pair {i}: {error}") from None


def _batch(model: Model, params: Params, pairs: list[Pair]) -> list[Score]:
    rows = power_of_two(len(pairs), 1)
    lengths = [sum(map(len, pair)) - 1 for pair in pairs]
    T = min(power_of_two(max(lengths), 16), model.config.context)
    W = power_of_two(max(len(pair.continuation) for pair in pairs), 8)
    tokens_BT, segments_BT = np.zeros((2, rows, T), np.int32)
    at_BW, targets_BW = np.zeros((2, rows, W), np.int32)
    for row, (pair, n) in enumerate(zip(pairs, lengths, strict=True)):
        tokens_BT[row, :n], segments_BT[row, :n] = [*pair.context, *pair.continuation][:-1], 1
        k = len(pair.continuation)
        at_BW[row, :k], targets_BW[row, :k] = np.arange(n - k, n), pair.continuation
    inputs = jax.device_put((tokens_BT, segments_BT, at_BW, targets_BW), model.sharding.replicated())
    run = _compiled(model.config, model.sharding, model.kernels)
    logprobs_BW, likeliest_BW = jax.device_get(run(params, *inputs))
    out = []
    for row, pair in enumerate(pairs):
        k = len(pair.continuation)
        total = float(logprobs_BW[row, :k].astype(np.float64).sum())
        if not np.isfinite(total):
            raise UserError(NOT_FINITE)
        out.append(Score(total, k, bool((likeliest_BW[row, :k] == pair.continuation).all())))
    return out


@functools.lru_cache(maxsize=8)
def _compiled(config, sharding, kernels) -> Callable:
    """Kept by what defines a model, so that another task compiles nothing."""
    model = build(config, sharding, kernels)
    return jax.jit(functools.partial(_score, model), out_shardings=sharding.replicated())


def _score(model: Model, params, tokens_BT, segments_BT, at_BW, targets_BW):
    """`(logprobs_BW, likeliest_BW)` of the tokens that come after the positions `at_BW`."""
    tokens_BT, segments_BT = (model.sharding.constrain(x, "batch", "seq") for x in (tokens_BT, segments_BT))
    hidden_BTD = model.apply(params, tokens_BT, segments_BT=segments_BT)[0]
    hidden_BWD = jnp.take_along_axis(hidden_BTD, at_BW[..., None], axis=1)
    head = model.head(params)

    def chunk(part):
        hidden_BJD, targets_BJ = part
        logits_BJV = model.unembed(head, hidden_BJD)
        # Comparisons, not a gather and argmax: local where the vocabulary is split, and ten times as fast on CPU.
        place_V = jnp.arange(logits_BJV.shape[-1])
        chosen_BJ = jnp.sum(jnp.where(place_V == targets_BJ[..., None], logits_BJV, 0), axis=-1)
        equal_BJV = logits_BJV == jnp.max(logits_BJV, axis=-1, keepdims=True)
        likeliest_BJ = jnp.min(jnp.where(equal_BJV, place_V, len(place_V)), axis=-1)
        return chosen_BJ - jax.nn.logsumexp(logits_BJV, axis=-1), likeliest_BJ

    # Float32 logits exist a chunk of places at a time, as in the loss.
    B, W = at_BW.shape
    held = CHUNK_LOGITS * model.sharding.spread * (1 if model.sharding.platform == "cpu" else 64)
    least = -(-ROWS // B)  # fewer, and a large head is read from memory anew for a few rows each time
    J = min(W, 1 << max(least.bit_length() - 1, (held // (B * model.config.padded_vocab)).bit_length() - 1))
    parts = tuple(jnp.moveaxis(x.reshape(B, W // J, J, *x.shape[2:]), 1, 0) for x in (hidden_BWD, targets_BW))
    found = jax.lax.map(chunk, parts)
    return tuple(jnp.moveaxis(x_CBJ, 0, 1).reshape(B, W) for x_CBJ in found)
