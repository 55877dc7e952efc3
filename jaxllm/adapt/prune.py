"""Settings of unstructured pruning, and the plan that makes some of a model's weights zero."""

import dataclasses
from typing import Literal

import jax

from jaxllm.adapt.quantize import LAYERS
from jaxllm.config import settings
from jaxllm.errors import SettingsError
from jaxllm.model.build import Model
from jaxllm.model.change import Plan, choose, weights_of
from jaxllm.weights import pruned
from jaxllm.weights.form import Form
from jaxllm.weights.lora import Lora
from jaxllm.weights.pruned import Pruned


@settings
class PruneConfig:
    """Which weights become zero: in each output's weights those of the lowest scores."""

    sparsity: float | None = None
    """Share of each output's weights that become zero, rounded to whole weights."""
    nm: str | None = None
    """N:M keeps N of each M neighbouring inputs of an output, such as 2:4; instead of sparsity."""
    method: Literal["magnitude", "wanda"] = "magnitude"
    """Scores: magnitude; or wanda, magnitude times the norm of the input in calibration text (arXiv 2306.11695)."""
    pattern: str = LAYERS
    """Paths of the weights; vectors (norms, biases) and routers stay as they are."""

    def __post_init__(self):
        if (self.sparsity is None) == (self.nm is None):
            raise ValueError(f"sparsity={self.sparsity}, nm={self.nm}: set one of them")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must lie between 0 and 1")
        if self.nm is not None:
            self.kept_of  # noqa: B018  (raises when malformed)

    @property
    def kept_of(self) -> tuple[int, int]:
        """`(2, 4)` for nm=2:4."""
        kept, colon, of = self.nm.partition(":")
        if not (colon and kept.isdigit() and of.isdigit()) or not 0 < int(kept) < int(of):
            raise ValueError(f"nm={self.nm!r}: write N:M, N kept of each M, such as 2:4")
        return int(kept), int(of)

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is needed."""
        return self.method != "magnitude"


@dataclasses.dataclass(frozen=True)
class Prune:
    """The step of a plan: one weight, pruned by magnitude."""

    form: Form
    zeros: int
    group: int
    method: str

    @property
    def stand_in(self) -> str | None:
        """With a method that needs text this step only says what comes out of it; why it cannot make that itself."""
        if self.method == "magnitude":
            return None
        return f"method={self.method} needs calibration text: use jaxllm prune --calibrate FILE, or method=magnitude"

    def __call__(self, weight, key) -> Pruned:
        return self.by(weight, None)

    def by(self, weight: jax.Array, squares_I: jax.Array | None) -> Pruned:
        """Pruned by what reached its inputs (see `pruned.scores`), or with None by magnitude."""
        score_OI = pruned.scores(weight, self.form, squares_I)
        return pruned.prune(weight, self.form, score_OI, zeros=self.zeros, group=self.group)


def prune_plan(model: Model, config: PruneConfig) -> Plan:
    """The plan that prunes by magnitude, and that says what comes out of every other method.

    Raises SettingsError for a pattern that chooses nothing, inputs that N:M does not divide, or weights that are no
    plain arrays.
    """
    chosen, weights = choose(model, config.pattern, "prune"), weights_of(model.abstract)
    for path in chosen:
        if not isinstance(weights[path], jax.ShapeDtypeStruct):
            raise SettingsError(f"{path} {_kind(weights[path])}")

    def plan(path: str, form: Form):
        return Prune(form, *_zeros(path, form, config), config.method) if path in chosen else None

    return plan


def _zeros(path: str, form: Form, config: PruneConfig) -> tuple[int, int]:
    """`(zeros, group)`: how many of how many neighbouring inputs become zero."""
    if config.nm is not None:
        kept, group = config.kept_of
        if form.inputs % group:
            raise SettingsError(
                f"{path}: nm={config.nm} goes by groups of {group} inputs, and its {form.inputs} do not divide; leave "
                "it out of the pattern, or set sparsity"
            )
        return group - kept, group
    zeros = round(config.sparsity * form.inputs)
    if not 0 < zeros < form.inputs:
        raise SettingsError(
            f"{path}: sparsity={config.sparsity} of {form.inputs} inputs makes {zeros} of them zero; set it between "
            f"{1 / form.inputs:.3g} and {1 - 1 / form.inputs:.3g}"
        )
    return zeros, form.inputs


def _kind(weight) -> str:
    if isinstance(weight, Pruned):
        return "is pruned already; make it plain first (jaxllm merge): its zeros are the first to go again"
    if isinstance(weight, Lora):
        return "has an adapter; merge it first (jaxllm merge), then prune"
    return "is not stored as plain floats; prune the model that this one was made from, then change it"
