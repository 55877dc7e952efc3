"""The command line: one verb for each thing a user wants done. Loads jax only once a verb needs it."""

import argparse
import json
import logging
import os
import sys

from jaxllm.errors import UserError

EXAMPLES = {
    "train": "jaxllm train demo train.steps=200 out=runs/mine",
    "tokenizer train": "jaxllm tokenizer train 'books/*.txt' --vocab 8192 --out tokenizers/books",
    "tokenizer encode": "jaxllm tokenizer encode runs/demo 'def main():'",
    "tokenizer decode": "jaxllm tokenizer decode runs/demo 300 301 302",
    "data prepare": "jaxllm data prepare demo",
    "data inspect": "jaxllm data inspect demo --rows 2",
    "eval": "jaxllm eval runs/demo --data notes.txt",
    "generate": "jaxllm generate runs/demo --prompt 'def main(' --temperature 0.7 --max-tokens 100",
    "chat": "jaxllm chat models/smollm2-135m-instruct --system 'Answer in one sentence.'",
    "runs list": "jaxllm runs list",
    "runs compare": "jaxllm runs compare runs/demo runs/demo-2",
    "demo": "jaxllm demo --minutes 2",
    "bench train": "jaxllm bench train --workloads W1 W2",
    "bench generate": "jaxllm bench generate models/gemma-3-270m --batches 1 8",
    "info": "jaxllm info models/gemma-3-270m",
    "export": "jaxllm export runs/demo --to hf --out exported/demo",
    "parity": "jaxllm parity models/gemma-3-270m",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a verb; returns the exit code: 0, 2 for what the user can mend, 1 for anything unexpected."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Programs compiled once are found again by the next run.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jaxllm/xla"))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("jaxllm").setLevel(logging.DEBUG if args.debug else logging.INFO)
    if (level := getattr(args, "launch", None)) and not getattr(args, "print_config", False):
        from jaxllm.launch import relaunch

        relaunch(argv, level)
    try:
        return args.run(args) or 0
    except UserError as error:
        return _fail(args, error, f"error: {error}", 2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        return _fail(args, error, f"unexpected {type(error).__name__}: {first}\nrun again with --debug to see where", 1)


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; `section.key=value` may stand before, between and after options, which argparse alone refuses."""
    args, rest = parser().parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(text.startswith("-") for text in rest)):
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def _fail(args, error: Exception, text: str, code: int) -> int:
    if args.debug:
        raise error
    print(text, file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    top = argparse.ArgumentParser(prog="jaxllm", description="Train, evaluate and run decoder language models in JAX.")
    top.add_argument("--version", action="version", version=_version())
    _common(top, default=False)
    verbs = top.add_subparsers(metavar="VERB", required=True)
    _train(verbs)
    _tokenizer(verbs)
    _data(verbs)
    _eval(verbs)
    _generate(verbs)
    _chat(verbs)
    _runs(verbs)
    _demo(verbs)
    _bench(verbs)
    _info(verbs)
    _export(verbs)
    _parity(verbs)
    return top


def _version() -> str:
    from jaxllm import __version__

    return f"jaxllm {__version__}"


def _common(parser, default=argparse.SUPPRESS):
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")


def _verb(verbs, name: str, help: str, run=None, example: str | None = None, **defaults):
    """A verb with its help, an example, and the function that runs it."""
    text = EXAMPLES.get(example or name)
    verb = verbs.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=f"example:\n  {text}" if text else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _common(verb)
    if run is not None:
        verb.set_defaults(run=run, **defaults)
    return verb


def _train(verbs):
    verb = _verb(
        verbs,
        "train",
        "train a model by a settings file, or go on with a run that was stopped",
        train,
        launch=logging.INFO,
    )
    verb.add_argument("config", metavar="RUN.yaml", help="settings file, or the name of a shipped one (configs/runs)")
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from the file")
    verb.add_argument("--print-config", action="store_true", help="show all settings, resolved, with their meaning")
    verb.add_argument("--quiet", action="store_true", help="no progress")


def train(args) -> int:
    from jaxllm import config
    from jaxllm.train.config import load_run

    settings, scale = load_run(args.config, args.overrides)
    if scale is not None:
        run = settings.train
        print(scale.derivation())
        print(f"so: {run.total_steps:,} steps of {run.batch} rows x {run.seq_len} tokens, lr {settings.optim.lr:.4g}")
    if args.print_config:
        print(config.describe(settings))
        return 0
    from jaxllm.train.loop import train

    result = train(settings, quiet=args.quiet)
    print(f"{result.status} at step {result.summary['steps']}: {result.folder}")
    for key in ("loss", "heldout_loss", "bits_per_byte"):
        if key in result.summary:
            value = result.summary[key]  # null where it is not finite
            print(key, "not finite" if value is None else f"{value:.4f}")
    if result.status == "preempted":
        print("the same command goes on from there")
    return _exit_code(result)


def _exit_code(result) -> int:
    """1 when the last checkpoint was not saved; what the settings say after SIGTERM; else 0."""
    if not result.saved:
        print("the last checkpoint was not saved (see above)", file=sys.stderr)
        return 1
    return result.config.checkpoint.preempted_exit_code if result.status == "preempted" else 0


def _tokenizer(verbs):
    verbs = _verb(verbs, "tokenizer", "train a tokenizer, or use one").add_subparsers(metavar="VERB", required=True)
    verb = _verb(
        verbs, "train", "train a SentencePiece BPE tokenizer on text files", tokenizer_train, "tokenizer train"
    )
    verb.add_argument("files", nargs="+", help="files or globs; python-stdlib for the standard library")
    verb.add_argument("--vocab", type=int, default=4096, help="number of pieces (default 4096)")
    verb.add_argument("--field", default="text", help="key or column of the text in .jsonl and parquet (default text)")
    verb.add_argument("--out", required=True, help="folder to write tokenizer.model and the chat template into")
    verb = _verb(verbs, "encode", "token ids of a text", tokenizer_encode, "tokenizer encode")
    verb.add_argument("tokenizer", help="run folder, tokenizer folder or .model file")
    verb.add_argument("text", help="the text; - reads standard input")
    verb.add_argument("--pieces", action="store_true", help="show the pieces too")
    verb = _verb(verbs, "decode", "the text of token ids", tokenizer_decode, "tokenizer decode")
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

    inside = Path(path) / "tokenizer"
    return Tokenizer.load(inside if inside.is_dir() else path)


def tokenizer_encode(args) -> None:
    tokenizer = _open_tokenizer(args.tokenizer)
    text = _standard_input() if args.text == "-" else args.text
    ids = tokenizer.encode(text).tolist()
    print(" ".join(map(str, ids)))
    if args.pieces:
        print(" ".join(repr(tokenizer.piece(i)) for i in ids))


def _standard_input() -> str:
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 at byte {error.start}") from None


def tokenizer_decode(args) -> None:
    print(_open_tokenizer(args.tokenizer).decode(args.ids))


def _data(verbs):
    verbs = _verb(verbs, "data", "tokenise text, or look at it").add_subparsers(metavar="VERB", required=True)
    for name, help, run in (
        ("prepare", "tokenise the sources of a settings file into token stores", data_prepare),
        ("inspect", "show documents and packed rows of a settings file's sources", data_inspect),
    ):
        verb = _verb(verbs, name, help, run, f"data {name}")
        verb.add_argument("config", metavar="RUN.yaml", help="settings file, or the name of a shipped one")
        verb.add_argument(
            "overrides", nargs="*", metavar="section.key=value", help="settings that differ from the file"
        )
        if name == "inspect":
            verb.add_argument("--rows", type=int, default=2, help="documents and rows to show (default 2)")


def _prepared(args):
    from jaxllm.data.prepare import prepare
    from jaxllm.train.config import load_run
    from jaxllm.train.folder import RunFolder

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
    from jaxllm.data.inspect import inspect

    settings, tokenizer, stores = _prepared(args)
    shown = dict(length=settings.train.seq_len, pack=settings.data.pack)
    print("\n\n".join(inspect(store, tokenizer, args.rows, **shown) for store in stores.values()))


def _eval(verbs):
    help = "perplexity and bits per byte of a model on text, or its answers to the questions of task files"
    verb = _verb(verbs, "eval", help, evaluate, launch=logging.DEBUG)
    verb.add_argument("model", metavar="MODEL", help="run folder, one of its steps, or a published model")
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--data",
        nargs="+",
        action="append",
        metavar="[NAME=]FILE",
        help="text, .jsonl, .gz, .zst or parquet; globs; given again: another source, reported by itself too",
    )
    what.add_argument("--tasks", nargs="+", metavar="FILE", help=".jsonl files of questions (docs/evaluation.md)")
    text, questions = verb.add_argument_group("of --data"), verb.add_argument_group("of --tasks")
    text.add_argument("--field", help="key or column of the text (default text)")
    text.add_argument("--seq-len", type=int, help="tokens that a prediction can see (default: the model's context)")
    questions.add_argument("--shots", type=int, help="examples before each question (default 0)")
    questions.add_argument("--shots-from", metavar="FILE", help="take the examples from here, not the file itself")
    questions.add_argument("--seed", type=int, help="shuffle the examples (default: the first ones)")
    verb.add_argument("--batch", type=int, default=8, help="rows at a time (default 8)")
    verb.add_argument("--ema", action="store_true", help="use the averaged weights")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")
    _published(verb)


def evaluate(args) -> None:
    text, questions = _given(args, ("field", "seq_len")), _given(args, ("shots", "shots_from", "seed"))
    _refuse_ignored(*(("--tasks asks questions", text) if args.tasks else ("--data measures text", questions)))
    from jaxllm import api

    sources = None if args.tasks else _sources(args)
    loaded = api.load(args.model, ema=args.ema, ignore_keys=args.ignore_key)
    if args.tasks:
        found = api.evaluate_tasks(loaded, args.tasks, batch=args.batch, **questions)
    else:
        found = api.evaluate(loaded, sources, seq_len=args.seq_len, batch=args.batch)
    if args.json:
        print(json.dumps(found))
    elif args.tasks:
        print("\n".join(_answers(path, metrics) for path, metrics in found.items()))
    else:
        print(_measures(found))


def _sources(args) -> list:
    """A source for each --data, by its NAME= or else by its first file's name; a single one needs none."""
    import re

    from jaxllm.data.sources import Source

    sources = []
    for first, *rest in args.data:
        name, _, path = first.partition("=") if re.match(r"[\w.-]+=", first) else ("", "", first)
        if not name and len(args.data) > 1:
            name = re.sub(r"[^\w.-]+", "-", os.path.splitext(os.path.basename(path.rstrip("/")))[0]).strip("-.")
        sources.append(Source(name=name or "eval", path=(path, *rest), field=args.field or "text"))
    names = [source.name for source in sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two sources would be called {twice[0]}; name them: --data NAME=FILE")
    return sources


def _measures(found: dict) -> str:
    """A line for each measure, and a column for each source where there are several."""
    sources = ["", *("/" + key.partition("/")[2] for key in found if key.startswith("documents/"))]
    lines = [" " * 14 + "".join(f" {name[1:] or 'all':>14}" for name in sources)] if sources[1:] else []
    for key in (key for key in found if "/" not in key):
        values = [found[key + name] for name in sources]
        texts = [f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" for value in values]
        lines.append(f"{key:<14}" + "".join(f" {text:>14}" if sources[1:] else f" {text}" for text in texts))
    return "\n".join(lines)


def _answers(path: str, metrics: dict) -> str:
    """A heading, and a line for each metric with its standard error."""
    lines = [f"{path}: {metrics['kind'].replace('_', ' ')}, {metrics['items']:,} items, {metrics['shots']}-shot"]
    for name in (name for name in metrics if f"{name}_stderr" in metrics):
        error = metrics[f"{name}_stderr"]
        lines.append(f"  {name:<14} {metrics[name]:.4f}" + (f" ± {error:.4f}" if error is not None else ""))
    return "\n".join(lines)


def _generate(verbs):
    verb = _verb(verbs, "generate", "continue a prompt, streamed as text", generate, launch=logging.DEBUG)
    verb.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder, one of its steps, or a published model")
    verb.add_argument("--prompt", required=True, help="text to continue; - reads standard input")
    verb.add_argument("--max-tokens", type=int, default=128, help="most tokens to make (default 128)")
    verb.add_argument("--min-tokens", type=int, default=0, help="do not end before so many (default 0)")
    verb.add_argument("--n", type=int, default=1, help="so many continuations (default 1)")
    verb.add_argument("--logprobs", type=int, metavar="N", help="show each token's log-probability and the N likeliest")
    verb.add_argument("--beams", type=int, help="beam search with so many beams, in place of sampling")
    verb.add_argument("--length-penalty", type=float, help="of beams: score / length ** this (default 1)")
    verb.add_argument("--ema", action="store_true", help="use the averaged weights")
    _sampling(verb)
    _published(verb)


def _sampling(verb) -> None:
    options = verb.add_argument_group("sampling")
    for name, (kind, help) in SAMPLING.items():
        options.add_argument("--" + name.replace("_", "-"), type=kind, help=help)
    options.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given again")


#: Options that both `generate` and `chat` have.
SAMPLING = {
    "temperature": (float, "0 is greedy (default 0.8)"),
    "top_k": (int, "keep this many of the likeliest tokens"),
    "top_p": (float, "keep the likeliest tokens up to this probability"),
    "min_p": (float, "keep tokens of this share of the largest probability"),
    "typical_p": (float, "keep tokens of typical surprise up to this probability"),
    "repetition_penalty": (float, "above 1: tokens of the text so far become less likely"),
    "frequency_penalty": (float, "subtracted from a token's logit for each time that it was made"),
    "presence_penalty": (float, "subtracted from the logits of tokens that were made"),
    "seed": (int, "the same seed gives the same text"),
}
#: What a greedy choice does not look at.
DRAWS = ("top_k", "top_p", "min_p", "typical_p", "seed")


def _given(args, names) -> dict:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _refuse_ignored(why: str, names) -> None:
    if names:
        flags = ", ".join("--" + name.replace("_", "-") for name in names)
        raise UserError(f"{why} and would ignore {flags}; leave that out")


def _sampling_options(args) -> dict:
    options = {"temperature": 0.8} | _given(args, (*SAMPLING, "stop"))
    if options["temperature"] == 0:
        _refuse_ignored("--temperature 0 is greedy", [name for name in DRAWS if name in options])
    return options


def generate(args) -> None:
    lengths = _given(args, ("max_tokens", "min_tokens"))
    if args.beams is None:
        options = _sampling_options(args) | lengths
        _refuse_ignored("without --beams this samples", _given(args, ["length_penalty"]))
    else:
        _refuse_ignored("--beams searches", _given(args, (*SAMPLING, "stop", "logprobs")))
        options = _given(args, ("beams", "length_penalty")) | lengths
    prompt = _standard_input() if args.prompt == "-" else args.prompt
    from jaxllm import api

    loaded = api.load(args.checkpoint, ema=args.ema, ignore_keys=args.ignore_key).for_decoding()
    if args.beams is None and args.n == 1 and args.logprobs is None:
        pieces = api.stream(loaded, prompt, **options)
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return
    tops = {} if args.logprobs is None else {"top_logprobs": args.logprobs}
    for i, made in enumerate(api.generate(loaded, prompt, n=args.n, **tops, **options), 1):
        print(f"--- {i} of {args.n}\n" * (args.n > 1) + prompt + made.text)
        if args.logprobs is not None:
            print(_logprobs(loaded.tokenizer, made))


def _logprobs(tokenizer, made) -> str:
    """A line for each token: its log-probability, its id and piece, and the likeliest in its place."""
    lines = ["", f"{'logprob':>8}  token"]
    for i, logprob, top in zip(made.ids, made.logprobs, made.top or [[]] * len(made.ids), strict=True):
        others = "  ".join(f"{tokenizer.piece(j)!r} {value:.3f}" for j, value in top)
        lines.append(f"{logprob:8.3f}  {i:>6} {tokenizer.piece(i)!r:<16} {others}".rstrip())
    return "\n".join(lines)


def _chat(verbs):
    verb = _verb(verbs, "chat", "talk with a model in the terminal", chat, launch=logging.DEBUG)
    verb.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder, one of its steps, or a published model")
    verb.add_argument("--system", metavar="TEXT", help="system message")
    verb.add_argument("--max-tokens", type=int, help="most tokens of an answer (default: a quarter of the context)")
    verb.add_argument("--ema", action="store_true", help="use the averaged weights")
    _sampling(verb)
    _published(verb)


def chat(args) -> None:
    import secrets

    options = _sampling_options(args)
    if options["temperature"] > 0:
        options = {"seed": secrets.randbits(32)} | options
    from jaxllm import api
    from jaxllm.chat import Chat, run

    loaded = api.load(args.checkpoint, ema=args.ema, ignore_keys=args.ignore_key).for_decoding()
    parts = (loaded.model, loaded.decoding, loaded.tokenizer)
    run(Chat(*parts, system=args.system, max_tokens=args.max_tokens, **options))


def _runs(verbs):
    verbs = _verb(verbs, "runs", "look at run folders").add_subparsers(metavar="VERB", required=True)
    verb = _verb(verbs, "list", "a table of runs", runs_list, "runs list")
    verb.add_argument("folder", nargs="?", default="runs", help="folder of run folders (default runs)")
    verb = _verb(verbs, "compare", "settings that differ, and results side by side", runs_compare, "runs compare")
    verb.add_argument("folders", nargs="+", help="run folders")


def runs_list(args) -> None:
    from pathlib import Path

    from jaxllm.train.runs import list_runs

    print(list_runs(Path(args.folder)))


def runs_compare(args) -> None:
    from pathlib import Path

    from jaxllm.train.runs import compare_runs

    print(compare_runs(*map(Path, args.folders)))


def _demo(verbs):
    help = "train a small model on Python's standard library, from text to samples, in about five minutes"
    verb = _verb(verbs, "demo", help, demo, launch=logging.INFO)
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from the demo's")
    verb.add_argument("--moe", action="store_true", help="with a mixture of experts")
    verb.add_argument("--minutes", type=float, default=5.0, help="about how long, in all (default 5)")
    verb.add_argument("--out", help="run folder (default runs/demo, or the next free runs/demo-N)")


def demo(args) -> int:
    from jaxllm.demo import demo

    return _exit_code(demo(moe=args.moe, minutes=args.minutes, out=args.out, overrides=args.overrides))


def _bench(verbs):
    verbs = _verb(verbs, "bench", "measure speed").add_subparsers(metavar="VERB", required=True)
    verb = _verb(verbs, "train", "tokens/s, memory and compile time of real training steps", bench_train, "bench train")
    verb.set_defaults(launch=logging.INFO)
    verb.add_argument("--workloads", nargs="+", default=["W1", "W2", "W3"], help="default: W1 W2 W3")
    verb.add_argument("--steps", type=int, help="timed steps (default: as the workload says)")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")

    verb = _verb(verbs, "generate", "tokens/s of prefill and of decoding", bench_generate, "bench generate")
    verb.set_defaults(launch=True)
    verb.add_argument("model", metavar="MODEL", help="run folder, Hugging Face folder or .gguf file")
    verb.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="rows at a time (default: 1 8)")
    verb.add_argument("--dtype", default="float32", help="of a published model's weights (default float32)")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")


def bench_generate(args) -> None:
    from jaxllm.bench_generate import bench_generate

    bench_generate(args.model, batches=args.batches, dtype=args.dtype, json=args.json)


def bench_train(args) -> None:
    from jaxllm.bench import bench_train

    bench_train(args.workloads, steps=args.steps, json=args.json)


def _published(verb) -> None:
    verb.add_argument(
        "--ignore-key",
        action="append",
        default=[],
        metavar="KEY",
        help="a key of config.json that is not understood and, on your word, changes nothing",
    )


def _info(verbs):
    verb = _verb(verbs, "info", "what a model is and how much room it takes; loads no weights", info)
    verb.add_argument("model", metavar="MODEL", help="run folder, Hugging Face folder or .gguf file")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")
    _published(verb)


def info(args) -> None:
    from jaxllm import info

    found = info.info(args.model, ignore_keys=tuple(args.ignore_key))
    print(json.dumps(found) if args.json else info.show(found))


def _export(verbs):
    verb = _verb(verbs, "export", "write a model for other software: a Hugging Face folder or a .gguf file", export)
    verb.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder, one of its steps, or a published model")
    verb.add_argument("--to", choices=("hf", "gguf"), default="hf", help="default hf")
    verb.add_argument("--out", required=True, help="folder (hf) or file (gguf) to write; must not exist")
    verb.add_argument(
        "--dtype", default="float32", help="float32 (default), bfloat16, float16; for gguf f32, f16, bf16 or q8_0"
    )
    verb.add_argument("--ema", action="store_true", help="write the averaged weights")
    _published(verb)


def export(args) -> None:
    from jaxllm import api

    loaded = api.load(args.checkpoint, ema=args.ema, ignore_keys=args.ignore_key)
    family = api.export(loaded, args.out, to=args.to, dtype=args.dtype)
    print(f"{args.out}: a {family} model in {args.dtype}")


def _parity(verbs):
    verb = _verb(verbs, "parity", "prove that a loaded model computes what the published one does", parity)
    verb.add_argument("model", nargs="?", metavar="MODEL_DIR", help="Hugging Face folder or .gguf file")
    verb.add_argument("--family", help="instead of a folder: a small random model of this family, or of all")
    verb.add_argument("--text", metavar="FILE", help="UTF-8 text to compare on (default: a few lines of several kinds)")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")
    _published(verb)


def parity(args) -> int:
    if (args.model is None) == (args.family is None):
        raise UserError("give either a model folder or --family NAME (all for every family)")
    if args.family and (args.text or args.ignore_key):
        raise UserError("--family compares random models: --text and --ignore-key would be ignored; leave them out")
    from jaxllm.parity import prove

    reports = []
    for report in _reports(args, prove):
        reports.append(report)
        if not args.json:
            print(prove.show(report), flush=True)
    if args.json:
        print(prove.as_json(reports))
    failed = [report.name for report in reports if not report.holds]
    print(f"parity fails: {', '.join(failed)}" if failed else f"parity holds: {len(reports)}", file=sys.stderr)
    return 1 if failed else 0


def _reports(args, prove):
    if args.family:
        yield from (prove.prove_family(name) for name in prove.variants(args.family))
        return
    text = None
    if args.text:
        try:
            with open(args.text, encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {args.text}: {error}") from None
    yield prove.prove(args.model, text=text, ignore_keys=tuple(args.ignore_key))


if __name__ == "__main__":
    sys.exit(main())
