"""The run folder: one run's settings, tokenizer, metrics, checkpoints and reports; nothing of another run's.

settings.yaml    the resolved settings            metrics.jsonl   a line for each step
tokenizer/       the tokenizer the run uses       loss.png        the loss curve
checkpoints/     one folder for each saved step   card.md         the run card
summary.json     the result                       .lock           held by the process that trains here
.unsaved         there until the first step is saved
"""

from pathlib import Path

import yaml
from etils import epath

from jaxllm import config as settings_of
from jaxllm.checkpoint.lock import Lock, unwritable
from jaxllm.checkpoint.reader import peek, steps_in
from jaxllm.checkpoint.together import first_says
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.data.trained import open_tokenizer
from jaxllm.errors import CheckpointError
from jaxllm.train.config import RunConfig, differences, saved
from jaxllm.train.init import load_tokenizer
from jaxllm.train.writers import read_jsonl

ELSEWHERE = "choose another folder with out=..."


class RunFolder:
    """Opens or makes the folder of a run. Raises CheckpointError when it belongs to other settings.

    Processes may each have a disk of their own: what the first one finds holds for all.
    """

    def __init__(self, config: RunConfig):
        self.config, self.path = config, Path(config.out or "runs/run")
        self.settings, self.metrics = self.path / "settings.yaml", self.path / "metrics.jsonl"
        self.tokenizer_dir, self.summary = self.path / "tokenizer", self.path / "summary.json"
        self.checkpoints = epath.Path(config.checkpoint.folder or self.path / "checkpoints")
        self._lock, self._unsaved = Lock(self.path, ELSEWHERE), self.path / ".unsaved"
        self.resumed: bool = first_says(self._recognise)

    def _recognise(self) -> bool:
        """Whether this run has begun: here or, on a new disk, in a folder of checkpoints elsewhere."""
        if self.settings.exists():
            self._check(settings_of.read_yaml(self.settings), str(self.settings))
            return True
        if self.config.checkpoint.folder is not None and steps_in(self.checkpoints):
            saved = peek(self.checkpoints)["settings"]
            saved["checkpoint"]["folder"] = self.config.checkpoint.folder  # it may have been moved
            self._check(saved, f"settings saved in {self.checkpoints}")
            return True
        if found := [self.metrics] * self.metrics.exists() + _parts(self.checkpoints):
            raise CheckpointError(
                f"{found[0]} is there, but no {self.settings}, so it is not known which run that is; "
                f"{ELSEWHERE}, or move it away"
            )
        return False

    def _check(self, saved: dict, where: str) -> None:
        if changes := differences(saved, self.config, where):
            listed = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in list(changes.items())[:6])
            more = f" and {len(changes) - 6} more" if len(changes) > 6 else ""
            raise CheckpointError(
                f"{self.path} holds a run with other settings: {listed}{more}. "
                f"Give it the settings it had, or start a new run with out=..., from its weights with "
                f"train.init={self.path}"
            )

    def refuse_to_start_over(self) -> None:
        """Raises CheckpointError where there is no checkpoint, but a run that must have had one."""
        if not self.settings.exists() or self._unsaved.exists():
            return
        steps = [row["step"] for row in read_jsonl(self.metrics)] if self.metrics.exists() else []
        every = saved(settings_of.read_yaml(self.settings), str(self.settings)).checkpoint.every
        if self.summary.exists() or max(steps, default=0) >= every:
            raise CheckpointError(
                f"{self.path} has been trained for {max(steps, default=0)} steps, but {self.checkpoints} holds no "
                f"checkpoint; put them back, or {ELSEWHERE}"
            )

    def saved(self) -> None:
        """The run has a checkpoint now: one that is gone later is missed."""
        self._unsaved.unlink(missing_ok=True)

    def lock(self) -> None:
        """Takes the folder for this process until `unlock` or its end.

        Raises CheckpointError where another one has it, ResourceError where nothing can be written.
        """
        self._lock.take()

    def unlock(self) -> None:
        self._lock.release()

    def open_tokenizer(self, say) -> Tokenizer:
        """The run's own tokenizer; the first time, a copy of `data.tokenizer` or one trained on the sources."""
        for folder in (self.tokenizer_dir, self.checkpoints / "tokenizer"):
            if Tokenizer.found(folder):
                return Tokenizer.load(folder)
        given = str(self.config.data.tokenizer)
        tokenizer = load_tokenizer(given) if given.endswith(".gguf") else open_tokenizer(self.config.data, say)
        if tokenizer.vocab > self.config.model.vocab:
            raise CheckpointError(
                f"the tokenizer has {tokenizer.vocab} pieces and the model a vocabulary of {self.config.model.vocab}; "
                f"set model.vocab={tokenizer.vocab}"
            )
        if unused := self.config.model.vocab - tokenizer.vocab:
            say(f"the model's vocabulary has {unused:,} ids more than the tokenizer; their weights are never used")
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
                raise CheckpointError(f"another run has begun in {self.path}; {ELSEWHERE}")
            tokenizer.save(self.tokenizer_dir)
            if self.config.checkpoint.folder is not None:  # so that the weights can be used without the run folder
                tokenizer.save(self.checkpoints / "tokenizer")
            self._unsaved.touch()
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.settings)
        except OSError as error:
            raise unwritable(self.path, error, ELSEWHERE) from None


def _parts(checkpoints: epath.Path) -> list[epath.Path]:
    """What a run has left in a folder of checkpoints, which may be there without: where a disk is mounted."""
    found = checkpoints.iterdir() if checkpoints.is_dir() else ()
    return [path for path in found if path.name[0].isdigit() or path.name == "tokenizer"]
