"""Settings of a run, whole: what `jaxllm train RUN.yaml` reads, prints and saves."""

import copy
from pathlib import Path
from typing import Any

from jaxllm import config as settings_of
from jaxllm.checkpoint import CheckpointConfig
from jaxllm.config import settings
from jaxllm.data.config import DataConfig
from jaxllm.errors import SettingsError
from jaxllm.model.spec import Kernels, ModelConfig, RopeSpec
from jaxllm.optim.config import OptimConfig
from jaxllm.optim.scale import Scale, compute_optimal
from jaxllm.sharding import ParallelConfig


@settings
class Stage:
    """A part of the run with its own mixture, row length, batch or RoPE."""

    name: str
    """Shown in the log."""
    steps: int
    """Optimizer steps of this stage."""
    weights: dict[str, float] | None = None
    """Weight of each source by name, others 0; null keeps the sources' own weights."""
    seq_len: int | None = None
    """Tokens in a row; null keeps train.seq_len."""
    batch: int | None = None
    """Rows in a step; null keeps train.batch."""
    rope: RopeSpec | None = None
    """RoPE of every layer that has one, from this stage on (context extension); null keeps the model's."""


@settings
class TrainConfig:
    """How long, how much at a time, and what is watched."""

    steps: int | None = None
    """Optimizer steps; null when stages give them."""
    stages: tuple[Stage, ...] = ()
    """Parts of the run in order; empty for one stage of train.steps."""
    seq_len: int = 512
    """Tokens in a row."""
    batch: int = 16
    """Rows in a step, over all devices and microbatches: the effective batch."""
    accumulate: int = 1
    """Microbatches that a step is split into to save memory; the gradient stays that of the whole batch."""
    seed: int = 0
    """Of the weights and of dropout."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's sum (PaLM used 1e-4)."""
    ema: float | None = None
    """Decay of an average of the weights, kept beside them; null for none."""
    trainable: str = "**"
    """Pattern over the paths of the weights that train."""
    init: str | None = None
    """Checkpoint whose weights the run starts from; null for new weights."""
    eval_every: int = 200
    """Steps between held-out evaluations; there is one at the end too."""
    eval_rows: int | None = None
    """Held-out rows in an evaluation during the run; null for all."""
    patience: int | None = None
    """Stop after this many evaluations without a lower held-out loss; null never stops early."""
    max_skipped: int = 10
    """Stop after this many steps in a row whose gradient was not finite."""

    def __post_init__(self):
        if (self.steps is None) == (not self.stages):
            raise ValueError("set steps, or stages that have their own steps; not both")
        for name in ("steps", "seq_len", "batch", "accumulate", "eval_every", "max_skipped", "patience", "eval_rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for stage in self.resolved_stages:
            if stage.batch % self.accumulate:
                raise ValueError(f"batch={stage.batch} does not divide by accumulate={self.accumulate}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema={self.ema} must lie in (0, 1)")

    @property
    def resolved_stages(self) -> tuple[Stage, ...]:
        """The stages with every null filled in."""
        stages = self.stages or (Stage(name="train", steps=self.steps),)
        filled, rope = [], None
        for stage in stages:
            rope = stage.rope or rope
            filled.append(
                Stage(
                    name=stage.name,
                    steps=stage.steps,
                    weights=stage.weights,
                    seq_len=stage.seq_len or self.seq_len,
                    batch=stage.batch or self.batch,
                    rope=rope,
                )
            )
        return tuple(filled)

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.resolved_stages)


@settings
class LogConfig:
    """Where metrics go beside metrics.jsonl."""

    every: int = 1
    """Steps between two lines of metrics."""
    tensorboard: bool = False
    """Write event files for TensorBoard (extra: tensorboard)."""
    wandb: str | None = None
    """Project at Weights & Biases to log to (extra: wandb)."""
    profile: str | None = None
    """Steps to trace with the profiler, such as 10-12; the trace opens in XProf and Perfetto."""

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every={self.every} must be at least 1")
        self.profile_steps  # noqa: B018  (raises when malformed)

    @property
    def profile_steps(self) -> tuple[int, int] | None:
        """First and last step to trace."""
        if self.profile is None:
            return None
        first, _, last = self.profile.partition("-")
        if not first.isdigit() or not (last or first).isdigit() or int(last or first) < int(first):
            raise ValueError(f"profile={self.profile!r}: write it as 10-12")
        return int(first), int(last or first)


