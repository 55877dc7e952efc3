"""The verb that runs the reliability scorecard."""

import functools
import json
import os
import tempfile
import time
from pathlib import Path

from jaxllm.cli.common import new_verb
from jaxllm.errors import SettingsError


def add_verify(verbs):
    verb = new_verb(verbs, "verify", "whether runs on this machine lose nothing: the reliability scorecard", verify)
    verb.add_argument("rows", nargs="*", type=int, metavar="ROW", help="numbers of the rows to run (default: all)")
    verb.add_argument("--list", action="store_true", help="say what the rows are, and run none")
    verb.add_argument("--long", action="store_true", help="many more cases: hours instead of minutes")
    verb.add_argument("--seed", type=int, default=0, help="of the instants, cuts and faults (default 0)")
    verb.add_argument(
        "--run",
        dest="run_file",
        metavar="RUN.yaml",
        help="your own run for rows 1, 3, 4 and 6, and its text in row 8",
    )
    verb.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="rows at a time (2); those that go by the clock run alone"
    )
    verb.add_argument("--json", metavar="FILE", help="write what was found")
    verb.add_argument("--resume", action="store_true", help="keep what --json FILE has of other rows than those named")
    verb.add_argument("--page", metavar="FILE.md", help="write it as a page")


def verify(args) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # where all of its runs are, in this process too
    from jaxllm.verify.lab import Lab, little_compiling
    from jaxllm.verify.scorecard import chosen, run

    flags = os.environ.get("XLA_FLAGS", "")
    if args.run_file is None and little_compiling() not in flags:  # a user's own run is compiled as it is
        os.environ["XLA_FLAGS"] = f"{little_compiling()} {flags}".strip()
    started, rows = time.monotonic(), chosen(args.rows)
    if args.list:
        print("\n".join(f"{row.number:2}  {row.name:28} {row.promise}" for row in rows))
        return 0
    _check(args)
    before = _before(args) if args.resume else {}
    if not args.rows:
        rows = [row for row in rows if row.number not in before]
    with tempfile.TemporaryDirectory(prefix="jaxllm-verify-") as folder:
        lab = Lab(Path(folder), seed=args.seed, long=args.long, run_file=args.run_file)
        keep = functools.partial(_keep, args, before)
        found = keep(run(rows, lab, jobs=max(1, min(args.jobs, len(rows))), keep=keep))
    passed = sum(row["passed"] for row in found["rows"])
    print(f"{passed} of {len(found['rows'])} rows hold ({time.monotonic() - started:.0f} s)")
    return 0 if passed == len(found["rows"]) else 1


def _check(args) -> None:
    """Says what is wrong with the arguments before hours of checks."""
    from jaxllm.train.load import load_run

    for path in filter(None, (args.json, args.page)):
        if not Path(path).absolute().parent.is_dir():
            raise SettingsError(f"{path}: there is no folder {Path(path).absolute().parent}; make it first")
    if args.run_file is not None:
        load_run(args.run_file)


def _keep(args, before: dict[int, dict], found: dict) -> dict:
    """Writes what was found, with the rows of before that were not tried again; returns it."""
    from jaxllm.verify.page import page

    rows = before | {row["row"]: row for row in found["rows"]}
    found = found | {"rows": [rows[number] for number in sorted(rows)]}
    if args.json:
        partial = Path(f"{args.json}.partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(args.json)  # at once: hours of checks may stand in it
    if args.page:
        Path(args.page).write_text(page(found))
    return found


def _before(args) -> dict[int, dict]:
    """The rows that the file has, by number. Raises SettingsError for those of another tier, seed, run or version."""
    from jaxllm.verify.scorecard import facts

    if not args.json:
        raise SettingsError("--resume needs --json FILE, which has the rows that were found before")
    if not (path := Path(args.json)).exists():
        return {}
    now = facts() | {"tier": "long" if args.long else "quick", "seed": args.seed, "run": args.run_file}
    try:
        before = json.loads(path.read_text())
        rows, was = {row["row"]: row for row in before["rows"]}, {key: before[key] for key in now}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SettingsError(f"{path}: no file of jaxllm verify --json ({error}): move it away to begin anew") from error
    for key in now:
        if key != "date" and was[key] != now[key]:
            raise SettingsError(f"{path}: {key} is {was[key]}, and {now[key]} now: move it away to begin anew")
    return rows
