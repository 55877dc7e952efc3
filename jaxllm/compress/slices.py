"""What is left of a layer in structured pruning: the settings, the smaller spec, and the slices of its weights.

The parts of a layer: `heads` (kv heads with the query heads that share them), `neurons` (of the dense layer, or of each
expert), `shared` (neurons of the shared expert), `experts`.

Shapes: E experts, F ffw.
"""

import dataclasses

import numpy as np

from jaxllm.config import settings
from jaxllm.errors import SettingsError
from jaxllm.model.spec import LayerSpec, ModelConfig, MoeSpec
from jaxllm.weights.axes import Axes


@settings
class StructuredConfig:
    """What is left at most; layers, and parts of them, that are no larger stay as they are."""

    heads: int | None = None
    """Key and value heads of each layer, each with the query heads that share it."""
    neurons: int | None = None
    """Hidden width of each feed-forward layer, and of each expert."""
    experts: int | None = None
    """Routed experts of each layer."""
    layers: int | None = None
    """Layers of the model."""

    def __post_init__(self):
        wanted = {name: value for name, value in vars(self).items() if value is not None}
        if not wanted:
            raise ValueError(f"nothing to prune: set one of {', '.join(vars(self))}")
        for name, value in wanted.items():
            if value < 1:
                raise ValueError(f"{name}={value}: at least 1 must be left")

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is needed."""
        return True

    def of(self, part: str) -> int | None:
        """How much of a part is left at most."""
        return self.neurons if part == "shared" else getattr(self, part)


def sizes(spec: LayerSpec) -> dict[str, int]:
    """How many a layer has of each part."""
    found = {"heads": spec.attn.kv_heads or spec.attn.heads, "neurons": (spec.mlp or spec.moe).ffw}
    if spec.moe is not None:
        found |= {"experts": spec.moe.experts} | ({"shared": spec.moe.shared_ffw} if spec.moe.shared_ffw else {})
    return found


def check(model: ModelConfig, config: StructuredConfig) -> None:
    """Raises SettingsError for a setting that takes nothing from any layer, with what is there."""
    for name in (name for name, value in vars(config).items() if value is not None):
        parts = ("neurons", "shared") if name == "neurons" else (name,)
        there = {sizes(spec)[part] for spec in model.layer_specs for part in parts if part in sizes(spec)}
        there = {model.layers} if name == "layers" else there
        if getattr(config, name) >= max(there, default=0):
            has = " and ".join(map(str, sorted(there))) or "none"
            raise SettingsError(f"{name}={getattr(config, name)} may stay, and the model has {has}: nothing would go")


def smaller(spec: LayerSpec, model: ModelConfig, config: StructuredConfig) -> LayerSpec:
    """The layer with what is left of it. Raises SettingsError for what no smaller layer would compute."""
    left = {part: min(n, config.of(part) or n) for part, n in sizes(spec).items()}
    if left["heads"] < sizes(spec)["heads"]:
        spec = _fewer_heads(spec, model, left["heads"])
    if spec.mlp is not None:
        return dataclasses.replace(spec, mlp=dataclasses.replace(spec.mlp, ffw=left["neurons"]))
    _check_experts(spec.moe, left["experts"])
    new = dict(ffw=left["neurons"], experts=left["experts"], shared_ffw=left.get("shared", 0))
    return dataclasses.replace(spec, moe=dataclasses.replace(spec.moe, **new))


def _fewer_heads(spec: LayerSpec, model: ModelConfig, left: int) -> LayerSpec:
    attn, group = spec.attn, spec.attn.heads // sizes(spec)["heads"]
    for name, odd, why in (
        ("qk_norm", attn.qk_norm == "all", "its norm goes over all heads together"),
        ("alibi", attn.alibi, "the slopes of its heads go by how many there are"),
    ):
        if odd:
            raise SettingsError(
                f"heads={left}: a layer with {name}={getattr(attn, name)} would compute something else with fewer "
                f"heads, since {why}; prune neurons, experts or layers"
            )
    kv = None if attn.kv_heads is None else left
    attn = dataclasses.replace(attn, heads=left * group, kv_heads=kv, head=model.head_dim(attn))
    return dataclasses.replace(spec, attn=attn)


def _check_experts(moe: MoeSpec, left: int) -> None:
    if left < moe.experts_per_token:
        raise SettingsError(
            f"experts={left}: each token goes to {moe.experts_per_token}, so at least {moe.experts_per_token} must stay"
        )
    least = -(-moe.experts_per_token // (moe.groups_per_token or 1))
    each = max(least, 2 if moe.group_score == "top2" else 1)
    if left % moe.groups or left // moe.groups < each:
        fits = [n for n in range(moe.groups * each, moe.experts, moe.groups)]
        raise SettingsError(
            f"experts={left}: they lie in {moe.groups} groups of one size, each with at least {each}; "
            f"numbers that fit: {', '.join(map(str, fits)) or 'none'}"
        )


def choose(score: np.ndarray, left: int, groups: int = 1) -> np.ndarray:
    """The numbers of the `left` largest along the last axis, in order; of equal ones the first. From each of some
    groups as many."""
    grouped = score.reshape(*score.shape[:-1], groups, -1)
    best = np.argsort(-grouped, axis=-1, kind="stable")[..., : left // groups]
    first = np.arange(groups)[:, None] * grouped.shape[-1]
    return (np.sort(best, axis=-1) + first).reshape(*score.shape[:-1], left)


def cut(path: str, w: np.ndarray, axes: Axes, kept: dict[str, np.ndarray]) -> np.ndarray:
    """What is left of a weight of a layer.

    Args:
      path: within the layer, such as `attn/q`.
      axes: logical ones of `w`, without a stack.
      kept: numbers of what is left of each part that is made smaller; of an expert's neurons `[E, F]`.
    """
    if path.startswith("attn/") and "heads" in kept:
        for axis in (i for i, name in enumerate(axes) if name in ("heads", "kv_heads")):
            w = np.take(w, _members(kept, w.shape[axis]), axis)
    if path.startswith("moe/") and not path.startswith("moe/shared/") and "experts" in kept:
        routes = path in ("moe/router", "moe/router_bias", "moe/bias")
        w = np.take(w, kept["experts"], w.ndim - 1 if routes else 0)
    neurons = kept.get("shared" if path.startswith("moe/shared/") else "neurons")
    if neurons is None or "ffw" not in axes:
        return w
    axis = axes.index("ffw")
    if neurons.ndim == 1:
        return np.take(w, neurons, axis)
    return np.take_along_axis(w, np.expand_dims(neurons, [i for i in range(1, w.ndim) if i != axis]), axis)


def _members(kept: dict[str, np.ndarray], size: int) -> np.ndarray:
    """Heads of the kept groups, where a group has `size` over the number of groups."""
    group = size // int(kept["groups"])
    return (kept["heads"][:, None] * group + np.arange(group)).reshape(-1)
