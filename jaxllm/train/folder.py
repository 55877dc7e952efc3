"""The run folder: one run's settings, tokenizer, metrics, checkpoints and reports; nothing of another run's.

settings.yaml    the resolved settings            metrics.jsonl   a line for each step
tokenizer/       the tokenizer the run uses       loss.png        the loss curve
checkpoints/     one folder for each saved step   card.md         the run card
summary.json     the result
"""

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
        """Writes settings and tokenizer. Raises ResourceError for a folder that cannot be written."""
        text = yaml.safe_dump(settings_of.to_dict(self.config), sort_keys=False)
        temporary = self.settings.with_suffix(".tmp")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            tokenizer.save(self.tokenizer_dir)
            if self.config.checkpoint.folder is not None:  # so that the weights can be used without the run folder
                tokenizer.save(self.checkpoints / "tokenizer")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.settings)
        except OSError as error:
            raise ResourceError(
                f"{self.path} cannot be written ({error.strerror or error}); choose another folder with out=..."
            ) from None
