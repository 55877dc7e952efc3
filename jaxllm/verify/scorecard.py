"""The rows of the scorecard, and running them.

A row is a property with a check. A check gets a `Lab` (a scratch folder, a seed, a tier) and says how many cases it
tried and which of them failed. What a check must notice is planted by its test in `tests/verify`.
"""

import dataclasses
import datetime
import multiprocessing
import platform
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from jaxllm.errors import SettingsError
from jaxllm.verify.lab import Found, Lab


@dataclasses.dataclass(frozen=True)
class Row:
    """One property of the scorecard."""

    number: int
    name: str
    promise: str
    """What has to be so, in a sentence."""
    check: str
    """`module:function` in this package; loaded when the row is run."""
    limits: str = ""
    """What it cannot show on one machine."""
    alone: bool = False
    """It goes by the clock, so that no other row may run beside it."""
    own: bool = False
    """It is tried on the user's own run, where one is given; the other rows choose model and data for their purpose."""

    def load(self) -> Callable[[Lab], Found]:
        import importlib

        module, _, function = self.check.partition(":")
        return getattr(importlib.import_module(f"jaxllm.verify.{module}"), function)


ROWS: tuple[Row, ...] = (
    Row(
        1,
        "kill -9",
        "A run that is killed at random instants, most of them during a save, and started again each time, ends with "
        "the losses and gradient norms of an uninterrupted one, to the last bit, and leaves nothing behind.",
        "kills:killed",
        "A machine that loses power may also lose what its kernel had not yet written. The manifest is synced, and a "
        "damaged step is noticed (row 5).",
        own=True,
    ),
    Row(
        2,
        "exit inside a save",
        "A process that ends at any line of the code that saves and deletes leaves a folder that opens at its last "
        "commit, with nothing left behind.",
        "crash:exits",
        "What happens within a line, such as half a write: row 1 kills there. One process writes, not several.",
    ),
    Row(
        3,
        "SIGTERM",
        "A run that is told to stop finishes its step, saves it and ends; in its first compilation it ends at once, "
        "with nothing new to save; a second signal ends it at once. It goes on to the same bits.",
        "signals:stopped",
        "The preemption of a real pod, which tells all of its hosts.",
        alone=True,
        own=True,
    ),
    Row(
        4,
        "full disk",
        "A save that finds no space leaves older steps whole and nothing behind, says need, have and path in a line, "
        "and costs no step of training; the next one works once there is space. No exit code 0 if the last one failed.",
        "disk:full",
        "A limit on the size of files stands in for the disk. Object stores are not tried.",
        alone=True,
        own=True,
    ),
    Row(
        5,
        "damaged checkpoints",
        "Each file of the newest step truncated, emptied, deleted or with a flipped bit: noticed, said in one line, "
        "and the step before taken.",
        "damage:damaged",
        "A checkpoint of two arrays, written by one process. What memory had already changed when it was saved.",
    ),
    Row(
        6,
        "no silent new start",
        "A run whose checkpoints are damaged or gone, or whose settings differ, is refused and never trained from "
        "scratch unasked.",
        "damage:refused",
        "A run folder that is gone as a whole, which is a new run.",
        own=True,
    ),
    Row(
        7,
        "other devices",
        "A checkpoint opens on other devices, meshes and numbers of processes with the same bits of weights and "
        "optimizer, and the next loss is the same within 1e-6.",
        "meshes:moved",
        "Devices of a CPU stand in for accelerators, and two processes for the hosts of a pod.",
    ),
    Row(
        8,
        "place in the data",
        "A stream cut anywhere goes on with the same global tokens, whoever reads it.",
        "stream:position",
        "Files in object stores; parquet and dataset folders where the extra for data is not installed.",
        own=True,
    ),
    Row(
        9,
        "NaN, Inf and spikes",
        "A step whose gradient is not finite, or with train.skip_spikes far above those before, leaves weights, "
        "optimizer and averages as they were, to the bit, and is counted; after train.max_skipped in a row the run "
        "ends and names the documents that it read last.",
        "nonfinite:nonfinite",
        "A fault that changes numbers and leaves them finite and small.",
    ),
    Row(
        10,
        "bad data",
        "Text, records, conversations, compressed files and tables with something wrong in them are refused with the "
        "file, the line and the byte, or are read by a stated policy, and what it left out or kept is counted in the "
        "log; memory stays bounded, also by lines without an end and decompression bombs.",
        "baddata:bad_data",
        "The rows that an arrow file's own writer put into one batch are read together, however many. Kinds of tables "
        "and of zstandard are left out where the extra for data is not installed.",
    ),
    Row(
        11,
        "typos in settings",
        "Settings with one wrong letter are refused, and the one that was meant is named.",
        "typos:typos",
        "Names of the user's own choice, such as those in weights; values.",
    ),
    Row(
        12,
        "memory",
        "What a step is said to need is within 15 % of what its compiled program needs; what cannot fit is refused, "
        "with settings that make it fit and what each saves.",
        "memory:estimated",
        "Large models: these have ten layers of width 128. Programs of accelerators: those of TPUs are compiled by "
        "tests and plans, those of GPUs by nobody here.",
    ),
    Row(
        13,
        "damaged published files",
        "Published weights, settings, tokenizers and adapters with damage in them give an error of ours or a model: no "
        "crash, nothing over two seconds, no allocation of more than twice the file.",
        "files:mutated",
        "Damage is random, and seeds are small files: 8 MiB are allowed beside twice the file. Memory is counted where "
        "Python and numpy take it. GGUF is left out where its extra is not installed.",
        alone=True,
    ),
    Row(
        14,
        "no code from files",
        "Nothing that a file holds is run as code, and no path in a file leads out of its folder.",
        "code:no_code",
        "The packages that jaxllm stands on are not searched.",
    ),
    Row(
        15,
        "self-check before step 0",
        "Every run looks at its first batch: what packing, causality, masks, frozen weights and the losses should be, "
        "they are, for each objective; and each fault planted stops the run with a line that names it.",
        "selfcheck:planted",
        "Rows are cut to 128 tokens on CPU and 256 elsewhere, for each device that shares them. What is to be frozen "
        "is taken from where the run takes it, so that settings that are misread are not noticed.",
    ),
    Row(
        16,
        "determinism",
        "A run's losses come again bit for bit and are those that were recorded; a step is the same in microbatches "
        "and on other devices: the loss within 1e-6, relative, each array's gradient within 1e-5 of its largest entry.",
        "golden:determinism",
        "CPU in float32. Accelerators add in other orders.",
    ),
    Row(
        17,
        "loss of a process",
        "Where one of two processes of a run is killed, the other says so in a line and ends within a minute; started "
        "again, both go on to the same bits.",
        "pods:lost",
        "Two processes on one machine stand in for the hosts of a pod. A machine whose network is cut is noticed by "
        "the kernel's keepalive, after 30 seconds.",
    ),
    Row(
        18,
        "soak",
        "2,000 steps with 100 saves: the memory of the process grows by less than 2 % after the first 200, and it "
        "collects neither threads nor open files.",
        "soak:soak",
        "Without huge pages, in which memory is counted by 2 MiB, and with two arenas of the allocator, as runs on CPU "
        "have it. Hours of training on an accelerator, whose runtime has memory of its own.",
    ),
)


