"""Verbs that look at a model or write it: eval, info, export, parity."""

import json
import logging
import os
import re
import sys

from jaxllm.cli.common import given, new_verb, published_options, refuse_ignored
from jaxllm.errors import UserError


def add_eval(verbs):
    help = "perplexity and bits per byte of a model on text, or its answers to the questions of task files"
    verb = new_verb(verbs, "eval", help, evaluate, launch=logging.DEBUG)
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
    text.add_argument(
        "--seq-len",
        type=int,
        help="tokens that a prediction can see (default: the longest document's)",
    )
    questions.add_argument("--shots", type=int, help="examples before each question (default 0)")
    questions.add_argument("--shots-from", metavar="FILE", help="take the examples from here, not the file itself")
    questions.add_argument("--seed", type=int, help="shuffle the examples (default: the first ones)")
    verb.add_argument("--batch", type=int, help="rows at a time (default 8, or fewer long ones)")
    verb.add_argument("--ema", action="store_true", help="use the averaged weights")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")
    published_options(verb)


def evaluate(args) -> None:
    text, questions = given(args, ("field", "seq_len")), given(args, ("shots", "shots_from", "seed"))
    refuse_ignored(*(("--tasks asks questions", text) if args.tasks else ("--data measures text", questions)))
    from jaxllm import api

    sources = None if args.tasks else _sources(args)
    loaded = api.load(args.model, ema=args.ema, ignore_keys=args.ignore_key)
    if args.tasks:
        found = api.evaluate_tasks(loaded, args.tasks, batch=args.batch or 8, **questions)
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


def add_info(verbs):
    verb = new_verb(verbs, "info", "what a model is and how much room it takes; loads no weights", info)
    verb.add_argument("model", metavar="MODEL", help="run folder, Hugging Face folder or .gguf file")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")
    published_options(verb)


def info(args) -> None:
    from jaxllm import info

    found = info.info(args.model, ignore_keys=tuple(args.ignore_key))
    print(json.dumps(found) if args.json else info.show(found))


def add_export(verbs):
    verb = new_verb(verbs, "export", "write a model, or its adapter, for other software", export)
    verb.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder, one of its steps, or a published model")
    verb.add_argument(
        "--to", choices=("hf", "gguf", "peft"), default="hf", help="default hf; peft writes the adapter alone"
    )
    verb.add_argument("--out", required=True, help="folder (hf, peft) or file (gguf) to write; must not exist")
    verb.add_argument(
        "--dtype", default="float32", help="float32 (default), bfloat16, float16; for gguf f32, f16, bf16, q8_0, q4_0"
    )
    verb.add_argument("--ema", action="store_true", help="write the averaged weights")
    published_options(verb)


def export(args) -> None:
    from jaxllm import api

    loaded = api.load(args.checkpoint, ema=args.ema, ignore_keys=args.ignore_key)
    family = api.export(loaded, args.out, to=args.to, dtype=args.dtype)
    kept = " and the codes that it has" * any(change.quantize or change.store for change in loaded.changes)
    print(f"{args.out}: {'an adapter of ' * (args.to == 'peft')}a {family} model in {args.dtype}{kept}")


def add_parity(verbs):
    verb = new_verb(verbs, "parity", "prove that a loaded model computes what the published one does", parity)
    verb.add_argument("model", nargs="?", metavar="MODEL_DIR", help="Hugging Face folder or .gguf file")
    verb.add_argument("--family", help="instead of a folder: a small random model of this family, or of all")
    verb.add_argument(
        "--text",
        metavar="FILE",
        help="UTF-8 text: its first 512 tokens are compared, and our perplexity is of all (default: a few lines)",
    )
    verb.add_argument("--json", action="store_true", help="print the result as JSON")
    published_options(verb)


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
    if failed:
        print(f"parity fails: {', '.join(failed)}", file=sys.stderr)
        return 1
    print(f"parity holds: {reports[0].name if len(reports) == 1 else f'{len(reports)} models'}", file=sys.stderr)
    return 0


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
