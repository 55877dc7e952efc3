"""The checkpoints of one run: asynchronous saves, retention, and an exact resume.

One folder per step, whose life is readable in this file: orbax writes `<step>/params` and `<step>/rest` in its own
threads, `manifest.seal` makes the step a saved one, `_retain` deletes what is no longer wanted, and a damaged one is
renamed to `<step>.corrupt` when a run resumes. We drive orbax's AsyncCheckpointer and not its CheckpointManager: the
manager deletes, lists and falls through to steps by rules that do not know our manifest, and would have to be told
twice.
"""

import contextlib
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import humanize
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from jaxllm import tree
from jaxllm.checkpoint import arrays, leaks, manifest
from jaxllm.checkpoint.lock import Lock, unwritable
from jaxllm.checkpoint.reader import NEXT, Restored, absolute, newest_whole, numbered, steps_in
from jaxllm.checkpoint.together import first_says
from jaxllm.config import settings
from jaxllm.errors import CheckpointError, ResourceError

log = logging.getLogger("jaxllm")
ASIDE = ".corrupt"
UNFINISHED = ".unfinished"
BARRIER_MS = 1_200_000  # orbax gives a save 20 minutes
REASON = 120  # characters of an error shown, the last ones: tensorstore ends its own with what the system said


@settings
class CheckpointConfig:
    """Saving, and which of the saved steps stay."""

    folder: str | None = None
    """where the steps go, such as gs://bucket/run; null means checkpoints/ in the run folder"""
    every: int = 500
    """steps between two saves"""
    keep: int = 3
    """newest checkpoints to keep"""
    keep_every: int | None = None
    """keep for ever each checkpoint whose step is a multiple of this"""
    keep_best: bool = True
    """keep the checkpoint with the lowest held-out loss too"""
    preempted_exit_code: int = 0
    """exit code after SIGTERM, for schedulers that restart only what failed"""

    def __post_init__(self):
        for name in ("every", "keep", "keep_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


class Checkpoints:
    """The checkpoints in `folder` (local or `gs://`), for the one run that writes there; every process makes one.

    The first save makes the folder; unfinished saves of an earlier process are removed on construction. `failed` says
    why the last save failed, or is None. `on_saved` is called in the first process once a step is saved. Use it as a
    context manager, or `close` it: a save in flight ends there.
    Raises CheckpointError, also on the first save, where another run writes into a local folder.
    """

    def __init__(self, folder, config: CheckpointConfig | None = None, *, on_saved: Callable[[], None] = lambda: None):
        self.folder, self.config, self.on_saved = absolute(folder), config or CheckpointConfig(), on_saved
        self.failed: str | None = None
        leaks.stop()
        self._finishing: threading.Thread | None = None
        self._current: int | None = None  # the step that memory and disk have in common
        self._saves = self._need = 0
        self._broken: set[int] = set()  # steps whose save failed
        self._hook, sys.unraisablehook = sys.unraisablehook, self._quiet
        self._barrier = ocp.multihost.get_barrier_sync_fn()
        # Zstd on float weights takes four times the CPU time to save 8 % of the space.
        handler = ocp.CompositeCheckpointHandler(
            **{name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in (arrays.PARAMS, arrays.REST)}
        )
        # No renaming: a folder is not renamed at once on an object store, and the manifest marks the end of a save.
        atomicity = AtomicityOptions(mode=AtomicityMode.COMMIT_FILE)
        self._lock = Lock(Path(self.folder), "choose another checkpoint.folder") if manifest.is_local(folder) else None
        first_says(self._open)
        self._orbax = ocp.AsyncCheckpointer(handler, atomicity_options=atomicity)
        ocp.multihost.sync_global_processes("jaxllm:checkpoints")
        self._losses = {step: _loss(self.folder / str(step)) for step in self.steps()}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def steps(self) -> list[int]:
        """The saved steps, oldest first."""
        return steps_in(self.folder)

    def best(self) -> int | None:
        """The saved step with the lowest loss, the earlier one of two equals; None when none was given a loss."""
        losses = {step: self._losses.get(step) for step in self.steps()}
        losses = {step: loss for step, loss in losses.items() if loss is not None and not np.isnan(loss)}
        return min(losses, key=lambda step: (losses[step], step), default=None)

    def check_space(self, state) -> None:
        """Raises ResourceError where the disk cannot hold this run's checkpoints of `state` (arrays or shapes)."""
        copies = max(1, self.config.keep + self.config.keep_best + 1 - len(self.steps()))
        check_space(self.folder, copies * tree.nbytes(state), f"{copies} checkpoint{'s' * (copies > 1)}")

    def save(self, step: int, state, meta: dict, *, loss: float | None = None) -> None:
        """Starts to save a step, and returns once the arrays may be overwritten (donated).

        `state`: a tree of jax arrays. `meta`: what JSON can hold: settings, data position, hashes. `loss`: the
        held-out loss, if there is one, for `keep_best`. Waits for the save before it. What goes wrong from here on
        (a full disk) is logged and put in `failed`, its leftovers are removed, and training can go on; the step is
        reported as saved only once it is. Saving again the step just saved or restored does nothing.
        Raises CheckpointError when an older run of this folder has saved that step.
        """
        self.wait()
        if step == self._current:
            return
        if manifest.sealed(self.folder / str(step)):
            raise CheckpointError(f"{self.folder} already has step {step}: use another run folder, or move it away")
        body = manifest.plain({"step": step, "loss": loss, "leaves": arrays.table(state), "meta": meta})
        self.failed, self._saves, self._need = None, self._saves + 1, tree.nbytes(state)
        try:
            first_says(lambda: self._begin(step))
            self._orbax.save(self.folder / str(step), args=arrays.to_save(state), force=True)
        except CheckpointError:  # another run is writing there
            raise
        except Exception as error:  # whatever it is, hours of training are worth more than this save
            self._fail(step, error)
            return
        self._finishing = threading.Thread(target=self._finish, args=(step, body), name=f"seal-{step}")
        self._finishing.start()

    def amend(self, step: int, meta: dict, *, loss: float | None) -> None:
        """Says what is known of a step only now: its held-out loss, and `meta` in the place of what was saved with it.

        The evaluation may so follow the save, and run while that one is written. Returns at once; does nothing for a
        step that was not saved.
        """
        saving, meta = self._finishing, manifest.plain(meta)
        self._finishing = threading.Thread(target=self._amend, args=(saving, step, meta, loss), name=f"amend-{step}")
        self._finishing.start()

    def restore(self, abstract, *, step: int | None = None) -> Restored | None:
        """The newest whole step (or `step`), or None where nothing was ever saved.

        `abstract`: the state as leaves with shape, dtype and sharding; any mesh will do, and parameters are bit-equal
        on all of them. Damaged newer steps are logged and renamed to `<step>.corrupt`, but only once a whole one is
        found. Raises CheckpointError when all are damaged, or when the arrays are not those of `abstract`.
        """
        self.wait()
        if step is None and not self.steps():
            if aside := self._set_aside():
                names = ", ".join(aside)
                raise CheckpointError(f"{self.folder} has only damaged checkpoints ({names}): {NEXT}")
            return None
        step, body, damaged = newest_whole(self.folder, step, items=("",))
        state = arrays.restore(self.folder / str(step), body["leaves"], abstract)
        for number, why in damaged.items():
            name = self._put_aside(number)
            log.warning("%s/%d is damaged (%s): kept as %s, resuming from %d", self.folder, number, why, name, step)
        ocp.multihost.sync_global_processes("jaxllm:restored")
        self._current = step
        return Restored(state, body["meta"], step)

    def wait(self) -> None:
        """Returns when no save is in flight."""
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None

    def close(self) -> None:
        """Waits, and frees orbax's threads and the folder."""
        self.wait()
        self._orbax.close()
        self._sweep()
        if sys.unraisablehook == self._quiet and not self.failed:  # else its last writes are still to end
            sys.unraisablehook = self._hook
        if self._lock is not None:
            self._lock.release()

    def _finish(self, step: int, body: dict) -> None:
        """Runs in a thread of its own: seals the step once orbax has written it, then retention."""
        folder, error = self.folder / str(step), None
        try:
            self._orbax.wait_until_finished()
            if _primary():
                manifest.seal(folder, body)
                self.on_saved()
                self._marker(step).unlink()
                self._losses[step] = body["loss"]
                self._retain()
        except Exception as caught:
            error = caught
        try:
            if jax.process_count() > 1:  # so that after `wait` all processes see the same folders
                self._barrier(key=f"jaxllm:seal:{self._saves}", timeout_ms=BARRIER_MS)
        except Exception as caught:
            error = error or caught
        leaks.give_back()
        if not manifest.sealed(folder):
            self._fail(step, error or RuntimeError("another process could not write its share"))
            return
        self._current, self._losses[step] = step, body["loss"]
        log.info("saved step %d in %s", step, folder)
        if error is not None:
            log.warning("after step %d was saved in %s: %s", step, self.folder, error)

    def _amend(self, saving: threading.Thread | None, step: int, meta: dict, loss: float | None) -> None:
        """Runs in a thread of its own, after the save of that step."""
        if saving is not None:
            saving.join()
        if step != self._current:  # its save failed, which has been said
            return
        self._losses[step] = loss
        if _primary():
            try:
                manifest.amend(self.folder / str(step), meta=meta, loss=loss)
                self._retain()
            except Exception as error:
                log.warning("the evaluation of step %d was not noted in %s: %s", step, self.folder, error)

    def _fail(self, step: int, error: Exception) -> None:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if code := re.search(r"os_error_code='(\d+)'", str(error)):  # tensorstore's: the rest is about its database
            reason = os.strerror(int(code[1]))
        reason = reason if len(reason) <= REASON or isinstance(error, ResourceError) else "..." + reason[-REASON:]
        if manifest.is_local(self.folder) and not isinstance(error, ResourceError):
            reason += f"; it needs {_size(self._need)}, {_size(_free(self.folder))} are free"
        self.failed = f"step {step} was not saved in {self.folder}: {reason}"
        log.error("%s", self.failed)
        if _primary():
            with contextlib.suppress(OSError):
                (self.folder / str(step)).rmtree(missing_ok=True)
                self._marker(step).unlink(missing_ok=True)
            self._broken.add(step)

    def _quiet(self, found) -> None:
        """Python shows errors that nobody can catch: not those of writes that end after the save that they fail."""
        late = isinstance(found.exc_value, RuntimeError) and "Event loop is closed" in str(found.exc_value)
        if not (late and self._saves):
            self._hook(found)

    def _sweep(self) -> None:
        """Removes what writes of a failed save have left that ended after it."""
        for step in self._broken:
            with contextlib.suppress(OSError):
                if not manifest.sealed(self.folder / str(step)):
                    (self.folder / str(step)).rmtree(missing_ok=True)
                    self._marker(step).unlink(missing_ok=True)

    def _open(self) -> None:
        """Takes the folder, where there is one, before anything in it is touched."""
        if self._lock is not None and self.folder.is_dir():
            self._lock.take()
        self._remove_unfinished()

    def _begin(self, step: int) -> None:
        """What the first process does before all of them save: the folder, taken; the step's marker; enough space."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._lock is not None:
                self._lock.take()
            self._sweep()
            self._marker(step).touch()
        except OSError as error:
            raise unwritable(self.folder, error, "choose another checkpoint.folder") from None
        check_space(self.folder, self._need)

    def _retain(self) -> None:
        """Deletes the steps that neither count, interval nor loss keep."""
        steps, every = self.steps(), self.config.keep_every
        kept = {*steps[-self.config.keep :], *(step for step in steps if every and step % every == 0)}
        if self.config.keep_best:
            kept.add(self.best())
        for step in set(steps) - kept:
            self._marker(step).touch()
            (self.folder / str(step) / manifest.NAME).unlink()
            (self.folder / str(step)).rmtree()
            self._marker(step).unlink()

    def _marker(self, step: int) -> epath.Path:
        """The file that stands beside a step while it is written or deleted."""
        return self.folder / f"{step}{UNFINISHED}"

    def _remove_unfinished(self) -> None:
        """Clears what a killed process was writing or deleting. Whatever else lacks a manifest is kept aside."""
        saved = self.steps()
        for step in sorted(set(numbered(self.folder)) - set(saved)):
            if self._marker(step).exists():
                (self.folder / str(step)).rmtree()
                log.warning("removed %s/%d: its save was never finished", self.folder, step)
            else:
                name = self._put_aside(step)
                log.warning("%s/%d is damaged (%s is missing): kept as %s", self.folder, step, manifest.NAME, name)
        for marker in self.folder.glob("*" + UNFINISHED) if self.folder.is_dir() else ():
            marker.unlink()

    def _set_aside(self) -> list[str]:
        return [path.name for path in self.folder.iterdir() if ASIDE in path.name] if self.folder.is_dir() else []

    def _put_aside(self, step: int) -> str:
        taken, name = self._set_aside(), f"{step}{ASIDE}"
        while name in taken:
            name += "-again"
        (self.folder / str(step)).rename(self.folder / name)
        return name


def _is_news(record: logging.LogRecord) -> bool:
    """False for orbax's own account of a failed save: three tracebacks of what `_fail` says in a line."""
    of_a_save = "orbax" in record.pathname or "orbax" in record.getMessage()
    return not (record.exc_info and of_a_save) or log.isEnabledFor(logging.DEBUG)


for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(_is_news)


def check_space(folder, need: int, what: str = "a checkpoint") -> None:
    """Raises ResourceError where fewer than `need` bytes are free for `folder`; object stores are not asked."""
    folder = absolute(folder)
    if manifest.is_local(folder) and (have := _free(folder)) < need:
        raise ResourceError(
            f"{folder}: {what} of {_size(need)} would not fit, {_size(have)} are free; "
            "free some space, lower checkpoint.keep, or choose another folder"
        )


def _free(folder: epath.Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _size(count: int) -> str:
    return humanize.naturalsize(count, binary=True)


def _primary() -> bool:
    return jax.process_index() == 0


def _loss(folder: epath.Path) -> float | None:
    try:
        return manifest.read(folder).get("loss")
    except (manifest.Damaged, CheckpointError):
        return None  # said when the step is read; an old loss is no reason not to start
