"""AWQ: weights that large activations meet are scaled up before they are rounded, and what feeds them is scaled down.

Lin et al. 2023, arXiv 2306.00978, section 3.2: s = mean|x|^alpha, with alpha by search. A layer computes the same with
the scaled weights, since 1 / s goes into a norm, or into a matrix whose output enters linearly.

Shapes: O outputs, I inputs, A values of alpha, N query heads, K kv heads, H head dim, E experts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxllm.adapt.quantize import RoundToNearest
from jaxllm.compress.calibrate import Stats
from jaxllm.model.layer import LayerSpec
from jaxllm.model.spec import ModelConfig
from jaxllm.weights.form import Form

#: alpha = 0 leaves the weights as they are, so that no scaling is worse than rounding on the calibration text.
ALPHAS = tuple(i / 20 for i in range(20))
#: Activations in which the product of gate and up is linear in up.
LINEAR = ("swiglu", "geglu", "geglu_tanh")

Weights = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Weights that read the same inputs, and what makes these inputs."""

    readers: tuple[str, ...]
    """Paths within the layer."""
    source: str
    """A norm, or a matrix whose outputs are the inputs."""

    @property
    def of_norm(self) -> bool:
        return self.source.endswith(("norm", "scale"))


def pairs(config: ModelConfig, spec: LayerSpec) -> list[Pair]:
    """What can be scaled in a layer of this kind.

    Nothing is where an activation lies between: before `down` of a feed-forward layer without a gate, or with a
    clamped one. Where norms come after (post) the first matrices read the residual stream, which has no one source.
    """
    found = []
    before = config.norm_placement != "post"
    latent, inner = spec.attn.latent, spec.mlp or spec.moe
    names = ("q", "k", "v") if latent is None else ("q" if latent.q_rank is None else "q_down", "kv_down", "k_rope")
    if before:
        found.append(Pair(tuple(f"attn/{name}" for name in names), "attn_norm/scale"))
    if latent is not None:
        found += [Pair(("attn/q_up",), "attn/q_norm")] if latent.q_rank is not None else []
        found.append(Pair(("attn/k_up", "attn/v_up"), "attn/kv_norm"))
    found.append(Pair(("attn/o",), "attn/v" if latent is None else "attn/v_up"))
    rooms = ["mlp"] if spec.mlp else ["moe", "moe/shared"] if spec.moe.shared_ffw else ["moe"]
    gate = ("gate", "up") if inner.activation in (*LINEAR, "swiglu_clamped") else ("up",)
    if before:
        readers = tuple(f"{room}/{name}" for room in rooms for name in gate)
        found.append(Pair(readers + ("moe/router",) * (spec.mlp is None), "mlp_norm/scale"))
    if inner.activation in LINEAR:
        found += [Pair((f"{room}/down",), f"{room}/up") for room in rooms]
    return found


def rescale(
    weights: Weights,
    stats: dict[str, Stats],
    steps: dict[str, RoundToNearest],
    forms: dict[str, Form | None],
    config: ModelConfig,
    spec: LayerSpec,
) -> Weights:
    """The weights of a layer, by their paths within it, that compute the same and lose less when they are rounded.

    Args:
      stats: what reaches the weights that AWQ is to round.
      steps: how those are rounded.
      forms: of all matrices of the layer.
    """
    for pair in pairs(config, spec):
        if rounded := [path for path in pair.readers if path in steps]:
            seen, ways = [stats[path] for path in rounded], tuple(steps[path] for path in rounded)
            integer = any(step.activations == "int8" for step in ways)
            size_I = jnp.max(jnp.abs(seen[0].sample_SI), axis=-2) if integer else seen[0].size_I
            s = search(_size(size_I, pair, spec), [weights[path] for path in rounded], seen, ways)
            readers = {path: _scale(weights[path], forms[path], s[..., None, :]) for path in pair.readers}
            weights = weights | readers
            weights = weights | _divided(weights, pair, s, forms, config, spec)
    return weights


