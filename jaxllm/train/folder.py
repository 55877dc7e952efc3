"""The run folder: one run's settings, tokenizer, metrics, checkpoints and reports; nothing of another run's.

settings.yaml    the resolved settings            metrics.jsonl   a line for each step
tokenizer/       the tokenizer the run uses       loss.png        the loss curve
checkpoints/     one folder for each saved step   card.md         the run card
summary.json     the result
"""

from pathlib import Path

import yaml

from jaxllm import config as settings_of
from jaxllm.data.prepare import train_tokenizer
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import CheckpointError
from jaxllm.train.config import RunConfig, differences


class RunFolder:
    """Opens or makes the folder of a run. Raises CheckpointError when it belongs to other settings."""

    def __init__(self, config: RunConfig):
        self.config, self.path = config, Path(config.out or "runs/run")
        self.settings, self.metrics = self.path / "settings.yaml", self.path / "metrics.jsonl"
        self.checkpoints, self.tokenizer_dir = self.path / "checkpoints", self.path / "tokenizer"
        self.resumed = self.settings.exists()
        if self.resumed:
            self._check()

    def _check(self) -> None:
        changes = differences(settings_of.read_yaml(self.settings), self.config)
        if changes:
            listed = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in list(changes.items())[:6])
            more = f" and {len(changes) - 6} more" if len(changes) > 6 else ""
            raise CheckpointError(
                f"{self.path} holds a run with other settings: {listed}{more}. "
                "Choose another folder with out=..., or give it the settings it had"
            )

    def open_tokenizer(self, say) -> Tokenizer:
        """The run's own tokenizer; the first time, a copy of `data.tokenizer` or one trained on the sources."""
        if (self.tokenizer_dir / "tokenizer.model").exists():
            return Tokenizer.load(self.tokenizer_dir)
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
        """Writes settings and tokenizer, once everything that a user can get wrong has been checked."""
        self.path.mkdir(parents=True, exist_ok=True)
        tokenizer.save(self.tokenizer_dir)
        text = yaml.safe_dump(settings_of.to_dict(self.config), sort_keys=False)
        temporary = self.settings.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.settings)
