"""A tokenizer trained here as the files that Hugging Face's software reads, with equal ids for every text."""

import json

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from jaxllm.data.sentencepiece_tokenizer import BLOCK, NORMAL


def hf_files(tokenizer) -> dict[str, bytes]:
    """`{name: bytes}` of tokenizer.json, tokenizer_config.json and the chat template, for a `Tokenizer` of ours."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.names,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": _model(tokenizer), "tokenizer_config.json": config}
    made = {name: json.dumps(value, ensure_ascii=False, indent=1).encode("utf-8") for name, value in files.items()}
    return made | {"chat_template.jinja": tokenizer.template.encode("utf-8")}


def _model(tokenizer) -> dict:
    proto = ModelProto.FromString(tokenizer.files["tokenizer.model"])
    # With spaces for U+2581 no normaliser is needed, and a real U+2581 falls back to its bytes, as it does here.
    pieces = [p.piece.replace(BLOCK, " ") if p.type == NORMAL else p.piece for p in proto.pieces]
    normal = {pieces[i]: i for i, p in enumerate(proto.pieces) if p.type == NORMAL}
    by_score = sorted(normal, key=lambda piece: -proto.pieces[normal[piece]].score)
    merges = [[p[:k], p[k:]] for p in by_score for k in range(1, len(p)) if p[:k] in normal and p[k:] in normal]
    bos = tokenizer.piece(tokenizer.bos)
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": pieces[i], **flags} for i in sorted({tokenizer.unk, *tokenizer.control.values()})
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.piece(tokenizer.unk),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges,
        },
    }