@functools.partial(jax.jit, static_argnums=3)
def search(size_I: jax.Array, weights: list[jax.Array], stats: list[Stats], steps: tuple[RoundToNearest, ...]):
    """The factors `[E?, I]` with the least |(Q(W s) / s - W) X^T|^2, summed over the weights.

    Where activations are rounded too, so is what that costs, and factors then go by the largest activations, whose
    rows they even out (SmoothQuant, arXiv 2211.10438).
    `size_I`: |x| of each input, `[E, I]` where each expert has factors of its own.
    """

    def loss(alpha):
        s = factors(size_I, alpha)[..., None, :]
        total = 0.0
        for w, of, step in zip(weights, stats, steps, strict=True):
            w_OI = step.form.matrix(w)
            rounded = step(step.form.weight(w_OI * s), None).matrix(jnp.float32)
            d_OI = rounded / s - w_OI
            each = jnp.sum((d_OI @ of.gram_II) * d_OI, axis=(-2, -1))
            if step.activations == "int8":
                each = each + _of_activations(w_OI * s, of, s)
            total += each if size_I.ndim > 1 else jnp.sum(each)
        return total

    losses_A = jax.lax.map(loss, jnp.asarray(ALPHAS))
    return factors(size_I, jnp.asarray(ALPHAS)[jnp.argmin(losses_A, axis=0)][..., None])


def _of_activations(w_OI, stats: Stats, s):
    """What rounding the rows of x / s to 127 steps adds to |W x|^2: a twelfth of a step squared for each input.

    The sample stands for all tokens, by its part of the squares of x.
    """
    x_SI = stats.sample_SI
    whole = jnp.trace(stats.gram_II, axis1=-2, axis2=-1) / jnp.maximum(jnp.sum(x_SI**2, axis=(-2, -1)), 1e-30)
    step_S = jnp.max(jnp.abs(x_SI / s), axis=-1) / 127
    return whole * jnp.sum(step_S**2, axis=-1) / 12 * jnp.sum(w_OI**2, axis=(-2, -1))


def factors(size_I, alpha):
    """size^alpha, such that the geometric mean of the smallest and the largest one is 1; 1 where nothing came by."""
    mean = jnp.mean(size_I, axis=-1, keepdims=True)
    s = jnp.maximum(jnp.where(mean > 0, size_I / jnp.where(mean > 0, mean, 1), 1), 1e-4) ** alpha
    return s / jnp.sqrt(jnp.max(s, axis=-1, keepdims=True) * jnp.min(s, axis=-1, keepdims=True))


def _size(size_I, pair: Pair, spec: LayerSpec):
    """|x| of the inputs, the same where they must share a factor."""
    if pair.of_norm:  # one norm for all experts
        return size_I.reshape(-1, size_I.shape[-1]).sum(0)
    if pair.source == "attn/v":  # the query heads of a group read the same values
        size_KGH = _by_group(size_I, spec)
        return jnp.broadcast_to(size_KGH.mean(1, keepdims=True), size_KGH.shape).reshape(-1)
    return size_I


def _divided(weights: Weights, pair: Pair, s, forms, config: ModelConfig, spec: LayerSpec) -> Weights:
    """The source of the inputs over s, and its bias."""
    w = weights[pair.source]
    if pair.of_norm:
        unit = 1 if config.norm == "rms_unit_offset" else 0
        found, bias = (w + unit) / s - unit, pair.source.replace("scale", "bias")
    else:
        s = _by_group(s, spec)[:, 0].reshape(-1) if pair.source == "attn/v" else s
        found, bias = _scale(w, forms[pair.source], 1 / s[..., None]), f"{pair.source}_bias"
    if bias == pair.source or bias not in weights:
        return {pair.source: found}
    return {pair.source: found, bias: weights[bias] / s.reshape(weights[bias].shape)}


def _by_group(x_I, spec: LayerSpec):
    """Inputs of the output projection as `[K, N / K, H]`."""
    kv_heads = spec.attn.kv_heads or spec.attn.heads
    return x_I.reshape(kv_heads, spec.attn.heads // kv_heads, -1)


def _scale(w, form: Form | None, factor):
    """A weight whose matrices `[E?, O, I]` are multiplied; a router has no form, and is `[I, O]`."""
    return w * factor.T if form is None else form.weight(form.matrix(w) * factor)
