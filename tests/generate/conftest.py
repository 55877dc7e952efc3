"""Models that the tests of generation share, each with its plain forward pass."""

import jax
import numpy as np
import pytest
import tiny

VOCAB, CONTEXT = 40, 32
SHAPE = dict(vocab=VOCAB, context=CONTEXT)
LOCAL = tiny.layer({"window": 4, "sinks": True, "qk_norm": "head", "softcap": 5.0})
ALIBI = {"kv_heads": 1, "rope": None, "alibi": True, "qkv_bias": True}
CONFIGS = {
    "dense": tiny.config(tied=True, vocab_multiple=16, **SHAPE),
    "mixed": tiny.config(  # a prefix and one period, no two layers alike
        layers=3,
        prefix=[tiny.layer()],
        pattern=[LOCAL, tiny.layer(ALIBI, moe={"shared_ffw": 8})],
        positions="learned",
        norm="layer",
        norm_placement="both",
        **SHAPE,
    ),
    "latent": tiny.config({"latent": {"kv_rank": 8, "rope_head": 4, "v_head": 6}, "kv_heads": None}, **SHAPE),
    # Angles that go by how long a row will be.
    "stretched": tiny.config({"rope": {"scaling": "dynamic_ntk", "original_context": 8, "factor": 4.0}}, **SHAPE),
}


class Made:
    """A model, its weights, and its forward pass."""

    def __init__(self, model):
        self.model, self.params = model, tiny.weights(model, seed=1)
        self.forward = jax.jit(lambda params, tokens: model.logits(params, tokens))

    def __iter__(self):
        return iter((self.model, self.params))

    def logits(self, prompt, ids) -> np.ndarray:
        """The logits `[T, V]` that each of `ids` after `prompt` comes from, by one forward pass."""
        row = np.zeros((1, CONTEXT), np.int32)
        row[0, : len(prompt) + len(ids)] = list(prompt) + list(ids)
        return np.asarray(self.forward(self.params, row))[0, len(prompt) - 1 : len(prompt) + len(ids) - 1]

    def logprobs(self, prompt, ids) -> np.ndarray:
        """The log-probabilities `[T]` of `ids` after `prompt`."""
        return np.asarray(jax.nn.log_softmax(self.logits(prompt, ids)))[np.arange(len(ids)), ids]


@pytest.fixture(scope="session")
def dense():
    return Made(tiny.one_device(CONFIGS["dense"]))


@pytest.fixture(
    scope="session",
    params=[name if name in ("dense", "latent") else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS],
)
def made(request, dense):
    """One of each kind."""
    return dense if request.param == "dense" else Made(tiny.one_device(CONFIGS[request.param]))
