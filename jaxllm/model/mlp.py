"""Dense feed-forward layers.

Shapes: B batch, T position, D embed, F ffw.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxllm.kernels.backend import platform
from jaxllm.model.param import normal, zeros
from jaxllm.model.spec import MlpSpec, ModelConfig
from jaxllm.sharding import Sharding
from jaxllm.weights.seam import einsum, unwrap


def _swiglu_clamped(gate, up):
    """GPT-OSS (arXiv 2508.10925), by its published reference implementation."""
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


GATED = {
    "swiglu": lambda gate, up: jax.nn.silu(gate) * up,
    "swiglu_clamped": _swiglu_clamped,
    "geglu": lambda gate, up: jax.nn.gelu(gate, approximate=False) * up,
    "geglu_tanh": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
}
PLAIN = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, arXiv 2109.08668
}


@functools.partial(jax.checkpoint, static_argnums=0)  # keeps gate and up only: 8 % less temporary memory
def activate(name: str, gate, up):
    """The hidden activation, of gate and up for the gated kinds (gate is not None), else of up."""
    return GATED[name](gate, up) if name in GATED else PLAIN[name](up)


class Mlp(nnx.Module):
    """Feed-forward layer; see `MlpSpec`."""

    def __init__(self, spec: MlpSpec, config: ModelConfig, rngs: nnx.Rngs):
        self.spec = spec
        D, F = config.embed, spec.ffw
        if spec.activation in GATED:
            self.gate = normal(rngs, (D, F), ("embed", "ffw"), fan_in=D)
        self.up = normal(rngs, (D, F), ("embed", "ffw"), fan_in=D)
        self.down = normal(rngs, (F, D), ("ffw", "embed"), fan_in=F, gain=(2 * config.layers) ** -0.5)
        if spec.bias:
            if spec.activation in GATED:
                self.gate_bias = zeros((F,), ("ffw",))
            self.up_bias = zeros((F,), ("ffw",))
            self.down_bias = zeros((D,), ("embed",))

    def __call__(self, x_BTD: jax.Array, sharding: Sharding) -> jax.Array:
        gated, bias = self.spec.activation in GATED, self.spec.bias
        gate = (
            checkpoint_name(_linear("BTD,DF->BTF", x_BTD, self.gate, bias and self.gate_bias), "gate")
            if gated
            else None
        )
        up = checkpoint_name(_linear("BTD,DF->BTF", x_BTD, self.up, bias and self.up_bias), "up")
        # Said here, or the products would be laid out as what comes in: split by sequence, with weights gathered.
        up = sharding.constrain(up, "batch", "seq", "ffw")
        gate = sharding.constrain(gate, "batch", "seq", "ffw") if gated else None
        h_BTF = activate(self.spec.activation, gate, up)
        if platform() == "tpu":
            # Else it is computed within the product, once for each tile of its output: a third more cycles.
            h_BTF = jax.lax.optimization_barrier(h_BTF)
        y_BTD = _linear("BTF,FD->BTD", h_BTF, self.down, bias and self.down_bias)
        return checkpoint_name(y_BTD, "mlp_out")


def _linear(equation, x, weight, bias):
    y = einsum(equation, x, weight)
    return y + unwrap(bias).astype(y.dtype) if bias is not False else y
