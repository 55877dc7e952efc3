"""What the parts of a layer add to its output on calibration text, and how little a whole layer does.

Shapes: B batch, T position, D embed, K kv heads, J the values that a kv head's queries give out, F ffw, E experts.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.compress.calibrate import Flow, Stats, Where, layer_of
from jaxllm.data.batch import TokenBatch
from jaxllm.model.build import Model, Params
from jaxllm.model.change import forms

#: The weight through which each part reaches the layer's output.
THROUGH = {"heads": ("attn/o",), "neurons": ("mlp/down", "moe/down"), "shared": ("moe/shared/down",)}


def influence(model: Model, params: Params, batches: Sequence[TokenBatch]) -> list[float]:
    """Of each layer: 1 - the mean cosine between what it reads and what it gives out (block influence).

    Men et al. 2024, arXiv 2403.03853, equation 1.
    """
    flow, out = Flow(model, params, batches), []
    for where in model.layers:
        before = list(flow.x)
        flow.advance(where, layer_of(params, where))
        cosines = [_cosine(x, y) for x, y in zip(before, flow.x, strict=True)]
        out.append(1 - float(np.average(jax.device_get(cosines), weights=[x.shape[0] for x in before])))
    return out


class Importance:
    """Squared norms, over all tokens, of what each part adds to the output of its layer."""

    def __init__(self, model: Model):
        self.model, self._lost = model, jax.jit(self._without_each, static_argnums=(0, 1))

    def __call__(self, flow: Flow, where: Where, weights: Params, parts: dict[str, int]) -> dict[str, np.ndarray]:
        """Of the parts with these sizes: `[K]` of heads, `[E?, F]` of neurons, `[F]` of shared ones, `[E]` of experts.

        A head counts with its values through the output weights, a neuron with its activation times the norm of its
        output weights (Muralidharan et al. 2024, arXiv 2407.14679, goes by the activation alone), and an expert with
        what the layer's output loses without it: its own output times the router's weight.
        """
        prefix = "/".join(where[:2]) + "/"
        of = {path.removeprefix(prefix): form for path, form in forms(self.model).items() if path.startswith(prefix)}
        through = {part: path for part in parts for path in THROUGH.get(part, ()) if path in of}
        stats = flow.observe(where, weights, {path: of[path] for path in through.values()}) if through else {}
        found = {}
        for part, path in through.items():
            group, *keys = path.split("/")
            w = weights[group]
            for key in keys:
                w = w[key]
            groups = parts[part] if part == "heads" else of[path].inputs
            found[part] = _energy(of[path].matrix(w), stats[path], groups)
        if "experts" in parts:
            batches = zip(flow.x, flow.where, strict=True)
            found["experts"] = sum(self._lost(*where[:2], weights, x_BTD, at) for x_BTD, at in batches)
        return jax.device_get(found)

    def _without_each(self, group: str, slot: str, weights: Params, x_BTD, at) -> jax.Array:
        """`[E]`: squared norm of the difference that each expert makes to the layer's output."""
        whole_BTD = self.model.layer(group, slot, weights, x_BTD, **at)
        outputs = {name: w for name, w in weights["moe"].items() if name in ("down", "down_bias")}

        def one(expert):
            silent = {name: w.at[expert].set(0) for name, w in outputs.items()}
            y_BTD = self.model.layer(group, slot, {**weights, "moe": {**weights["moe"], **silent}}, x_BTD, **at)
            return jnp.sum(jnp.square((whole_BTD - y_BTD).astype(jnp.float32)))

        return jax.lax.map(one, jnp.arange(weights["moe"]["down"].shape[0]))


@jax.jit
def _cosine(x_BTD, y_BTD):
    x, y = (z.astype(jnp.float32) for z in (x_BTD, y_BTD))
    norms_BT = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.mean(jnp.sum(x * y, axis=-1) / jnp.maximum(norms_BT, 1e-30))


def _energy(w_DI: jax.Array, stats: Stats, groups: int) -> jax.Array:
    """`[E?, K]`: tr(W_k G_kk W_k^T), the squared norm of what each of K groups of neighbouring inputs gives out."""
    *experts, D, _ = w_DI.shape
    w = w_DI.astype(jnp.float32).reshape(*experts, D, groups, -1)
    gram = stats.gram_II.reshape(*experts, groups, w.shape[-1], groups, w.shape[-1])
    own = jnp.diagonal(gram, axis1=-4, axis2=-2)  # [E?, J, J, K]
    return jnp.einsum("...dkj,...jmk,...dkm->...k", w, own, w, precision="highest")
