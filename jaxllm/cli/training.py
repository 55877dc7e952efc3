"""Verbs that train and look at runs: train, sft, dpo, distill, runs, demo."""

import logging
import sys

from jaxllm.cli.common import fast_option, new_verb


def add_train(verbs):
    help = "train a model by a settings file, or go on with a run that was stopped"
    _run_verb(verbs, "train", help, _train)


def _train(read, args):
    return read.load_run(args.config, args.overrides)


def add_sft(verbs):
    help = "fine-tune a model on conversations: supervised fine-tuning on what the assistant says"
    what = "settings file; or a model, which needs --data"
    verb = _run_verb(verbs, "sft", help, _sft, metavar="RUN.yaml|MODEL", what=what)
    verb.add_argument("--data", action="append", metavar="FILE", help="conversations for MODEL (docs/data.md)")


def _sft(read, args):
    return read.load_sft(args.config, args.data, args.overrides)


def add_dpo(verbs):
    help = "teach a model which of two answers is preferred: direct preference optimisation"
    _run_verb(verbs, "dpo", help, _dpo)


def _dpo(read, args):
    return read.load_dpo(args.config, args.overrides)


def add_distill(verbs):
    help = "train a student on text and on what a teacher with the same tokenizer says of it"
    _run_verb(verbs, "distill", help, _distill)


def _distill(read, args):
    return read.load_distill(args.config, args.overrides)


NAMED = "settings file, or the name of a shipped one (configs/runs)"


def _run_verb(verbs, name: str, help: str, load, metavar: str = "RUN.yaml", what: str = NAMED):
    """A verb that trains by a settings file; `load(train.load, args)` reads the settings."""
    verb = new_verb(verbs, name, help, _run, load=load, launch=logging.INFO)
    verb.add_argument("config", metavar=metavar, help=what)
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from the file")
    verb.add_argument("--print-config", action="store_true", help="show all settings, resolved, with their meaning")
    verb.add_argument("--quiet", action="store_true", help="no progress")
    fast_option(verb)
    return verb


def _run(args) -> int:
    from jaxllm import config
    from jaxllm.train import load as read

    settings, scale = args.load(read, args)
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
    for key in ("loss", "heldout_loss", "bits_per_byte", "heldout_accuracy"):
        if key in result.summary:
            value = result.summary[key]  # null where it is not finite
            print(key, "not finite" if value is None else f"{value:.4f}")
    if result.status == "preempted":
        print("the same command goes on from there")
    return _exit_code(result)


def _exit_code(result) -> int:
    """1 when the last checkpoint was not saved; what the settings say after SIGTERM; else 0."""
    if not result.saved:
        again = "mend what is said there, and the same command goes on from the newest one that was"
        print(f"the last checkpoint was not saved (see above): {again}", file=sys.stderr)
        return 1
    return result.config.checkpoint.preempted_exit_code if result.status == "preempted" else 0


def add_runs(verbs):
    verbs = new_verb(verbs, "runs", "look at run folders").add_subparsers(metavar="VERB", required=True)
    verb = new_verb(verbs, "list", "a table of runs", runs_list, "runs list")
    verb.add_argument("folder", nargs="?", default="runs", help="folder of run folders (default runs)")
    verb = new_verb(verbs, "compare", "settings that differ, and results side by side", runs_compare, "runs compare")
    verb.add_argument("folders", nargs="+", help="run folders")


def runs_list(args) -> None:
    from pathlib import Path

    from jaxllm.train.runs import list_runs

    print(list_runs(Path(args.folder)))


def runs_compare(args) -> None:
    from pathlib import Path

    from jaxllm.train.runs import compare_runs

    print(compare_runs(*map(Path, args.folders)))


def add_demo(verbs):
    help = "train a small model on Python's standard library, from text to samples, in about five minutes"
    verb = new_verb(verbs, "demo", help, demo, launch=logging.INFO)
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from the demo's")
    verb.add_argument("--moe", action="store_true", help="with a mixture of experts")
    fast_option(verb)
    verb.add_argument("--minutes", type=float, default=5.0, help="about how long, in all (default 5)")
    verb.add_argument("--out", help="run folder (default runs/demo, or the next free runs/demo-N)")


def demo(args) -> int:
    from jaxllm.demo import demo

    return _exit_code(demo(moe=args.moe, minutes=args.minutes, out=args.out, overrides=args.overrides))
