"""Memory of a training step by formulas, for GPUs and for choosing what to compile.

State and batch are exact. The rest is counted at the three moments when a step holds the most: in the loss, in the
backward pass of a layer, and where the gradient of the embedding is summed. Bytes of one device. Factors were read off
programs compiled for TPUs (docs/plans.md has the comparison); a kernel of another backend may hold more.

Shapes: t tokens of a device in a microbatch, D embed, F ffw, V vocab.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import SimpleNamespace

import jax.numpy as jnp

from jaxllm import tree
from jaxllm.model.layer import LayerSpec
from jaxllm.model.mlp import GATED
from jaxllm.model.spec import remat_policy_names
from jaxllm.objectives.lm import chunks_of
from jaxllm.sharding import names_of
from jaxllm.train.estimate.attention import BACKEND, kernel_of, pairs_of
from jaxllm.train.estimate.parts import borrowed, expert_rows, is_unrolled, microbatch_tokens, ways
from jaxllm.train.estimate.step import Step
from jaxllm.train.memory import device_bytes, size

#: Arrays that the backward pass of a layer holds at its peak, as multiples of t D and t F (of what a device has of F).
WIDE, DEEP = 5.0, 6.0
#: Floats that a chunk of the loss holds for each logit: on CPU also probabilities and gradient, elsewhere these are
#: made where they are used.
LOGITS = {"cpu": 3.0, "gpu": 2.0, "tpu": 1.25}
#: The same of attention where no kernel keeps them on the chip.
SCORES = 2.2
#: Heads that TPUs keep are padded to whole lanes.
LANES = 128


#: What the kinds of memory are called, in the order in which they are shown.
NAMES = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "logits": "logits, head",
    "temporaries": "temporaries",
    "gathered": "gathered weights",
    "batch": "batch",
}


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes of one device by kind, at the moment when it holds the most."""

    parameters: float
    optimizer: float
    """With the averaged weights, where they are kept."""
    batch: float
    gradients: float
    activations: float
    """What layers keep for the backward pass."""
    logits: float
    """Of a chunk, with the head and its gradient; 0 where the peak is elsewhere."""
    gathered: float
    """Weights of a layer that devices share otherwise."""
    temporaries: float
    moment: str
    """Where the peak is: loss, layer or embedding."""
    most: Mapping[str, float]
    """Each kind at its own largest moment; they are not there at once."""

    @property
    def kinds(self) -> dict[str, float]:
        """Bytes by kind at the peak."""
        return {name: getattr(self, name) for name in KINDS}

    @property
    def total(self) -> float:
        return sum(self.kinds.values())

    @property
    def state(self) -> float:
        """What is there before and after the step."""
        return self.parameters + self.optimizer + self.batch

    @property
    def beside_state(self) -> float:
        """What the compiler calls temporaries."""
        return self.total - self.state


KINDS = tuple(field.name for field in dataclasses.fields(Held) if field.name not in ("moment", "most"))


