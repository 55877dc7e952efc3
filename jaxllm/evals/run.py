"""Runs task files on a model: accuracy, bits per byte and exact match, each with its standard error."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError, UserError
from jaxllm.evals.score import Pair, Score, check_length, encode_pair, loglikelihoods
from jaxllm.evals.tasks import Item, Task
from jaxllm.generate.text import generate_text
from jaxllm.model.build import Model, Params


class InHand(Protocol):
    """A model in hand, as `jaxllm.load` gives it."""

    model: Model
    params: Params
    tokenizer: Tokenizer

    @property
    def decoding(self) -> Params:
        """The weights laid out for decoding."""


def run_task(loaded: InHand, task: Task, contexts: Sequence[str], *, batch: int = 8) -> dict[str, Any]:
    """The metrics of one task, whose items stand after `contexts` (`tasks.prompts`).

    multiple_choice: `acc` takes the choice of the largest log-likelihood, `acc_norm` of the largest one a UTF-8 byte
    of the choice; the first of equal ones. cloze: `acc` counts completions whose every token is the likeliest,
    `loglikelihood` is their mean in nats, `bits_per_byte` all bits over all bytes. exact_match: the share of greedy
    answers that, without white space around them, are one of `answers`.

    `NAME_stderr` is the standard error of each, None for a single item. Raises DataError with file and line for an
    item that is too long for the model.
    """
    run = {"multiple_choice": _multiple_choice, "cloze": _cloze, "exact_match": _exact_match}[task.kind]
    return {"kind": task.kind, "items": len(task.items)} | run(loaded, task, contexts, batch)


def mean_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error: sample deviation / sqrt(n); for shares that is sqrt(p (1 - p) / (n - 1))."""
    n = len(values)
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else None


def ratio_stderr(tops: Sequence[float], bottoms: Sequence[float]) -> tuple[float, float | None]:
    """sum(tops) / sum(bottoms), and its standard error (Cochran, Sampling Techniques, 1977, section 6.4)."""
    tops, bottoms, n = np.asarray(tops, float), np.asarray(bottoms, float), len(tops)
    ratio = tops.sum() / bottoms.sum()
    if n < 2:
        return float(ratio), None
    spread = math.sqrt(np.square(tops - ratio * bottoms).sum() / (n - 1))
    return float(ratio), float(spread / math.sqrt(n) / bottoms.mean())


def _named(**found: tuple[float, float | None]) -> dict[str, float | None]:
    return {
        key: value for name, pair in found.items() for key, value in zip((name, f"{name}_stderr"), pair, strict=True)
    }


def _multiple_choice(loaded, task: Task, contexts, batch: int) -> dict:
    scores = iter(_scores(loaded, task, contexts, batch))
    plain, normalised = [], []
    for item in task.items:
        logprobs = np.array([next(scores).logprob for _ in item.choices])
        sizes = [len(choice.strip().encode("utf-8")) for choice in item.choices]
        plain.append(np.argmax(logprobs) == item.answer)
        normalised.append(np.argmax(logprobs / sizes) == item.answer)
    return _named(acc=mean_stderr(plain), acc_norm=mean_stderr(normalised))


def _cloze(loaded, task: Task, contexts, batch: int) -> dict:
    scores = _scores(loaded, task, contexts, batch)
    bits = [-score.logprob / math.log(2) for score in scores]
    return _named(
        acc=mean_stderr([score.greedy for score in scores]),
        loglikelihood=mean_stderr([score.logprob for score in scores]),
        bits_per_byte=ratio_stderr(bits, [_size(*pair) for pair in zip(task.items, contexts, strict=True)]),
    )


def _size(item: Item, context: str) -> int:
    """UTF-8 bytes of what is scored: the completion, and the white space before it."""
    scored = context[len(context.rstrip()) :] + item.continuation(item.completion)
    return len(scored.encode("utf-8"))


def _scores(loaded, task: Task, contexts, batch: int) -> list[Score]:
    """One score for each option of each item, in order."""
    pairs = [
        _pair(loaded, context, item.continuation(option), task.where(i))
        for i, (item, context) in enumerate(zip(task.items, contexts, strict=True))
        for option in item.options
    ]
    return loglikelihoods(loaded.model, loaded.params, pairs, batch=batch)


def _pair(loaded, context: str, continuation: str, where: str) -> Pair:
    try:
        pair = encode_pair(loaded.tokenizer, context, continuation)
        check_length(loaded.model, pair)
    except UserError as error:
        raise DataError(f"{where}: {error}") from None
    return pair


def _exact_match(loaded, task: Task, contexts, batch: int) -> dict:
    prompts = [loaded.tokenizer.encode(context, bos=True).tolist() for context in contexts]
    for i, (item, prompt) in enumerate(zip(task.items, prompts, strict=True)):
        if not prompt:
            raise DataError(f"{task.where(i)}: a prompt without tokens; give it text")
        if len(prompt) + item.max_tokens > loaded.model.config.context:
            raise DataError(
                f"{task.where(i)}: {len(prompt)} tokens of prompt and max_tokens={item.max_tokens} are more than the "
                f"model's context of {loaded.model.config.context}; shorten the prompt, or give fewer shots"
            )
    # Rows of a batch share their stop strings, and do not wait for much longer ones.
    order = sorted(range(len(prompts)), key=lambda i: (task.items[i].stop, -len(prompts[i])))
    right = np.zeros(len(prompts))
    for chosen in _batches(order, lambda i: task.items[i].stop, batch):
        for i, text in zip(chosen, _say(loaded, task, prompts, chosen), strict=True):
            right[i] = text.strip() in {answer.strip() for answer in task.items[i].answers}
    return _named(exact_match=mean_stderr(right))


def _batches(order: list[int], group, batch: int) -> list[list[int]]:
    """`order` in parts of at most `batch` neighbours of one group."""
    out: list[list[int]] = []
    for i in order:
        if out and len(out[-1]) < batch and group(out[-1][0]) == group(i):
            out[-1].append(i)
        else:
            out.append([i])
    return out


def _say(loaded, task: Task, prompts, chosen: list[int]) -> list[str]:
    most = [task.items[i].max_tokens for i in chosen]
    options = dict(max_tokens=most, stop=task.items[chosen[0]].stop, temperature=0)
    rows = [prompts[i] for i in chosen]
    return [made.text for made in generate_text(loaded.model, loaded.decoding, loaded.tokenizer, rows, **options)]
