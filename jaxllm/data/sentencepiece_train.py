"""Training of SentencePiece BPE tokenizers: lossless on any text."""

import io
import re
from collections.abc import Iterable

import sentencepiece

from jaxllm.data.chat import MARKERS
from jaxllm.data.sentencepiece_tokenizer import size, windows
from jaxllm.errors import DataError, SettingsError

#: Lossless: no normalisation, spaces kept as they are, bytes for what no piece covers. Pieces may join letters and
#: punctuation: on Python source with 4,096 pieces 3.8 bytes a token, against 3.5 when Unicode scripts split words.
TRAINER = dict(
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,
    allow_whitespace_only_pieces=True,
    split_by_unicode_script=False,
    split_digits=True,
    byte_fallback=True,
    character_coverage=0.9995,
    max_sentence_length=1 << 16,
    # The model's bytes hold this number, so that it is part of the hash: the same on every machine.
    num_threads=2,
    minloglevel=2,
    **{f"{name}_id": i for i, name in enumerate(("pad", "unk", "bos", "eos"))},
    **{f"{name}_piece": f"<{name}>" for name in ("pad", "unk", "bos", "eos")},
)


def train(texts: Iterable[str], vocab: int, max_bytes: int) -> bytes:
    """The bytes of a `.model` (see `Tokenizer.train`)."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(_sample(texts, max_bytes)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab,
            control_symbols=list(MARKERS),
            **TRAINER,
        )
    except RuntimeError as error:
        raise _explain(str(error), vocab) from None
    return model.getvalue()


def _explain(message: str, vocab: int) -> Exception:
    if fewer := re.search(r"too high .* value <= (\d+)", message):
        return SettingsError(
            f"vocab={vocab}: this text gives at most {fewer[1]} pieces; set vocab={fewer[1]} or add text"
        )
    if more := re.search(r"(\d+) vs (\d+)", message):
        return SettingsError(f"vocab={vocab}: bytes and characters of this text alone need {more[2]}; set vocab higher")
    if "sentences_.empty" in message:
        return DataError("there is no text to train a tokenizer on")
    return DataError(f"SentencePiece could not train on this text: {message}")


def _sample(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Windows of text, evenly spread: each time too much is held, every other one is dropped and the stride doubles."""
    kept, held, stride = [], 0, 1
    for i, window in enumerate(w for text in texts for w in windows(text, 4096)):
        if i % stride:
            continue
        kept.append(window)
        held += size(window)
        if held > max_bytes and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            held = sum(size(w) for w in kept)
    return kept
