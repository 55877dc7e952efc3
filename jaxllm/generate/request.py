"""What a call of generation may ask for: checks before anything runs, and one entry for each prompt or row after.

Shapes: P prompt, B row (the samples of a prompt one after another, then padding), V vocab, E stop tokens.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jaxllm.errors import SettingsError
from jaxllm.generate import decode
from jaxllm.generate.params import column
from jaxllm.model.build import Model, Params, check_tokens
from jaxllm.model.change import weights_of
from jaxllm.weights.lora import Lora

NOT_FINITE = "the model's logits are not finite: its weights hold NaN or infinity, or its dtype overflows"


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts, and where each one ends; made by `check_request`."""

    prompts: Sequence[Sequence[int]]
    max_P: np.ndarray
    min_P: np.ndarray
    stops: list[list[int]]
    """Tokens that end each prompt's rows."""
    banned_V: np.ndarray
    adapters_P: np.ndarray | None
    """The adapter of each prompt, -1 for none; None where the weights do not hold several."""

    def stop_PE(self) -> np.ndarray:
        """The stop tokens as an array with -1 for none: 32 places; a higher power of two for more is compiled anew."""
        width = decode.power_of_two(max(map(len, self.stops)), 32)
        return np.array([[*ids, *[-1] * (width - len(ids))] for ids in self.stops], np.int32)

    def last(self, source_B) -> tuple[np.ndarray, np.ndarray]:
        """`(token_B, position_B)`: the last token of each row's prompt, and its place."""
        pairs = [(self.prompts[p][-1], len(self.prompts[p]) - 1) for p in source_B]
        return tuple(np.array(pairs, np.int32).T)

    def adapters(self, source_B: np.ndarray) -> np.ndarray | None:
        """The adapter of each row."""
        return None if self.adapters_P is None else self.adapters_P[source_B]

    def read(self, model: Model, params: Params, source_B: np.ndarray, copies: int) -> decode.Cache:
        """A cache in which row b has read the prompt `source_B[b]`, all but its last token; each is read once."""
        reading_B = sources(model, len(self.prompts), 1)[0]
        rows, adapters_B = len(reading_B), self.adapters(reading_B)
        cache = decode.prefill(model, params, self.prompts, rows, self.max_P, adapters_B)
        if copies == 1:
            return cache
        return decode.compiled(model.config, model.sharding, model.kernels).spread(cache, source_B)


def check_request(
    model: Model, prompts, *, max_tokens, min_tokens=0, stop_ids=(), banned_ids=(), adapters=None
) -> Request:
    """Raises SettingsError for an empty or too long prompt, an id outside the vocabulary, or a length out of range."""
    if not len(prompts):
        raise SettingsError("no prompt given")
    max_P, min_P = (column(f"{x}_tokens", y, len(prompts)) for x, y in (("max", max_tokens), ("min", min_tokens)))
    for i, (prompt, most, least) in enumerate(zip(prompts, max_P, min_P, strict=True)):
        if least > most:
            raise SettingsError(f"min_tokens={least} is more than max_tokens={most}")
        _check_prompt(model, i, prompt, int(most))
    shared = all(isinstance(i, int | np.integer) for i in stop_ids)
    stops = [list(stop_ids)] * len(prompts) if shared else [list(ids) for ids in stop_ids]
    if len(stops) != len(prompts):
        raise SettingsError(
            f"stop_ids: {len(stops)} lists for {len(prompts)} prompts; give one of ids, or one for each"
        )
    known = {i for ids in stops for i in ids}
    _check_ids(model, "stop", known)
    _check_ids(model, "banned", banned_ids)
    never = {*banned_ids} | (known if min_P.any() else set())
    if len(never) == model.config.vocab:
        why = "banned, or stop tokens before min_tokens" if min_P.any() else "banned"
        raise SettingsError(f"all {model.config.vocab} ids of the vocabulary are {why}; allow at least one")
    banned_V = np.arange(model.config.padded_vocab) >= model.config.vocab
    banned_V[list(banned_ids)] = True
    return Request(prompts, max_P, min_P, stops, banned_V, _check_adapters(model, adapters, len(prompts)))


def _check_adapters(model: Model, adapters, prompts: int) -> np.ndarray | None:
    held = next((w.adapters for w in weights_of(model.abstract).values() if isinstance(w, Lora) and w.several), None)
    if (adapters is None) != (held is None):
        what = "does not hold several adapters" if held is None else f"holds {held} adapters"
        raise SettingsError(f"adapters={adapters}: the model {what}; give one number for each prompt where it does")
    if adapters is None:
        return None
    chosen_P = np.asarray(adapters)
    if chosen_P.shape != (prompts,) or not all(x in range(-1, held) for x in chosen_P.tolist()):
        raise SettingsError(
            f"adapters={adapters}: give a number from 0 to {held - 1} for each of the {prompts} prompts, -1 for none"
        )
    return chosen_P.astype(np.int32)


def _check_prompt(model: Model, i: int, prompt, max_tokens: int) -> None:
    context = model.config.context
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


def _check_ids(model: Model, name: str, ids) -> None:
    bad = [i for i in ids if not 0 <= i < model.config.vocab]
    if bad:
        raise SettingsError(f"{name} id {bad[0]} is outside the vocabulary of {model.config.vocab}")


def padded_rows(model: Model, wanted: int) -> int:
    """Rows of a batch: a power of two; at least 2 where XLA would widen all weights in every step of one row."""
    one_row_is_slow = jax.default_backend() == "cpu" and model.config.dtype != "float32"
    return decode.power_of_two(wanted, 2 if one_row_is_slow else 1)


def sources(model: Model, prompts: int, copies: int) -> tuple[np.ndarray, np.ndarray]:
    """`(source_B, real_B)`: the prompt of each row, and whether it is a row that was asked for."""
    source_B = np.zeros(padded_rows(model, prompts * copies), np.int32)
    source_B[: prompts * copies] = np.repeat(np.arange(prompts), copies)
    return source_B, np.arange(len(source_B)) < prompts * copies
