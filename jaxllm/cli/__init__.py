"""The command line: one verb for each thing a user wants done. Loads jax only once a verb needs it."""

import argparse
import errno
import gzip
import logging
import os
import sys

from jaxllm.cli.adapters import add_merge
from jaxllm.cli.bench import add_bench
from jaxllm.cli.common import EXAMPLES, common_options
from jaxllm.cli.compress import add_quantize
from jaxllm.cli.data import add_data, add_tokenizer
from jaxllm.cli.generation import add_chat, add_generate
from jaxllm.cli.models import add_eval, add_export, add_info, add_parity
from jaxllm.cli.plan import add_plan
from jaxllm.cli.prune import add_prune
from jaxllm.cli.training import add_demo, add_distill, add_dpo, add_runs, add_sft, add_train
from jaxllm.cli.verify import add_verify
from jaxllm.errors import UserError

__all__ = ["EXAMPLES", "main", "parse", "parser"]

#: Errors of the system that come again until the user mends something: a wrong name, rights, a damaged file.
LASTING = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError, gzip.BadGzipFile)
LASTING_CODES = (errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)


def main(argv: list[str] | None = None) -> int:
    """Runs a verb; returns the exit code: 0, 2 for what only the user can mend, 1 for what may pass or is a bug."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Programs compiled once are found again by the next run.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jaxllm/xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("jaxllm").setLevel(logging.DEBUG if args.debug else logging.INFO)
    if (level := getattr(args, "launch", None)) and not getattr(args, "print_config", False):
        from jaxllm.launch import relaunch

        relaunch(argv, level, getattr(args, "cpu_fast", False))
    try:
        return args.run(args) or 0
    except UserError as error:
        return _fail(args, error, f"error: {error}", 1 if may_pass(error) else 2)
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


def may_pass(error: BaseException) -> bool:
    """Whether the same command may work later: a read from a bucket failed, a lock is held, a disk is full.

    So it is where an error of the system is behind a UserError (`from None` keeps it as the context), other than
    LASTING. Without a number (those of gcsfs and pyarrow) it counts for remote paths only: locally it is the file.
    """
    behind = error.__context__
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__context__
    if behind is None or isinstance(behind, LASTING):
        return False
    return "://" in str(error) if behind.errno is None else behind.errno not in LASTING_CODES


def _fail(args, error: Exception, text: str, code: int) -> int:
    if args.debug:
        raise error
    print(text, file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    top = argparse.ArgumentParser(prog="jaxllm", description="Train, evaluate and run decoder language models in JAX.")
    top.add_argument("--version", action="version", version=_version())
    common_options(top, default=False)
    verbs = top.add_subparsers(metavar="VERB", required=True)
    add_train(verbs)
    add_sft(verbs)
    add_dpo(verbs)
    add_distill(verbs)
    add_tokenizer(verbs)
    add_data(verbs)
    add_eval(verbs)
    add_generate(verbs)
    add_chat(verbs)
    add_runs(verbs)
    add_demo(verbs)
    add_bench(verbs)
    add_info(verbs)
    add_plan(verbs)
    add_export(verbs)
    add_quantize(verbs)
    add_prune(verbs)
    add_merge(verbs)
    add_parity(verbs)
    add_verify(verbs)
    return top


def _version() -> str:
    from jaxllm import __version__

    return f"jaxllm {__version__}"
