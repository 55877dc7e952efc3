"""Verbs of text and tokens: tokenizer, data."""

import os
import sys

from jaxllm.cli.common import new_verb, refuse_ignored, standard_input
from jaxllm.errors import UserError


def add_tokenizer(verbs):
    verbs = new_verb(verbs, "tokenizer", "train a tokenizer, or use one").add_subparsers(metavar="VERB", required=True)
    verb = new_verb(
        verbs, "train", "train a SentencePiece BPE tokenizer on text files", tokenizer_train, "tokenizer train"
    )
    verb.add_argument("files", nargs="+", help="files or globs; python-stdlib for the standard library")
    verb.add_argument("--vocab", type=int, default=4096, help="number of pieces (default 4096)")
    verb.add_argument("--field", default="text", help="key or column of the text in .jsonl and parquet (default text)")
    verb.add_argument("--out", required=True, help="folder to write tokenizer.model and the chat template into")
    verb = new_verb(verbs, "encode", "token ids of a text", tokenizer_encode, "tokenizer encode")
    verb.add_argument("tokenizer", help="run folder, tokenizer folder or .model file")
    verb.add_argument("text", help="the text; - reads standard input")
    verb.add_argument("--pieces", action="store_true", help="show the pieces too")
    verb = new_verb(verbs, "decode", "the text of token ids", tokenizer_decode, "tokenizer decode")
    verb.add_argument("tokenizer", help="run folder, tokenizer folder or .model file")
    verb.add_argument("ids", nargs="+", type=int, help="token ids")


def tokenizer_train(args) -> None:
    from pathlib import Path

    from jaxllm.data.prepare import train_tokenizer
    from jaxllm.data.sources import Source

    if (Path(args.out) / "tokenizer.model").exists():
        raise UserError(f"{args.out} already holds a tokenizer; choose another --out")
    source = Source(name="text", path=tuple(args.files), field=args.field)
    tokenizer = train_tokenizer((source,), args.vocab, args.out)
    print(f"{args.out}: {tokenizer.vocab} pieces, hash {tokenizer.hash[:12]}")


def _open_tokenizer(path: str):
    from pathlib import Path

    from jaxllm.data.tokenizer import Tokenizer

    if path.endswith(".gguf"):
        from jaxllm.hf.open import open_published

        return open_published(path).tokenizer()
    inside = Path(path) / "tokenizer"
    return Tokenizer.load(inside if inside.is_dir() else path)


def tokenizer_encode(args) -> None:
    tokenizer = _open_tokenizer(args.tokenizer)
    text = standard_input() if args.text == "-" else args.text
    ids = tokenizer.encode(text).tolist()
    print(" ".join(map(str, ids)))
    if args.pieces:
        print(" ".join(repr(tokenizer.piece(i)) for i in ids))


def tokenizer_decode(args) -> None:
    print(_open_tokenizer(args.tokenizer).decode(args.ids))


def add_data(verbs):
    verbs = new_verb(verbs, "data", "tokenise text, or look at it").add_subparsers(metavar="VERB", required=True)
    for name, help, run in (
        ("prepare", "tokenise the sources of a settings file into token stores", data_prepare),
        ("inspect", "show documents and packed rows of a settings file's sources", data_inspect),
    ):
        verb = new_verb(verbs, name, help, run, f"data {name}")
        verb.add_argument("config", metavar="RUN.yaml", help="settings file, or the name of a shipped one")
        verb.add_argument(
            "overrides", nargs="*", metavar="section.key=value", help="settings that differ from the file"
        )
        if name == "inspect":
            verb.add_argument("--rows", type=int, default=2, help="documents and rows to show (default 2)")
            verb.add_argument(
                "--step", type=int, help="show the documents that a step of the run reads, and where they stand"
            )
            verb.add_argument(
                "--chat", action="store_true", help="show conversations, and which of their tokens are learnt"
            )
            verb.add_argument(
                "--tokenizer",
                metavar="MODEL",
                help="with --chat: read a .jsonl file in place of RUN.yaml, with the chat template of this model",
            )


def _prepared(args):
    """Settings, tokenizer and token stores of a settings file."""
    from jaxllm.data.prepare import prepare
    from jaxllm.train.folder import RunFolder
    from jaxllm.train.load import load_run

    settings, _ = load_run(args.config, args.overrides)
    tokenizer = RunFolder(settings).open_tokenizer(lambda text: print(text, file=sys.stderr))
    stores = prepare(settings.data, tokenizer, say=lambda text: print(text, file=sys.stderr))
    return settings, tokenizer, stores


def data_prepare(args) -> None:
    _, tokenizer, stores = _prepared(args)
    for name, store in stores.items():
        print(f"{name}: {store.documents:,} documents, {store.text_bytes:,} bytes, {store.tokens:,} tokens")
    print(f"tokenizer {tokenizer.hash[:12]} of {tokenizer.vocab} pieces")


def data_inspect(args) -> None:
    from jaxllm.data.inspect import inspect, inspect_chat

    if args.step is not None:
        return _inspect_step(args)
    if args.tokenizer is not None:
        refuse_ignored("data inspect shows a file only with --chat", ["tokenizer"] * (not args.chat))
        tokenizer, stores, options = *_chat_file(args), {}
    else:
        if args.chat and args.config.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
            raise UserError(f"{args.config} is a file of conversations; say with --tokenizer which model reads them")
        settings, tokenizer, stores = _prepared(args)
        options = dict(length=settings.train.seq_len, pack=settings.data.pack, truncate=settings.data.truncate)
    if args.chat:
        stores = {name: store for name, store in stores.items() if store.chat}
        if not stores:
            raise UserError(f"{args.config}: no source has format: chat, so there are no conversations to show")
        options["color"] = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    show = inspect_chat if args.chat else inspect
    print("\n\n".join(show(store, tokenizer, args.rows, **options) for store in stores.values()))


def _inspect_step(args) -> None:
    from jaxllm.data.inspect import inspect_rows
    from jaxllm.train.streams import make_streams, rows_of_step

    refuse_ignored("data inspect --step shows documents", ["chat"] * args.chat + ["tokenizer"] * bool(args.tokenizer))
    settings, tokenizer, stores = _prepared(args)
    stages = settings.train.resolved_stages
    index, rows = rows_of_step(stages, args.step)
    print(inspect_rows(make_streams(settings.data, stages, stores)[index], rows, tokenizer))


def _chat_file(args):
    """A file of conversations, tokenised by the tokenizer of a model."""
    from jaxllm.data.config import DataConfig
    from jaxllm.data.prepare import prepare
    from jaxllm.data.sources import Source

    if args.overrides:
        raise UserError(f"{args.config} is no settings file, so {args.overrides[0]} would be ignored; leave it out")
    tokenizer = _open_tokenizer(args.tokenizer)
    config = DataConfig(sources=(Source(name="chat", path=args.config, format="chat"),))
    return tokenizer, prepare(config, tokenizer, say=lambda text: print(text, file=sys.stderr))
