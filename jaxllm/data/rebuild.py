"""Tokenizers rebuilt from the lists of tokens that a GGUF file holds; types: 1 normal, 2 unknown, 3 control,
4 user-defined, 5 unused, 6 byte (SentencePiece's numbers)."""

import json
from collections import Counter
from collections.abc import Sequence

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from jaxllm.data.sentencepiece_tokenizer import BLOCK, BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError, nearest

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_SLASH = _TAIL.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: How text is cut before the merges, by GGUF's `tokenizer.ggml.pre`: patterns in turn; none is GPT-2's own.
PATTERNS = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), ()),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), (r"\p{N}", None)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe", "dbrx"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN2,)),
    "gpt-4o": (rf"{_CASED % (_CONTRACTIONS + '?', _CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_SLASH}",),
    "tekken": (rf"{_CASED % ('', '')}|\p{{N}}|{_SLASH}",),
    "deepseek-v3": (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3),
}
#: Models whose published tokenizer takes a whole word that is a token as it is.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken", "gpt-4o")
#: Models whose published tokenizer composes accents first (Unicode's NFC).
COMPOSED = ("qwen2",)


def sentencepiece_from_pieces(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    bos: int | None,
    eos: int | None,
    unk: int | None,
    pad: int | None,
    add_bos: bool = True,
    add_dummy_prefix: bool = True,
    template: str | None = None,
) -> Tokenizer:
    """A SentencePiece BPE tokenizer (`tokenizer.ggml.model` is `llama`). Raises DataError for lists that do not fit."""
    named = _named(pieces, types, bos=bos, eos=eos, unk=unk, pad=pad)
    if len(scores) != len(pieces):
        raise DataError(f"the tokenizer has {len(pieces):,} pieces and {len(scores):,} scores")
    proto = ModelProto()
    for i, (piece, score, kind) in enumerate(zip(pieces, scores, types, strict=True)):
        # Of unknown pieces there is exactly one; some files call it control. Spaces are written out where they were
        # escaped once.
        kind = UNKNOWN if i == unk else CONTROL if kind == UNKNOWN else kind
        text = piece.replace(" ", BLOCK) if kind in (NORMAL, USER_DEFINED) else piece
        proto.pieces.add(piece=text, score=score if kind == NORMAL else 0.0, type=kind)
    spec = proto.trainer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback = TrainerSpec.BPE, len(pieces), BYTE in types
    for name, i in (("bos", bos), ("eos", eos), ("unk", unk), ("pad", pad)):
        setattr(spec, f"{name}_id", -1 if i is None else i)
        if i is not None:
            setattr(spec, f"{name}_piece", pieces[i])
    rules = proto.normalizer_spec
    rules.name, rules.add_dummy_prefix, rules.remove_extra_whitespaces = "identity", add_dummy_prefix, False
    texts = [piece.piece for piece in proto.pieces]
    config = _config(texts, types, named, add_bos) | {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    return _tokenizer({"tokenizer.model": proto.SerializeToString()}, config, template)


def bpe_from_vocab(
    tokens: Sequence[str],
    merges: Sequence[str],
    types: Sequence[int],
    *,
    pre: str,
    bos: int | None,
    eos: int | None,
    unk: int | None,
    pad: int | None,
    add_bos: bool = False,
    template: str | None = None,
) -> Tokenizer:
    """A byte-level BPE tokenizer (`tokenizer.ggml.model` is `gpt2`). Raises DataError for lists that do not fit.

    `pre`: how text is cut into words (`tokenizer.ggml.pre`); one of PATTERNS.
    """
    named = _named(tokens, types, bos=bos, eos=eos, unk=unk, pad=pad)
    if pre not in PATTERNS:
        raise DataError(f"the pre-tokenizer {pre!r} is not known{nearest(pre, PATTERNS)}")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    patterns = PATTERNS[pre]
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
        if pattern
    ]
    own = not patterns or None in patterns
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    raw = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags, "special": kind != USER_DEFINED}
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"} if pre in COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level | {"use_regex": own}]},
        "post_processor": None,
        "decoder": level | {"use_regex": own},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in WHOLE_WORDS,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }
    config = _config(tokens, types, named, add_bos) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    return _tokenizer({"tokenizer.json": json.dumps(raw, ensure_ascii=False).encode("utf-8")}, config, template)


def _named(pieces: Sequence[str], types: Sequence[int], **ids: int | None) -> dict[str, str]:
    """`{"bos_token": "<s>", ...}`. Raises DataError for lists of different lengths and for ids outside of them."""
    if len(types) != len(pieces):
        raise DataError(f"the tokenizer has {len(pieces):,} pieces and {len(types):,} types")
    if bad := set(types) - set(range(1, 7)):
        raise DataError(f"the tokenizer has pieces of the type {min(bad)}; known are 1 to 6")
    if len(set(pieces)) != len(pieces):
        twice, _ = Counter(pieces).most_common(1)[0]
        raise DataError(f"the tokenizer has the piece {twice!r} twice")
    for name, i in ids.items():
        if i is not None and not 0 <= i < len(pieces):
            raise DataError(f"the {name} id {i} is outside the vocabulary of {len(pieces):,} pieces")
    return {f"{name}_token": pieces[i] for name, i in ids.items() if i is not None}


def _config(pieces: Sequence[str], types: Sequence[int], named: dict[str, str], add_bos: bool) -> dict:
    kinds = enumerate(zip(pieces, types, strict=True))
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    added = {
        str(i): {"content": piece, **flags, "special": kind != USER_DEFINED}
        for i, (piece, kind) in kinds
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    }
    rules = {"add_bos_token": add_bos, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    return {**named, **rules, "added_tokens_decoder": added}


def _tokenizer(model: dict[str, bytes], config: dict, template: str | None) -> Tokenizer:
    files = model | {"tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=1).encode("utf-8")}
    return Tokenizer(files if template is None else files | {"chat_template.jinja": template.encode("utf-8")})
