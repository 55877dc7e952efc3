"""The verb that runs the reliability scorecard."""

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
        help="your own run for rows 1, 3, 4 and 6, not a small one",
    )
    verb.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="rows at a time (2); those that go by the clock run alone"
    )
    verb.add_argument("--json", metavar="FILE", help="write what was found")
    verb.add_argument("--page", metavar="FILE.md", help="write it as a page")


def verify(args) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # where all of its runs are, in this process too
    from jaxllm.verify.lab import Lab, little_compiling

    if args.run_file is None:  # the scorecard's own small runs; a user's run is compiled as it is
        os.environ["XLA_FLAGS"] = f"{little_compiling()} {os.environ.get('XLA_FLAGS', '')}".strip()
    from jaxllm.train.load import load_run
    from jaxllm.verify.page import page
    from jaxllm.verify.scorecard import chosen, run

    started, rows = time.monotonic(), chosen(args.rows)
    if args.list:
        print("\n".join(f"{row.number:2}  {row.name:28} {row.promise}" for row in rows))
        return 0
    for path in filter(None, (args.json, args.page)):
        if not Path(path).absolute().parent.is_dir():
            raise SettingsError(f"{path}: there is no folder {Path(path).absolute().parent}; make it first")
    if args.run_file is not None:
        load_run(args.run_file)  # so that what is wrong with it is said before hours of checks

    def keep(found) -> None:
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
        if args.page:
            Path(args.page).write_text(page(found))

    with tempfile.TemporaryDirectory(prefix="jaxllm-verify-") as folder:
        lab = Lab(Path(folder), seed=args.seed, long=args.long, run_file=args.run_file)
        found = run(rows, lab, jobs=min(args.jobs, len(rows)), keep=keep)
    passed = sum(row["passed"] for row in found["rows"])
    print(f"{passed} of {len(found['rows'])} rows hold ({time.monotonic() - started:.0f} s)")
    return 0 if passed == len(found["rows"]) else 1
