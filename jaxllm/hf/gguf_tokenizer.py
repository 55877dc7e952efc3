"""The tokenizer in a GGUF file's metadata, both ways: SentencePiece BPE (`llama`) and byte-level BPE (`gpt2`)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from jaxllm.data.hf_tokenizer import ALPHABET
from jaxllm.data.rebuild import PATTERNS, WHOLE_WORDS, bpe_from_vocab, sentencepiece_from_pieces
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError, SettingsError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)
IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
TEMPLATE = "tokenizer.chat_template"
#: Text that the ways of cutting words and numbers differ on, and the ways of treating spaces.
PROBE = (
    "Hello world, it's 12345 and 3.14; they'LL we've\n\n\n  indented\tCamelCaseWORDS snake_case x=1+2 // a/b ...!?\r\n"
    "naïve Straße ΑΒΓδ русский текст 日本語のテスト 中文字符 ひらがな한국어 🙂👩‍👩‍👧 e\u0301 ﬁ 1st 2nd  \n \n "
    "a  b   c    "
    "don't DON'T I'm ' s 'quoted' (paren) [x] {y} <z> #tag @me $5 50% a\u00a0b ٣٤٥ ½ word/\nnext.\n\n   end  "
)


def read_tokenizer(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a file. Raises DataError for one that is missing, damaged or of another kind."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in READERS:
        known = ", ".join(READERS)
        raise DataError(f"{path}: tokenizer.ggml.model={kind!r} is not read here; known: {known}")
    get = _Reader(path, metadata)
    if get("add_eos_token", bool, False):
        raise DataError(f"{path}: add_eos_token puts an end after every text, as no decoder that is read here wants it")
    tokens, types = get("tokens", list), get("token_type", np.ndarray).tolist()
    template = metadata.get(TEMPLATE)
    if not isinstance(template, str | None) or not all(isinstance(token, str) for token in tokens):
        raise DataError(f"{path}: the chat template and the tokens must be text")
    try:
        return READERS[kind](get, tokens, types, template)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


class _Reader:
    """Metadata of the tokenizer by name and type."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]):
        self.path, self.metadata = path, metadata

    def __call__(self, name: str, kind: type, *default):
        value = self.metadata.get(f"tokenizer.ggml.{name}", *default)
        if type(value) is not kind and (value is not None or not default):
            raise DataError(f"{self.path}: tokenizer.ggml.{name}={value!r:.60} must be a {kind.__name__}")
        return value

    def ids(self, **defaults: int | None) -> dict[str, int | None]:
        return {name: self(key, int, defaults.get(name)) for name, key in IDS.items()}


def _sentencepiece(get: _Reader, tokens, types, template) -> Tokenizer:
    unknown = next((i for i, kind in enumerate(types) if kind == UNKNOWN), 0)
    return sentencepiece_from_pieces(
        tokens,
        get("scores", np.ndarray).tolist(),
        types,
        **get.ids(bos=1, eos=2, unk=unknown),  # what llama.cpp takes where a file says nothing
        add_bos=get("add_bos_token", bool, True),
        add_dummy_prefix=get("add_space_prefix", bool, True),
        template=template,
    )


def _byte_level(get: _Reader, tokens, types, template) -> Tokenizer:
    pre = get("pre", str)
    return bpe_from_vocab(
        tokens,
        get("merges", list),
        types,
        pre=pre,
        **get.ids(),
        add_bos=get("add_bos_token", bool, pre in WHOLE_WORDS),
        template=template,
    )


READERS = {"llama": _sentencepiece, "gpt2": _byte_level}


def write_tokenizer(tokenizer: Tokenizer, vocab: int) -> dict[str, Any]:
    """Metadata of a tokenizer for a model with `vocab` rows; rows without a token get one that is never used.

    What is written is read back and has to give the same ids. Raises SettingsError for a tokenizer that a GGUF file
    cannot say.
    """
    if tokenizer.vocab > vocab:
        raise SettingsError(f"the tokenizer has {tokenizer.vocab:,} ids and the model {vocab:,} rows")
    sentencepiece = "tokenizer.model" in tokenizer.files
    out = _pieces(tokenizer) if sentencepiece else _merges(tokenizer)
    out["tokens"] += [f"[PAD{i}]" for i in range(tokenizer.vocab, vocab)]
    out["token_type"] += [UNUSED] * (vocab - tokenizer.vocab)
    if sentencepiece:
        out["scores"] += [-10_000.0] * (vocab - tokenizer.vocab)
    out |= _ids(tokenizer) | {"add_bos_token": tokenizer.bos is not None, "add_eos_token": False}
    made = {f"tokenizer.ggml.{key}": value for key, value in out.items()}
    if tokenizer.template is not None:
        made[TEMPLATE] = tokenizer.template
    arrays = {key: np.asarray(made[key]) for key in made if key.endswith(("scores", "token_type"))}
    again = read_tokenizer(Path("export"), made | arrays)
    if not np.array_equal(again.encode(PROBE, bos=True), tokenizer.encode(PROBE, bos=True)):
        raise SettingsError("a GGUF file cannot say how this tokenizer cuts text; export the model with --to hf")
    return made


