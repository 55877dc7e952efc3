"""Text in, text out: generation with a tokenizer around it."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxllm.data.tokenizer import StreamDecoder, Tokenizer
from jaxllm.generate import tokens
from jaxllm.generate.beam import beam_search
from jaxllm.generate.params import column
from jaxllm.generate.stops import StopFinder, check_stop
from jaxllm.model.build import Model, Params

Prompt = str | Sequence[int]


class TextGeneration(NamedTuple):
    """What was made for one prompt, or one of its samples; see `tokens.Generation`."""

    text: str
    """The new text, without the prompt, the end marker, and a stop string and what follows it."""
    ids: list[int]
    """The tokens that were made, up to the one that completes a stop string."""
    logprobs: list[float]
    finish: str
    """"stop" after a stop token or a stop string, else "length"."""
    top: list[tokens.Top]


def generate_text(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | Sequence[int] = 128,
    stop: str | Sequence[str] = (),
    **options,
) -> list[TextGeneration]:
    """Continues each prompt (text, or token ids) until a stop token, a stop string or `max_tokens` tokens.

    Control tokens (padding, begin, chat markers) are never made, but for those in `stop_ids` (default: the tokenizer's,
    which end a turn or a text). Stop strings may span tokens; the first `min_tokens` tokens are not searched for them.
    `continued=False` where the prompt does not end in text, so that the space that some tokenizers put before a text is
    theirs. Other options and the order of the results are as for `tokens.stream`. Raises SettingsError as that does.
    """
    rows, chunks = _start(model, params, tokenizer, prompts, stop, max_tokens=max_tokens, **options)
    for _ in _pieces(rows, chunks):
        pass
    return [row.result(chunks.stopped[i]) for i, row in enumerate(rows)]


def stream_text(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_tokens: int = 128,
    stop: str | Sequence[str] = (),
    **options,
) -> "TextStream":
    """The text that continues `prompt`, piece by piece, always whole characters; otherwise as `generate_text`.

    Raises SettingsError at the call, before the first piece.
    """
    return TextStream(*_start(model, params, tokenizer, [prompt], stop, max_tokens=max_tokens, **options))


def beam_text(
    model: Model, params: Params, tokenizer: Tokenizer, prompts: Sequence[Prompt], *, max_tokens=128, **options
) -> list[TextGeneration]:
    """The `n` best continuations of each prompt; options as for `beam.beam_search`, otherwise as `generate_text`."""
    options = _options(model, tokenizer, options)
    made = beam_search(model, params, _encode(tokenizer, prompts), max_tokens=max_tokens, **options)
    return [TextGeneration(tokenizer.decode(g.ids, continued=True), *g) for g in made]


class TextStream(Iterator[str]):
    """Pieces of the text of one row, as they are made."""

    def __init__(self, rows: "list[_Row]", chunks: tokens.Stream):
        (self._row,), self._chunks = rows, chunks
        self._pieces = (piece for (piece,) in _pieces(rows, chunks) if piece)

    def __next__(self) -> str:
        return next(self._pieces)

    def result(self) -> TextGeneration:
        """All that was made up to now."""
        return self._row.result(self._chunks.stopped[0])


class _Row:
    """The text of one row while its tokens come."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], unsearched: int, continued: bool):
        """`unsearched`: tokens at the start whose text is not searched for stop strings."""
        self.ids, self.logprobs, self.top, self.text = [], [], [], ""
        self.finder = StopFinder(stops)
        self._decoder, self._unsearched = StreamDecoder(tokenizer, continued=continued), unsearched

    def push(self, ids, logprobs, top) -> str:
        """Takes new tokens, to the one that completes a stop string; the text that is certain now."""
        before = len(self.text)
        for i, logprob, alternatives in zip(ids, logprobs, top or [None] * len(ids), strict=True):
            if self.finder.found:
                break
            self.ids.append(i)
            self.logprobs.append(logprob)
            self.top += [alternatives] if top else []
            text = self._decoder.push(i)
            self.text += text if len(self.ids) <= self._unsearched else self.finder.push(text)
        return self.text[before:]

    def flush(self) -> str:
        """The rest of the text, once no more tokens come."""
        rest = self.finder.push(self._decoder.flush()) + self.finder.flush()
        self.text += rest
        return rest

    def result(self, stopped: bool) -> TextGeneration:
        finish = "stop" if stopped or self.finder.found else "length"
        return TextGeneration(self.text, list(self.ids), list(self.logprobs), finish, list(self.top))


def _start(
    model, params, tokenizer, prompts, stop, *, min_tokens=0, n=1, continued=True, **options
) -> tuple[list[_Row], tokens.Stream]:
    stops, options = check_stop(stop), _options(model, tokenizer, options)
    prompts = _encode(tokenizer, prompts)
    chunks = tokens.stream(model, params, prompts, min_tokens=min_tokens, n=n, **options)
    unsearched = np.repeat(column("min_tokens", min_tokens, len(prompts)), n)
    return [_Row(tokenizer, stops, least, continued) for least in unsearched], chunks


def _pieces(rows: list[_Row], chunks: tokens.Stream) -> Iterator[list[str]]:
    """The new text of each row, chunk by chunk; rows that met a stop string are given up."""
    for chunk in chunks:
        yield [row.push(*new) for row, *new in zip(rows, *chunk, strict=True)]
        for i, row in enumerate(rows):
            if row.finder.found:
                chunks.end(i)
    yield [row.flush() for row in rows]


def _encode(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[Sequence[int]]:
    return [tokenizer.encode(p, bos=True).tolist() if isinstance(p, str) else p for p in prompts]


def _options(model: Model, tokenizer: Tokenizer, options: dict) -> dict:
    """Adds the stop tokens and bans whatever has no text: control tokens, and ids that the tokenizer does not have.

    A tokenizer may have ids that the model lacks (Gemma 3's has one for images).
    """
    vocab = model.config.vocab
    stop_ids = options.get("stop_ids", [i for i in tokenizer.stop_ids if i < vocab])
    allowed = {i for ids in stop_ids for i in ([ids] if isinstance(ids, int | np.integer) else ids)}
    without_text = [i for i, text in enumerate(tokenizer.bytes_of[:vocab]) if not text]
    unknown = range(tokenizer.vocab, vocab)
    banned = ({*without_text, *unknown} - allowed) | {*options.get("banned_ids", ())}
    return options | {"stop_ids": stop_ids, "banned_ids": sorted(banned)}