@settings
class RunConfig:
    """A training run."""

    out: str | None = None
    """Run folder; null means runs/ and the name of the settings file."""
    model: ModelConfig
    """The model, or the name of a file in configs/models; `depth: 12` instead derives a compute-optimal one."""
    data: DataConfig
    """Text, tokenizer, packing."""
    train: TrainConfig
    """Steps, batch, evaluation."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    parallel: ParallelConfig = ParallelConfig()
    """Mesh over the devices."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and retention."""
    kernels: Kernels = Kernels()
    """How the numbers are computed."""
    log: LogConfig = LogConfig()
    """Where metrics go."""

    def __post_init__(self):
        for stage in self.train.resolved_stages:
            if self.model.positions == "learned" and stage.seq_len > self.model.context:
                raise ValueError(
                    f"train.seq_len={stage.seq_len} is longer than the {self.model.context} learned positions "
                    "(model.context)"
                )
            known = [source.name for source in self.data.sources]
            for name in stage.weights or {}:
                if name not in known:
                    raise ValueError(f"stage {stage.name}: no source {name}; there are {', '.join(known)}")


#: What may change between two parts of the same run: where and how it is computed and logged, not what.
MAY_CHANGE = ("out", "parallel", "kernels", "checkpoint", "log", "data.cache", "data.workers", "data.prefetch")
MAY_CHANGE_TRAIN = ("train.eval_every", "train.eval_rows", "train.max_skipped", "train.patience")


def differences(old: dict, new: RunConfig) -> dict[str, tuple]:
    """Settings that differ from those saved with a run and that would make it another run."""
    may = MAY_CHANGE + MAY_CHANGE_TRAIN
    changes = settings_of.diff(old, new)
    return {key: pair for key, pair in changes.items() if not any(key == m or key.startswith(m + ".") for m in may)}


def load_run(source: str | Path | dict, overrides=()) -> tuple[RunConfig, Scale | None]:
    """A run's settings, and the derivation when `model.depth` was given. Raises SettingsError.

    Without `model.vocab` the tokenizer's size is taken, or that of the tokenizer to be trained.
    """
    dial = [text for text in overrides if text.startswith("model.depth=")]
    rest = [text for text in overrides if not text.startswith("model.depth=")]
    raw, where = settings_of.merge(RunConfig, source, rest)
    model = raw.get("model")
    depth = dial[-1].partition("=")[2] if dial else model.pop("depth", None) if isinstance(model, dict) else None
    if isinstance(model, dict) or depth is not None:
        raw["model"] = model = model if isinstance(model, dict) else {}
        if "vocab" not in model:
            model["vocab"] = _vocab(raw.get("data") or {})
    scale = None
    if depth is not None:
        raw, scale = _turn_dial(raw, depth)
    if raw.get("out") is None and not isinstance(source, dict):
        raw["out"] = f"runs/{Path(source).stem}"
    return settings_of.parse(RunConfig, raw, where), scale


def _vocab(data: dict) -> int:
    if data.get("tokenizer"):
        from jaxllm.data.tokenizer import Tokenizer

        return Tokenizer.load(data["tokenizer"]).vocab
    return data.get("vocab", 4096)


def _turn_dial(raw: dict, depth) -> tuple[dict, Scale]:
    """Fills what the depth derives under what is set by hand (which the derivation takes into account)."""
    if not str(depth).isdigit() or int(depth) < 1:
        raise SettingsError(f"model.depth={depth}: a whole number of layers, at least 1")
    raw = copy.deepcopy(raw)
    model, train, optim = (raw.setdefault(k, {}) for k in ("model", "train", "optim"))
    seq_len = train.get("seq_len", 512)
    by_hand: dict[str, Any] = {"embed": model["embed"]} if "embed" in model else {}
    if "lr" in optim:
        by_hand["lr"] = float(optim["lr"])
    if "batch" in train:
        by_hand["batch_tokens"] = int(train["batch"]) * seq_len
    scale = compute_optimal(int(depth), int(model["vocab"]), tied=bool(model.get("tied", False)), **by_hand)
    layer = {
        "attn": {"heads": scale.heads, "kv_heads": scale.kv_heads, "head": scale.head},
        "mlp": {"ffw": scale.ffw},
    }
    raw["model"] = {"embed": scale.embed, "layers": scale.depth, "pattern": [layer], "context": seq_len} | model
    rows = max(1, round(scale.batch_tokens / seq_len))
    rows = rows if rows < 8 else 8 * round(rows / 8)  # so that usual meshes divide it
    raw["train"] = {"batch": rows, "seq_len": seq_len} | train
    if "stages" not in train and "steps" not in train:
        raw["train"]["steps"] = -(-scale.tokens // (int(raw["train"]["batch"]) * seq_len))
    raw["optim"] = {"lr": scale.lr} | optim
    return raw, scale
