"""Settings of a run, whole: what `jaxllm train RUN.yaml` prints and saves."""

import math
from typing import Any

from jaxllm import config as settings_of
from jaxllm.adapt.changes import Change, Changes
from jaxllm.adapt.lora import LoraConfig
from jaxllm.adapt.quantize import QuantizeConfig
from jaxllm.checkpoint import CheckpointConfig
from jaxllm.config import settings
from jaxllm.data.config import DataConfig
from jaxllm.errors import SettingsError, nearest
from jaxllm.model.spec import Kernels, ModelConfig
from jaxllm.objectives.distill import AnswersConfig, DistillConfig
from jaxllm.objectives.dpo import DpoConfig
from jaxllm.optim.config import OptimConfig
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
    """Tokens in a row; null keeps train.seq_len. Packed rows of another length begin the next epoch of each source."""
    batch: int | None = None
    """Rows in a step; null keeps train.batch."""
    rope: dict[str, Any] | None = None
    """What changes in the RoPE of every layer that has one, from this stage on, such as {scaling: yarn, factor: 4,
    original_context: 2048}; each layer keeps what is not named."""

    def __post_init__(self):
        for name in ("steps", "seq_len", "batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"stage {self.name}: {name}={value} must be at least 1")
        if self.weights is not None and not (max(self.weights.values(), default=0) > 0 <= min(self.weights.values())):
            raise ValueError(f"stage {self.name}: weights={self.weights}: at least one above 0, and none below")

    def model(self, config: ModelConfig) -> ModelConfig:
        """The model of this stage: the same weights, perhaps another RoPE, a longer context. Raises SettingsError."""
        raw = settings_of.to_dict(config) | {"context": max(config.context, self.seq_len)}
        ropes = [layer["attn"]["rope"] for layer in raw["prefix"] + raw["pattern"] if layer["attn"]["rope"]]
        if self.rope and not ropes:
            raise SettingsError(f"stage {self.name}: rope would be ignored, since no layer of the model has RoPE")
        for rope in ropes:
            rope |= self.rope or {}
        return settings_of.parse(ModelConfig, raw, f"stage {self.name}")


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
    trainable: str | None = None
    """Pattern over the paths of the weights that train; null for all, or the adapters where there are any."""
    init: str | None = None
    """Checkpoint, Hugging Face folder or .gguf file whose weights the run starts from; null for new weights. A
    published model brings its model settings and its tokenizer, where none are given."""
    eval_every: int = 200
    """Steps between held-out evaluations; there is one at the end too."""
    eval_rows: int | None = None
    """Held-out rows of each source in an evaluation, spread over the text; null for all. What they give is called
    heldout_loss_sample and so on; the end of the run has all rows too."""
    patience: int | None = None
    """Stop after this many evaluations without a lower held-out loss; null never stops early."""
    neftune: float | None = None
    """Noise on the embeddings in training, uniform within this over sqrt(tokens of the conversation x embed): 5 is
    usual in fine-tuning (NEFTune, arXiv 2310.05914); null for none."""
    self_check: bool | None = None
    """Looks at the first batch before the first step: documents that see each other, a prompt that is learnt, a part of
    the loss that is missing, frozen weights that move stop the run. False leaves it out."""
    max_skipped: int = 10
    """Stop after this many steps in a row that were skipped: the gradient was not finite, or a spike."""
    skip_spikes: float | None = None
    """Skip steps whose gradient norm is this many standard deviations above the mean of the last 128, once 64 are known
    (6 is usual); null skips only what is not finite."""

    def __post_init__(self):
        if (self.steps is None) == (not self.stages):
            raise ValueError("set steps, or stages that have their own steps; not both")
        for name in ("steps", "seq_len", "batch", "accumulate", "eval_every", "max_skipped", "patience", "eval_rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for stage in self.resolved_stages:
            if stage.batch % self.accumulate:
                raise ValueError(f"batch={stage.batch} does not divide by accumulate={self.accumulate}")
        if self.neftune is not None and self.neftune <= 0:
            raise ValueError(f"neftune={self.neftune} must be above 0; null for none")
        if self.skip_spikes is not None and not 0 < self.skip_spikes < math.inf:
            raise ValueError(f"skip_spikes={self.skip_spikes} must be above 0; null skips no spikes")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema={self.ema} must lie in (0, 1)")

    @property
    def resolved_stages(self) -> tuple[Stage, ...]:
        """The stages with every null filled in."""
        stages = self.stages or (Stage(name="train", steps=self.steps),)
        filled, rope = [], {}
        for stage in stages:
            rope = rope | (stage.rope or {})
            filled.append(
                Stage(
                    name=stage.name,
                    steps=stage.steps,
                    weights=stage.weights,
                    seq_len=stage.seq_len or self.seq_len,
                    batch=stage.batch or self.batch,
                    rope=rope or None,
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

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every={self.every} must be at least 1")


@settings
class ProfileConfig:
    """What the profiler looks at."""

    steps: str | None = None
    """Steps to trace, such as 10-12; the trace opens in XProf and Perfetto. Null traces none."""

    def __post_init__(self):
        self.first_and_last  # noqa: B018  (raises when malformed)

    @property
    def first_and_last(self) -> tuple[int, int] | None:
        """First and last step to trace."""
        if self.steps is None:
            return None
        first, dash, last = self.steps.partition("-")
        last = last if dash else first
        if not (first.isdigit() and last.isdigit()) or int(last) < int(first):
            raise ValueError(f"steps={self.steps!r}: write it as 10-12")
        return int(first), int(last)


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
    profile: ProfileConfig = ProfileConfig()
    """Steps to trace."""
    quantize: QuantizeConfig | None = None
    """Stores the weights of train.init in another number format, under adapters (QLoRA); null leaves them."""
    lora: LoraConfig | None = None
    """Trains low-rank adapters over the weights of train.init, which stay as they are; null trains the weights."""

    dpo: DpoConfig | None = None
    """Learns which of two answers is preferred (jaxllm dpo); null learns to predict text or answers."""
    distill: DistillConfig | None = None
    """Learns from a teacher's distribution beside the text (jaxllm distill); null learns from the text alone."""
    qat: QuantizeConfig | None = None
    """Trains the weights for a number format: they are used rounded to nearest, and with activations=int8 forward
    products are integer ones (int8 training); null trains them as they are."""

    @property
    def self_check(self) -> bool:
        """Whether the first batch is looked at."""
        return self.train.self_check is not False

    @property
    def changes(self) -> Changes:
        """What becomes of the weights before the first step."""
        quantize = (Change(quantize=self.quantize),) if self.quantize else ()
        qat = (Change(qat=self.qat),) if self.qat else ()
        return quantize + qat + ((Change(lora=self.lora),) if self.lora else ())

    def __post_init__(self):
        if self.kernels.cache != "float":
            raise ValueError(f"kernels.cache={self.kernels.cache} is for generation, and training would ignore it")
        self._check_sources()
        self._check_distill()
        if self.dpo is not None:
            self._check_dpo()
        self._check_changes()
        if self.out is not None and "://" in self.out:
            raise ValueError(
                f"out={self.out}: the run folder must be a local one, since lines are appended to its metrics; "
                f"set checkpoint.folder={self.out} for the checkpoints"
            )
        self._check_stages()
        if self.train.patience is not None and not self.data.eval_names:
            raise ValueError(
                f"train.patience={self.train.patience} would be ignored without held-out text; "
                "set data.eval_sources or data.heldout"
            )
        if (chosen := self.profile.first_and_last) and chosen[0] > self.train.total_steps:
            last = self.train.total_steps
            raise ValueError(f"profile.steps={self.profile.steps} lies after the last of {last} steps")

    def _check_sources(self):
        for source in (*self.data.sources, *self.data.eval_sources):
            if (source.format == "pairs") != (self.dpo is not None):
                wanted = "pairs" if self.dpo is not None else "answers that are compared (jaxllm dpo), not text"
                raise ValueError(f"source {source.name} has format={source.format}, and the run wants {wanted}")

    def _check_distill(self):
        asks = any(source.format == "prompts" for source in (*self.data.sources, *self.data.eval_sources))
        if asks and (self.distill is None or self.data.tokenizer is None):
            raise ValueError("format=prompts: a teacher answers them, in jaxllm distill and with its own tokenizer")
        if self.distill is not None and not asks and self.distill.answers != AnswersConfig():
            raise ValueError("distill.answers would be ignored: no source has format=prompts")
        if self.distill is not None and (self.dpo is not None or self.train.z_loss or self.train.neftune):
            raise ValueError("distill has an objective of its own and would ignore dpo, train.z_loss and train.neftune")

    def _check_dpo(self):
        _check_dpo_experts(self.model)
        if self.data.truncate == "left":
            raise ValueError(
                "dpo: data.truncate=left would be ignored: a pair that is longer than a row is left out whole; set "
                "drop, or error"
            )
        if self.train.stages:
            raise ValueError("dpo: the reference is computed once, for rows of one length; set train.steps, not stages")
        if self.train.init is None or self.train.z_loss or self.train.neftune:
            raise ValueError(
                f"dpo: train.init={self.train.init}, z_loss={self.train.z_loss}, neftune={self.train.neftune}: it "
                "starts from a trained model, and would ignore z_loss and neftune"
            )

    def _check_changes(self):
        if self.qat is not None and (self.quantize or self.lora):
            raise ValueError("qat trains the weights themselves, and quantize and lora train adapters: set one of them")
        if (self.quantize or self.lora) and self.train.init is None:
            raise ValueError("quantize and lora are for the weights of a trained model; set train.init")
        if self.quantize is not None and self.lora is None:
            raise ValueError("quantised weights cannot be trained; set lora too, or use jaxllm quantize")

    def _check_stages(self):
        known = [source.name for source in self.data.sources]
        for stage in self.train.resolved_stages:
            if self.model.positions == "learned" and stage.seq_len > self.model.context:
                raise ValueError(
                    f"train.seq_len={stage.seq_len} is longer than the {self.model.context} learned positions "
                    "(model.context)"
                )
            stage.model(self.model)
            for name in stage.weights or {}:
                if name not in known:
                    raise ValueError(f"stage {stage.name}: no source {name}{nearest(name, known)}")


def _check_dpo_experts(model: ModelConfig) -> None:
    """Raises ValueError for experts whose routing depends on more than the answer, or that need a loss of their own."""
    for moe in (spec.moe for spec in model.layer_specs if spec.moe is not None):
        if moe.capacity_factor is not None:
            raise ValueError(
                f"dpo: capacity_factor={moe.capacity_factor} drops tokens by what else is in a row, so the reference "
                "would not be the same model; set it to null"
            )
        if moe.balance == "bias" or (moe.balance != "none" and moe.balance_coef != 0) or moe.z_coef:
            raise ValueError(
                f"dpo: balance={moe.balance} and z_coef={moe.z_coef} would be ignored, since only the preference is "
                "learnt; set balance: none and z_coef: 0"
            )


#: What may change between two parts of the same run: where and how it is computed and logged, not what.
MAY_CHANGE = ("out", "parallel", "kernels", "checkpoint", "log", "profile")
MAY_CHANGE_DATA = ("data.cache", "data.workers", "data.prefetch")
MAY_CHANGE_TRAIN = ("train.eval_every", "train.eval_rows", "train.max_skipped", "train.patience", "train.self_check")
#: Of those, what may not: a run whose checkpoints are looked for elsewhere would start from scratch.
MUST_STAY = ("checkpoint.folder",)


def differences(old: dict, new: RunConfig, where: str = "settings saved with the run") -> dict[str, tuple]:
    """Settings that differ from those saved with a run and that would make it another run.

    What an older version did not know has its default. Raises SettingsError for what this one does not know.
    """
    may = MAY_CHANGE + MAY_CHANGE_DATA + MAY_CHANGE_TRAIN
    changes = settings_of.diff(saved(old, where), new)
    return {
        key: pair
        for key, pair in changes.items()
        if key in MUST_STAY or not any(key == m or key.startswith(m + ".") for m in may)
    }


def saved(raw: dict, where: str) -> RunConfig:
    """Settings saved with a run, by this version or one before it. Raises SettingsError for what neither knows."""
    log = {key: value for key, value in (raw.get("log") or {}).items() if key != "profile"}  # now profile.steps
    return settings_of.parse(RunConfig, raw | {"log": log}, where)


def shared(config: RunConfig) -> str:
    """The settings that all processes of a run must have in common, as text: all but where a host keeps its files."""
    raw = settings_of.to_dict(config)
    return repr(raw | {"out": None, "data": raw["data"] | {"cache": None, "workers": None}})