def held_by(step: Step, platform: str) -> Held:
    """What a step of one device holds at its peak."""
    state = step.state
    chosen, _ = tree.partition(state.params, tree.select(state.params, step.trainable))
    gradients = device_bytes(chosen) * (2 if step.config.train.accumulate > 1 else 1)
    kept, layer = activations(step, platform), _layer(step, platform)
    gathered = gathered_bytes(step, platform)
    loss, embedding = _loss(step, platform), _embedding(step)
    moments = {
        "loss": dict(activations=kept, logits=loss),
        "layer": dict(gradients=gradients, activations=kept, gathered=gathered, temporaries=layer),
        "embedding": dict(gradients=gradients, temporaries=embedding),
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = dict.fromkeys(("gradients", "activations", "logits", "gathered", "temporaries"), 0.0)
    most = {kind: max(one.get(kind, 0.0) for one in moments.values()) for kind in parts}
    weights = device_bytes(state.params)
    there = {"parameters": weights, "optimizer": device_bytes(state) - weights, "batch": device_bytes(step.batch)}
    return Held(**there, **parts | moments[moment], moment=moment, most=there | most)


def divided(held: Held, total: float) -> dict[str, float]:
    """What a compiled program needs, by kind: state as it is, the rest as it is estimated, and what is left."""
    kinds = held.kinds
    known = sum(kinds[kind] for kind in KINDS if kind != "temporaries")
    if known <= total:
        return kinds | {"temporaries": total - known}
    share = max(0.0, total - held.state) / max(known - held.state, 1.0)
    scaled = {kind: kinds[kind] * share for kind in ("gradients", "activations", "logits", "gathered")}
    return kinds | scaled | {"temporaries": 0.0}


def most_of(held: Held, kinds: Mapping[str, float]) -> dict[str, float]:
    """Each kind at its own largest moment, of a program that needs `kinds` at its peak: never more than all of it."""
    beside = max(0.0, sum(kinds.values()) - held.state)
    return {kind: max(size_, min(held.most[kind], beside)) for kind, size_ in kinds.items()}


def table(kinds: Mapping[str, float], most: Mapping[str, float]) -> list[str]:
    """Bytes by kind as lines. What is never there is left out, but for the kinds that every step has."""
    lines = [f"  {'':<18}{'at the peak':>12}{'at most':>12}"]
    always = ("parameters", "gradients", "optimizer", "activations", "logits", "temporaries")
    for kind, name in NAMES.items():
        if kind in always or most[kind]:
            lines.append(f"  {name:<18}{size(kinds[kind]):>12}{size(most[kind]):>12}")
    return lines


def _size(step: Step, platform: str) -> int:
    """Bytes of a number that layers compute with; CPUs compute bfloat16 in float32."""
    size = jnp.dtype(step.model.config.dtype).itemsize
    return max(size, 4) if platform == "cpu" else size


def activations(step: Step, platform: str) -> float:
    """Bytes that layers keep from the forward pass for the backward one."""
    config, policy = step.model.config, remat_policy_names(step.model.config.remat)
    t, u, unrolled = microbatch_tokens(step), _size(step, platform), is_unrolled(step, platform)
    if policy is None or (unrolled and platform == "cpu"):  # there the compiler does not wait with computing it again
        kept = t * sum(_all(step, spec, u, platform, _stream(step)) for spec in config.layer_specs)
        return kept + _every_gathered(step, u) + (scores(step, platform) if unrolled else 0.0)
    names, total = set(policy[0]), 0.0
    period = 1 if unrolled else len(config.pattern)
    for index, spec in enumerate(config.layer_specs):
        inside = index - len(config.prefix)
        begins = inside < 0 or index >= config.layers - len(config.suffix) or inside % period == 0
        total += u * _stream(step) * begins + sum(
            x for name, x in _named(step, spec, u, platform).items() if name in names
        )
    return t * total


def scores(step: Step, platform: str, each: bool = True) -> float:
    """Bytes of float32 logits of attention in all layers, or in the widest one, where the kernel has them in memory."""
    found, length, parts = [], step.stage.seq_len, step.sharding.mesh.shape["context"]
    for attn in (spec.attn for spec in step.model.config.layer_specs):
        kind = kernel_of(step, attn, platform)
        pairs = 0.0 if kind in BACKEND else pairs_of(kind, length, attn.window, parts)
        found.append(
            4 * microbatch_tokens(step) * parts / length * attn.heads / ways(step.sharding, ("heads",)) * pairs
        )
    return sum(found) if each else max(found)


def _named(step: Step, spec: LayerSpec, u: int, platform: str) -> dict[str, float]:
    """Bytes of a token in each value that rematerialisation can keep; `mlp_out` only where something wants it."""
    config, sharding, attn = step.model.config, step.sharding, spec.attn
    heads, ffw = ways(sharding, ("heads",)), ways(sharding, ("ffw",))
    kv_heads = attn.heads / heads if attn.latent else (attn.kv_heads or attn.heads) / ways(sharding, ("kv_heads",))
    width = _width(step, spec, platform) / ffw * u
    after = config.norm_placement != "pre" or spec.moe is not None
    qk, v = (_padded(dim, platform) for dim in (config.qk_dim(attn), config.v_dim(attn)))
    return {
        "q": attn.heads / heads * qk * u,
        "k": kv_heads * qk * u,
        "v": kv_heads * v * u,
        "attention": attn.heads / heads * (v * u + 4),  # and the log of the softmax's sum
        "attention_out": _stream(step) * u,
        "gate": width * _gated(spec),
        "up": width,
        "mlp_out": _stream(step) * u * after,
    }


def _padded(dim: int, platform: str) -> int:
    return -(-dim // LANES) * LANES if platform == "tpu" else dim


def _width(step: Step, spec: LayerSpec, platform: str) -> float:
    """Hidden numbers that are held for a token."""
    return spec.mlp.ffw if spec.mlp else spec.moe.ffw * _laid_out(step, spec, platform) + spec.moe.shared_ffw


def _laid_out(step: Step, spec: LayerSpec, platform: str) -> float:
    """Rows laid out by expert, for each token of a device."""
    return expert_rows(step, spec.moe, platform)[0] / microbatch_tokens(step) if spec.moe else 0.0


def _stream(step: Step) -> float:
    """Numbers of a token in the residual stream of a device: tensor parallelism splits the sequence there."""
    split = ways(step.sharding, ("residual",)) if "residual" in dict(step.sharding.rules) else 1
    return step.model.config.embed / split


def _gated(spec: LayerSpec) -> bool:
    return (spec.mlp or spec.moe).activation in GATED


def _all(step: Step, spec: LayerSpec, u: int, platform: str, stream: float) -> float:
    """Bytes of a token without rematerialisation: also what goes into norms, in float32 twice, and out of them."""
    named, config = _named(step, spec, u, platform), step.model.config
    norms = stream * (4 if config.norm_placement == "both" else 2)
    inside = norms * (u + 8) + named["q"] + named["up"]
    if spec.attn.qk_norm is not None:
        inside += (named["q"] + named["k"]) * (u + 8) / u
    return inside + sum(named[name] for name in ("q", "k", "v", "attention", "gate", "up"))


def gathered_bytes(step: Step, platform: str) -> float:
    """Weights of the largest layer (or period of layers) in the compute dtype, as products of a device want them."""
    return _size(step, platform) * max(_by_period(step).values(), default=0.0)


def _every_gathered(step: Step, u: int) -> float:
    """Weights of all layers, where they are kept as they were gathered; codes are unpacked for each product anew."""
    times = {"layers": step.model.config.periods}
    shared = any(step.sharding.mesh.shape[axis] > 1 for axis in step.sharding.by_row)
    plain = _by_period(step, plain=True)
    return u * sum(size * times.get(group, 1) for group, size in plain.items()) if shared else 0.0


def _by_period(step: Step, plain: bool = False) -> dict[str, float]:
    """`{group: numbers}` of whole weights, or of those that are arrays; those of a layer stack for one period."""
    found: dict[str, float] = {}
    arrays = tree.flatten(step.model.abstract)
    for path, (axes, shape) in step.model.weights.items():
        if plain and path not in arrays and f"{path}/base" not in arrays:
            continue
        group = path.split("/")[0] if path.startswith("layers/") else "/".join(path.split("/")[:2])
        if path.startswith(("prefix/", "layers/", "suffix/")):
            size = math.prod(shape[axes[0] == "layers" :]) / ways(step.sharding, axes) / _experts(step, axes)
            found[group] = found.get(group, 0.0) + size
    return found


def _experts(step: Step, axes) -> int:
    """Into how many parts experts are split, which are not gathered over these devices."""
    return step.sharding.ways(names_of([dict(step.sharding.rules)["expert"]])) if "expert" in axes[:-1] else 1


def _layer(step: Step, platform: str) -> float:
    """What the backward pass of a layer holds beside weights, and the gradient of its largest matrix."""
    config, before, u = step.model.config, 0.0, _size(step, platform)
    if not is_unrolled(step, platform) and remat_policy_names(config.remat) is not None:
        whole = (_all(step, spec, u, platform, config.embed) for spec in config.pattern[:-1])
        before = microbatch_tokens(step) * sum(whole)
    return layer_bytes(step, platform) + before + (_largest(step) + _lent(step)) * u


def _lent(step: Step) -> float:
    """Numbers of the gradients of a matrix that come back to the device that lent it, with room for all loans."""
    config, devices = step.model.config, step.sharding.mesh.shape["expert"]
    moes = [spec.moe for spec in config.layer_specs if spec.moe]
    return max((devices * borrowed(step, moe) * config.embed * moe.ffw for moe in moes), default=0)


def layer_bytes(step: Step, platform: str) -> float:
    """Activations that the widest layer holds in its backward pass."""
    config, ffw = step.model.config, ways(step.sharding, ("ffw",))
    adapters = any("/lora_" in path for path in tree.flatten(step.model.abstract))  # they have outputs of their own
    laid_out = 3 if platform == "cpu" else 2  # loops over blocks give the gradients by gate and by up apart
    held = [
        (DEEP + adapters + laid_out * _laid_out(step, spec, platform)) * config.embed
        + (WIDE + adapters) * _width(step, spec, platform) / ffw
        for spec in config.layer_specs
    ]
    return microbatch_tokens(step) * _size(step, platform) * max(held) + SCORES * scores(step, platform, each=False)


def _largest(step: Step) -> float:
    """Numbers of the largest matrix of a layer: its gradient exists whole before it is summed over devices."""
    sizes = [
        math.prod(shape[axes[0] == "layers" :]) / ways(step.sharding, axes) / _experts(step, axes)
        for path, (axes, shape) in step.model.weights.items()
        if path.startswith(("prefix/", "layers/", "suffix/"))
    ]
    return max(sizes)


def _loss(step: Step, platform: str) -> float:
    """A chunk of logits, the head, and the sum of its gradient in float32."""
    config, t, u = step.model.config, microbatch_tokens(step), _size(step, platform)
    head = _table(step) * (u + 4 * _trains(step, "embed" if config.tied else "head"))
    return logits_bytes(step, platform) + head + 2 * t * config.embed * u


def _table(step: Step) -> float:
    """Numbers of the whole embedding, or head."""
    return step.model.config.padded_vocab * step.model.config.embed / ways(step.sharding, ("vocab",))


def _trains(step: Step, name: str) -> bool:
    return any(tree.flatten(tree.select(step.state.params, step.trainable)[name]).values())


def logits_bytes(step: Step, platform: str) -> float:
    """Bytes of a chunk of logits, as `objectives/lm.py` cuts them."""
    config, sharding = step.model.config, step.sharding
    rows = step.stage.batch / step.config.train.accumulate / sharding.batch_size
    shape = (int(rows), step.stage.seq_len // sharding.mesh.shape["context"], config.embed)
    here = SimpleNamespace(platform=platform, spread=sharding.inside().spread)
    chunks = chunks_of(SimpleNamespace(config=config, sharding=here), shape)
    return LOGITS[platform] * 4 * microbatch_tokens(step) / chunks * config.padded_vocab / ways(sharding, ("vocab",))


def _embedding(step: Step) -> float:
    """The gradient of the table, whole and in float32, before it is summed over devices."""
    if not _trains(step, "embed"):
        return 0.0
    return 4 * (2 * _table(step) + microbatch_tokens(step) * step.model.config.embed)
