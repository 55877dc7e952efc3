"""FLOPs of a training step by formulas: each matrix product as often as it is computed, attention by its kernel.

A product of t tokens with a matrix of n numbers is 2 t n FLOPs forward, as much for the gradient of its input, and as
much for the gradient of the matrix where it trains. Rematerialisation computes some of the forward ones again. All
numbers are of one device and one step.
"""

import dataclasses
import math
from collections.abc import Iterator

from jaxllm import tree
from jaxllm.model.build import VECTORS, active_parameters
from jaxllm.model.layer import AttnSpec
from jaxllm.model.spec import ModelConfig
from jaxllm.sharding import Sharding
from jaxllm.train.estimate.attention import attentions
from jaxllm.train.estimate.parts import (
    expert_rows,
    is_unrolled,
    kept_names,
    microbatch_tokens,
    slot_of,
    tokens_of,
    ways,
)
from jaxllm.train.estimate.step import Step
from jaxllm.train.metrics import flops_per_token
from jaxllm.weights.axes import is_linear_map, sides


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of one device in one step."""

    model: float
    """What the mathematics asks for: 6 x weights in products x tokens, and causal attention (docs/design.md, MFU)."""
    matmul: float
    """Products with weights, forward and backward."""
    attention: float
    """The same of attention by its kernel: with whole blocks on the diagonal, and what its backward pass computes."""
    recomputed: float
    """What rematerialisation adds to both."""
    optimizer: float
    """Products of the optimizer (Muon)."""
    attention_total: float
    """Attention with what of it is computed again."""

    @property
    def total(self) -> float:
        return self.matmul + self.attention + self.recomputed + self.optimizer


def work_of(step: Step, platform: str) -> Work:
    """FLOPs of a step on the devices of its mesh, on a `platform` (cpu, gpu, tpu)."""
    tokens = tokens_of(step)
    products = list(products_of(step, platform))
    kinds = list(attentions(step, platform))
    trained = sum(size * (2 + trains) for size, trains, _ in products)
    again = sum(size * share for size, _, share in products)
    return Work(
        model=model_flops(step) * step.stage.batch * step.stage.seq_len / step.sharding.mesh.size,
        matmul=2 * tokens * trained,
        attention=sum(kind.forward + kind.backward for kind in kinds),
        recomputed=2 * tokens * again + sum(kind.forward * kind.again for kind in kinds),
        optimizer=_muon(step),
        attention_total=sum(kind.forward * (1 + kind.again) + kind.backward for kind in kinds),
    )


def model_flops(step: Step) -> float:
    """FLOPs of a token, forward and backward, as MFU counts them: of all weights, whether they train or not."""
    config = step.model.config
    plain = {path: _Sized(shape) for path, (_, shape) in step.model.weights.items()}
    layers = [(s.attn.heads, config.attention_dim(s.attn), s.attn.window) for s in config.layer_specs]
    return flops_per_token(active_parameters(config, plain)[1], layers, step.stage.seq_len)


@dataclasses.dataclass(frozen=True)
class _Sized:
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def products_of(step: Step, platform: str) -> Iterator[tuple[float, bool, float]]:
    """`(multiply-adds of a token, whether the matrix trains, share that is computed again)` of each matrix product."""
    config, sharding, unrolled = step.model.config, step.sharding, is_unrolled(step, platform)
    mask = tree.flatten(tree.select(step.state.params, step.trainable))
    shapes = tree.flatten(step.model.abstract)
    names = tree.flatten(step.model.axes, is_leaf=lambda x: isinstance(x, tuple))
    for path, (axes, shape) in step.model.weights.items():
        inside = [name for name in shapes if name == path or name.startswith(f"{path}/")]
        adapters = [name for name in inside if "/lora_" in name]
        trains = any(mask[name] for name in inside if name not in adapters)
        again = _again(config, path, unrolled)
        if path == ("embed" if config.tied else "head"):
            yield math.prod(shape) / ways(sharding, axes), trains, float(_twice(step))
        elif not path.startswith(("prefix/", "layers/", "suffix/")) or path.endswith(VECTORS):
            continue
        else:
            yield math.prod(shape) * _share(step, path, platform) / _split(sharding, axes), trains, again
        for name in (name for name in adapters if not name.endswith("magnitude")):
            size = math.prod(shapes[name].shape) * _share(step, path, platform)
            yield size / ways(sharding, names[name]), mask[name], again if path.count("/") > 1 else 0.0
    if platform == "tpu":
        yield from _rotations(step)


def _split(sharding: Sharding, axes) -> int:
    """The same of a product with the residual stream, which is split where its matrix is not."""
    split = ways(sharding, axes)
    return split if split > 1 else ways(sharding, ("residual",)) if "residual" in dict(sharding.rules) else 1


def _share(step: Step, path: str, platform: str) -> float:
    """The share of a weight that one token is multiplied with."""
    group, slot, *keys = path.split("/")
    if keys and keys[0] == "moe" and keys[1] in ("gate", "up", "down"):
        moe = slot_of(step.model.config, group, slot).moe
        return expert_rows(step, moe, platform)[1] / microbatch_tokens(step) / moe.experts
    return 1.0


def _twice(step: Step) -> bool:
    """Whether logits are computed again in the backward pass: `lm` takes its gradient in the forward one."""
    return step.config.dpo is not None or step.config.distill is not None


def _again(config: ModelConfig, path: str, unrolled: bool) -> float:
    """1 where rematerialisation computes the product again, else 0; names are those of `spec.REMAT_NAMES`."""
    kept = kept_names(config)
    if kept is None or not path.startswith(("prefix/", "layers/", "suffix/")):
        return 0.0
    group, slot, *keys = path.split("/")
    spec, name = slot_of(config, group, slot), keys[1] if len(keys) > 1 else ""
    if keys[0] == "attn":
        return float(_attention_again(spec.attn, name, kept, unrolled))
    if name == "down" or keys[1:3] == ["shared", "down"]:
        # Its output is wanted by a norm behind it, by the next layer of the same period, or by the gates of the chosen
        # experts, before it is summed.
        last = unrolled or group != "layers" or int(slot) == len(config.pattern) - 1
        wanted = "mlp_out" not in kept and (config.norm_placement != "pre" or not last)
        gated = spec.moe is not None and name == "down"
        return float((wanted or gated) and not (unrolled and {"gate", "up"} <= kept))
    return float(name not in kept if name in ("gate", "up") else True)


def _attention_again(attn: AttnSpec, name: str, kept: set[str], unrolled: bool) -> bool:
    if name == "o":
        return "attention_out" not in kept and not (unrolled and "attention" in kept)
    if attn.latent is not None:
        result = {"q": "q", "q_up": "q", "k_up": "k", "k_rope": "k", "v_up": "v"}.get(name)
        return result not in kept
    return name not in kept or (attn.qk_norm is not None and name in ("q", "k"))


def _rotations(step: Step) -> Iterator[tuple[float, bool, float]]:
    """RoPE on TPU swaps halves of heads by a product with a permutation (`model/rope.py`)."""
    config, kept = step.model.config, kept_names(step.model.config)
    for spec in config.layer_specs:
        if (attn := spec.attn).rope is None:
            continue
        size = config.rope_dim(attn) ** 2
        for heads, axis, name in ((attn.heads, "heads", "q"), (attn.kv_heads or attn.heads, "kv_heads", "k")):
            heads = 1 if attn.latent and name == "k" else heads / ways(step.sharding, (axis,))
            yield heads * size, False, float(kept is not None and name not in kept)


def _muon(step: Step) -> float:
    """Five Newton-Schulz steps of each matrix: `a = x x^T`, `a a`, and a product of both with x (optax's order)."""
    if step.config.optim.name != "muon":
        return 0.0
    mask, total = tree.flatten(tree.select(step.state.params, step.trainable)), 0.0
    names = tree.flatten(step.model.axes, is_leaf=lambda x: isinstance(x, tuple))
    for path, leaf in tree.flatten(step.model.abstract).items():
        if not mask[path] or not is_linear_map(names[path]):
            continue
        _, inputs, outputs = sides(names[path])
        fans = sides(names[path]).fans(leaf)
        rows, (small, large) = inputs if fans[0] <= fans[1] else outputs, sorted(fans)
        split = math.prod(leaf.shape) / math.prod(leaf.sharding.shard_shape(leaf.shape))
        # Where devices split the long side, each of them has all of `a`, and multiplies it by itself.
        alone = all(leaf.sharding.shard_shape(leaf.shape)[i] == leaf.shape[i] for i in rows)
        one = 2 * small**2 * large / split + small**3 / (1 if alone else split)
        total += math.prod(leaf.shape) / (small * large) * 5 * 2 * one
    return total
