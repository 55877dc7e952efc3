import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.model.mlp import activate


@pytest.mark.fast
def test_clamped_swiglu_holds_gate_and_up_within_seven():
    """The gate from above only: gate * sigmoid(1.702 gate) of -20 is not that of -7."""
    gate, up = np.meshgrid([-20.0, -7.5, -1.0, 0.5, 6.9, 7.1, 30.0], [-20.0, -7.1, -6.9, -1.0, 0.0, 6.9, 7.1, 30.0])
    held_gate, held_up = np.minimum(gate, 7), np.clip(up, -7, 7)
    expected = held_gate / (1 + np.exp(-1.702 * held_gate)) * (held_up + 1)
    found = activate("swiglu_clamped", jnp.asarray(gate, np.float32), jnp.asarray(up, np.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-12)
