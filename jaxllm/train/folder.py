"""The run folder: one run's settings, tokenizer, metrics, checkpoints and reports; nothing of another run's.

settings.yaml    the resolved settings            metrics.jsonl   a line for each step
tokenizer/       the tokenizer the run uses       loss.png        the loss curve
checkpoints/     one folder for each saved step   card.md         the run card
summary.json     the result                       .lock           held by the process that trains here
"""

import fcntl
import os
from pathlib import Path

import yaml
from etils import epath

from jaxllm import config as settings_of
from jaxllm.checkpoint import read_meta
from jaxllm.checkpoint.reader import steps_in
from jaxllm.data.prepare import train_tokenizer
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import CheckpointError, ResourceError
from jaxllm.train.config import RunConfig, differences


class RunFolder:
    """Opens or makes the folder of a run. Raises CheckpointError when it belongs to other settings."""

    def __init__(self, config: RunConfig):
        self.config, self.path = config, Path(config.out or "runs/run")
        self.settings, self.metrics = self.path / "settings.yaml", self.path / "metrics.jsonl"
        self.tokenizer_dir = self.path / "tokenizer"
        self._lock = None
        self.checkpoints = epath.Path(config.checkpoint.folder or self.path / "checkpoints")
        saved = self._saved()
        self.resumed = saved is not None
        if saved is not None:
            self._check(saved)
        elif found := [path for path in (self.metrics, self.checkpoints) if path.exists()]:
            raise CheckpointError(
                f"{found[0]} is there, but no {self.settings}, so it is not known which run that is; "
                "choose another folder with out=..., or move it away"
            )

    def _saved(self) -> dict | None:
        """The settings of the run that is here; on a new disk, those in a checkpoint folder elsewhere."""
        if self.settings.exists():
            return settings_of.read_yaml(self.settings)
        if self.config.checkpoint.folder is not None and steps_in(self.checkpoints):
            return read_meta(self.checkpoints)[1]["settings"]
        return None

    def lock(self) -> None:
        """Takes the folder for this process until `unlock` or its end.

        Raises CheckpointError where another one has it, ResourceError where nothing can be written.
        """
        if self._lock is not None:
            return
        try:
            file = (self.path / ".lock").open("a+")
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            file.close()
            raise CheckpointError(
                f"{self.path} is in use by another run (process {owner}); wait for it, or choose another folder with "
                "out=..."
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}")
        file.flush()
        self._lock = file

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _check(self, saved: dict) -> None:
        changes = differences(saved, self.config)
        if changes:
            listed = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in list(changes.items())[:6])
            more = f" and {len(changes) - 6} more" if len(changes) > 6 else ""
            raise CheckpointError(
                f"{self.path} holds a run with other settings: {listed}{more}. "
                "Choose another folder with out=..., or give it the settings it had"
            )

    def open_tokenizer(self, say) -> Tokenizer:
        """The run's own tokenizer; the first time, a copy of `data.tokenizer` or one trained on the sources."""
        for folder in (self.tokenizer_dir, self.checkpoints / "tokenizer"):
            if (folder / "tokenizer.model").exists():
                return Tokenizer.load(folder)
        if self.config.data.tokenizer is not None:
            tokenizer = Tokenizer.load(self.config.data.tokenizer)
        else:
            say(f"training a tokenizer of {self.config.data.vocab} pieces")
            tokenizer = train_tokenizer(self.config.data.sources, self.config.data.vocab)
        if tokenizer.vocab > self.config.model.vocab:
            raise CheckpointError(
                f"the tokenizer has {tokenizer.vocab} pieces and the model a vocabulary of {self.config.model.vocab}; "
                f"set model.vocab={tokenizer.vocab}"
            )
        return tokenizer

    def write_start(self, tokenizer: Tokenizer) -> None:
        """Takes the folder; writes settings and tokenizer.

        Raises ResourceError for a folder that cannot be written, CheckpointError where another run was faster.
        """
        text = yaml.safe_dump(settings_of.to_dict(self.config), sort_keys=False)
        temporary = self.settings.with_suffix(".tmp")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            if self.settings.exists():
                raise CheckpointError(f"another run has begun in {self.path}; choose another folder with out=...")
            tokenizer.save(self.tokenizer_dir)
            if self.config.checkpoint.folder is not None:  # so that the weights can be used without the run folder
                tokenizer.save(self.checkpoints / "tokenizer")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.settings)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> ResourceError:
        why = error.strerror or error
        return ResourceError(f"{self.path} cannot be written ({why}); choose another folder with out=...")
