"""Text in, text out: generation with a tokenizer around it."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxllm.data.tokenizer import StreamDecoder, Tokenizer
from jaxllm.generate import tokens
from jaxllm.model.build import Model, Params


class TextGeneration(NamedTuple):
    """What was made for one prompt; see `tokens.Generation`."""

    text: str
    """The new text, without the prompt and without the end marker."""
    ids: list[int]
    logprobs: list[float]
    finish: str


def generate_text(
    model: Model, params: Params, tokenizer: Tokenizer, prompts: Sequence[str], *, max_tokens: int = 128, **options
) -> list[TextGeneration]:
    """Continues each prompt until the end-of-text token or `max_tokens` tokens; `options` as for `tokens.generate`.

    Control pieces (padding, begin, chat markers) are never made, but for those in `stop_ids` (default: end of text).
    Raises SettingsError as `tokens.stream` does.
    """
    options = _options(model, tokenizer, options)
    made = tokens.generate(model, params, _encode(tokenizer, prompts), max_tokens=max_tokens, **options)
    return [TextGeneration(tokenizer.decode(g.ids), *g) for g in made]


def stream_text(
    model: Model, params: Params, tokenizer: Tokenizer, prompt: str, *, max_tokens: int = 128, **options
) -> Iterator[str]:
    """The text that continues `prompt`, piece by piece, always whole characters; otherwise as `generate_text`.

    Raises SettingsError at the call, before the first piece.
    """
    options = _options(model, tokenizer, options)
    chunks = tokens.stream(model, params, _encode(tokenizer, [prompt]), max_tokens=max_tokens, **options)
    return _pieces(StreamDecoder(tokenizer), chunks)


def _pieces(decoder: StreamDecoder, chunks: Iterator[tokens.Chunk]) -> Iterator[str]:
    for chunk in chunks:
        if piece := "".join(map(decoder.push, chunk.ids[0])):
            yield piece
    if piece := decoder.flush():
        yield piece


def _encode(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    return [tokenizer.encode(prompt, bos=True).tolist() for prompt in prompts]


def _options(model: Model, tokenizer: Tokenizer, options: dict) -> dict:
    """Adds the stop token and bans whatever has no text: control pieces, and ids that the tokenizer does not have."""
    stop_ids = tuple(options.get("stop_ids", (tokenizer.eos,)))
    without_text = [i for i, text in enumerate(tokenizer.bytes_of) if not text]
    unknown = range(tokenizer.vocab, model.config.vocab)
    banned = ({*without_text, *unknown} - {*stop_ids}) | {*options.get("banned_ids", ())}
    return options | {"stop_ids": stop_ids, "banned_ids": sorted(banned)}
