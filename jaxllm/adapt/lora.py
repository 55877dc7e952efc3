"""Settings of adapters, and the plans that put them over a model's weights and merge them in."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp

from jaxllm.config import settings
from jaxllm.errors import SettingsError
from jaxllm.model.build import Model
from jaxllm.model.change import Plan, choose, weights_of
from jaxllm.weights.form import Form
from jaxllm.weights.lora import Lora, add_lora

#: The arrays of adapters, as a pattern over paths.
TRAINABLE = "**/lora_*"


@settings
class LoraRule:
    """Another rank for some of the weights."""

    pattern: str
    """Paths of the weights."""
    rank: int
    """Of these weights; 0 leaves them without an adapter."""
    alpha: float | None = None
    """Null keeps the ratio of alpha to rank."""


@settings
class LoraConfig:
    """Low-rank adapters: what they lie over, and how large they are."""

    pattern: str = "**/attn/*,**/mlp/*"
    """Paths of the weights that get one; `**` takes experts, embeddings and head as well."""
    rank: int = 16
    """Columns of a, rows of b."""
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank, or with kind=rslora by alpha / sqrt(rank)."""
    dropout: float = 0.0
    """Share of an adapter's inputs that are zeroed in training."""
    kind: Literal["lora", "rslora", "dora"] = "lora"
    """lora; rslora, whose scale suits high ranks; dora, which also learns the norm of each output's weights."""
    rules: tuple[LoraRule, ...] = ()
    """Exceptions by pattern; the first that chooses a weight decides."""

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank={self.rank}, alpha={self.alpha}: must be at least 1, and above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        for rule in self.rules:
            if rule.rank < 0 or (rule.alpha is not None and rule.alpha <= 0):
                raise ValueError(f"rules: rank={rule.rank}, alpha={rule.alpha}: at least 0, and above 0")


@dataclasses.dataclass(frozen=True)
class AddLora:
    """The step of a plan: one weight with a new adapter over it."""

    form: Form
    rank: int
    alpha: float
    dropout: float
    kind: str

    def __call__(self, weight, key):
        variant = dict(rslora=self.kind == "rslora", dora=self.kind == "dora")
        return add_lora(weight, self.form, key, rank=self.rank, alpha=self.alpha, dropout=self.dropout, **variant)


def lora_plan(model: Model, config: LoraConfig) -> Plan:
    """The plan that adds adapters. Raises SettingsError for a pattern that chooses nothing."""
    sizes: dict[str, tuple[int, float]] = {}
    for rule in config.rules:
        alpha = config.alpha * rule.rank / config.rank if rule.alpha is None else rule.alpha
        sizes = {path: (rule.rank, alpha) for path in choose(model, rule.pattern, "lora.rules")} | sizes
    sizes = {path: (config.rank, config.alpha) for path in choose(model, config.pattern, "lora.pattern")} | sizes
    for path, weight in weights_of(model.abstract).items():
        if isinstance(weight, Lora):
            raise SettingsError(f"{path} has an adapter already; merge it first (jaxllm merge), or go on with its run")

    def plan(path: str, form: Form):
        rank, alpha = sizes.get(path, (0, 0.0))
        return AddLora(form, rank, alpha, config.dropout, config.kind) if rank else None

    return plan


def config_of(sizes: Mapping[str, tuple[int, float]], kind: str, dropout: float = 0.0) -> LoraConfig:
    """The settings that give adapters of these sizes, `{path: (rank, alpha)}`; the commonest size is the default."""
    counted = collections.Counter(sizes.values())
    (rank, alpha), _ = counted.most_common(1)[0]
    patterns = {size: ",".join(path for path in sizes if sizes[path] == size) for size in counted}
    rules = tuple(LoraRule(pattern=patterns[r, a], rank=r, alpha=a) for r, a in counted if (r, a) != (rank, alpha))
    kinds = dict(kind=kind, dropout=dropout)
    return LoraConfig(pattern=patterns[rank, alpha], rank=rank, alpha=alpha, rules=rules, **kinds)


@dataclasses.dataclass(frozen=True)
class Merge:
    """The step of a plan: an adapter added to the weight under it, in float32."""

    def __call__(self, weight, key):
        return weight.dense(jnp.float32)


def merge_plan(model: Model) -> Plan:
    """The plan that makes plain float32 weights of adapters and what is under them; others stay as they are."""
    found = weights_of(model.abstract)
    return lambda path, form: Merge() if isinstance(found[path], Lora) else None


def float_plan(model: Model) -> Plan:
    """The plan that makes plain float32 weights of all weight types."""
    found = weights_of(model.abstract)
    return lambda path, form: Merge() if hasattr(found[path], "dense") else None