def chosen(numbers: Sequence[int]) -> list[Row]:
    """The rows of these numbers, all by default. Raises SettingsError for a number that is none."""
    known = {row.number: row for row in ROWS}
    if unknown := [number for number in numbers if number not in known]:
        raise SettingsError(f"no such row: {unknown[0]}; known: {named()}")
    return [known[number] for number in numbers] if numbers else list(ROWS)


def named() -> str:
    """`1 kill -9, 2 ...`"""
    return ", ".join(f"{row.number} {row.name}" for row in ROWS)


def run(rows: Sequence[Row], lab: Lab, *, jobs: int = 1, keep: Callable[[dict], None] = lambda found: None) -> dict:
    """Runs the rows, shows each as it ends, and gives what `--json` holds.

    jobs: rows at a time, each in a process of its own where there are several. keep: gets what was found so far after
    each row, so that hours of checks are not lost with the last one. A check that raises is a row that failed: its
    error is the failure.
    """
    found: dict[int, dict[str, Any]] = {}

    def whole() -> dict[str, Any]:
        tried = {"tier": "long" if lab.long else "quick", "seed": lab.seed, "run": lab.run_file}
        return {"rows": [found[n] for n in sorted(found)]} | tried

    def take(result: dict[str, Any]) -> None:
        found[result["row"]] = result
        lab.say(line(result))
        keep(whole() | facts())

    beside = [row for row in rows if not row.alone] if jobs > 1 else []
    if beside:
        lab.corpus()  # which they share
        lab.say(f"rows {', '.join(str(row.number) for row in beside)}: {jobs} at a time ...")
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
            quiet = dataclasses.replace(lab, say=_nothing)
            running = [pool.submit(run_one, row, quiet) for row in reversed(beside)]  # the last ones take longest
            for ended in as_completed(running):
                take(ended.result())
    for row in rows:
        if row not in beside:
            lab.say(f"{row.number:2}  {row.name} ...")
            take(run_one(row, lab))
    return whole() | facts()


def run_one(row: Row, lab: Lab) -> dict[str, Any]:
    """What is found of one row."""
    started = time.monotonic()
    with lab.row(row.number) as own:
        try:
            result = row.load()(own if row.own else dataclasses.replace(own, run_file=None))
        except Exception as error:  # one row that breaks down must not hide the others
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"
            result = Found(0, (text,), "the check broke down")
    found = {"row": row.number, "name": row.name, "passed": result.passed, "cases": result.cases, "date": _today()}
    seconds = round(time.monotonic() - started, 1)
    return found | {"seconds": seconds, "figure": result.figure, "failures": list(result.failures[:20])}


def _nothing(text: str) -> None:
    pass


def _today() -> str:
    return datetime.date.today().isoformat()


def facts() -> dict[str, Any]:
    """When and with what."""
    from jaxllm.train.report import versions

    return {
        "date": _today(),
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table on the screen."""
    text = (
        f"{row['row']:2}  {'ok  ' if row['passed'] else 'FAIL'} {row['name']:28} {row['figure']}  ({row['seconds']} s)"
    )
    return "\n".join([text, *(f"      {failure}" for failure in row["failures"][:5])])