def _ids(tokenizer: Tokenizer) -> dict[str, int]:
    found = {"eos": tokenizer.eos, "unk": tokenizer.unk, "pad": tokenizer.pad}
    found["bos"] = tokenizer.control.get(tokenizer.names.get("bos_token", ""), tokenizer.bos)
    return {IDS[name]: i for name, i in found.items() if i is not None}


def _pieces(tokenizer: Tokenizer) -> dict[str, Any]:
    proto = ModelProto.FromString(tokenizer.files["tokenizer.model"])
    spec, rules = proto.trainer_spec, proto.normalizer_spec
    if spec.model_type != spec.BPE or rules.precompiled_charsmap or rules.remove_extra_whitespaces:
        raise SettingsError(
            "llama.cpp has SentencePiece models of the type BPE that leave text as it is, and this one "
            "is another; export the model with --to hf"
        )
    control = set(tokenizer.control.values())
    tokens = [tokenizer.piece(i) for i in range(tokenizer.vocab)]
    types = [piece.type for piece in proto.pieces] + [USER_DEFINED] * (tokenizer.vocab - len(proto.pieces))
    types = [CONTROL if i in control and kind != UNKNOWN else kind for i, kind in enumerate(types)]
    # llama.cpp merges by score; what is found as a whole must not win a merge too.
    scores = [piece.score for piece in proto.pieces] + [0.0] * (tokenizer.vocab - len(proto.pieces))
    whole = (UNKNOWN, CONTROL, USER_DEFINED)
    scores = [-1000.0 if kind in whole else score for score, kind in zip(scores, types, strict=True)]
    # llama.cpp looks for user-defined pieces in the text as it is, before spaces are escaped.
    tokens = [t.replace("▁", " ") if kind == USER_DEFINED else t for t, kind in zip(tokens, types, strict=True)]
    model = {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "token_type": types}
    return model | {"add_space_prefix": rules.add_dummy_prefix}


def _merges(tokenizer: Tokenizer) -> dict[str, Any]:
    raw = json.loads(tokenizer.files["tokenizer.json"])
    if "ByteLevel" not in json.dumps(raw.get("decoder")):
        raise SettingsError(
            "this tokenizer.json is neither byte-level nor has it a tokenizer.model beside it; export the model with "
            "--to hf"
        )
    config = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))
    added = {item["id"] for item in raw.get("added_tokens") or ()} | set(
        map(int, config.get("added_tokens_decoder", {}))
    )
    control = set(tokenizer.control.values())
    tokens = [tokenizer.piece(i) for i in range(tokenizer.vocab)]
    types = [CONTROL if i in control else USER_DEFINED if i in added else NORMAL for i in range(tokenizer.vocab)]
    types = [kind if token else UNUSED for token, kind in zip(tokens, types, strict=True)]
    tokens = [token or f"[PAD{i}]" for i, token in enumerate(tokens)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]]
    return {"model": "gpt2", "pre": _pre(raw), "tokens": tokens, "token_type": types, "merges": merges}


def _pre(raw: dict) -> str:
    """The name that llama.cpp has for how a tokenizer.json normalises text and cuts it into words."""
    wanted = _cuts(raw)
    for pre in PATTERNS:
        plain = bpe_from_vocab(list(ALPHABET), [], [NORMAL] * 256, pre=pre, bos=None, eos=None, unk=None, pad=None)
        if _cuts(json.loads(plain.files["tokenizer.json"])) == wanted:
            return pre
    raise SettingsError(
        f"llama.cpp's names for ways to cut text into words ({', '.join(PATTERNS)}) do not say what this tokenizer "
        "does; export the model with --to hf"
    )


def _cuts(raw: dict) -> tuple[list, bool]:
    """The words of the probe, whatever the vocabulary, and whether a word that is a token is taken whole."""
    bare = {"type": "BPE", "vocab": {}, "merges": []}
    made = tokenizers.Tokenizer.from_str(json.dumps(raw | {"model": bare, "added_tokens": [], "post_processor": None}))
    text = made.normalizer.normalize_str(PROBE) if made.normalizer else PROBE
    words = made.pre_tokenizer.pre_tokenize_str(text) if made.pre_tokenizer else [text]
    return words, bool(raw["model"].get("ignore_merges"))
