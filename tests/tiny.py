"""Tiny models and batches that many tests share."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import tree
from jaxllm.config import parse
from jaxllm.data.batch import TokenBatch
from jaxllm.model.build import Model, build
from jaxllm.model.spec import Kernels, ModelConfig
from jaxllm.sharding import ParallelConfig, make_sharding

VOCAB = 61


def config(attn=None, mlp=None, moe=None, **model) -> ModelConfig:
    """One kind of layer, unless `pattern` says otherwise; `mlp` gives way to `moe`."""
    layer = {"attn": {"heads": 4, "kv_heads": 2} | (attn or {})}
    layer |= {"moe": {"experts": 4, "ffw": 24} | moe} if moe is not None else {"mlp": {"ffw": 48} | (mlp or {})}
    raw = {"vocab": VOCAB, "embed": 32, "layers": 2, "pattern": [layer], "context": 64}
    return parse(ModelConfig, raw | model)


def layer(attn=None, mlp=None, moe=None) -> dict:
    """The settings of one layer, for `pattern` and `prefix`."""
    out = {"attn": {"heads": 4, "kv_heads": 2} | (attn or {})}
    return out | ({"moe": {"experts": 4, "ffw": 24} | moe} if moe is not None else {"mlp": {"ffw": 48} | (mlp or {})})


#: Two kinds of attention, a remainder after the last period, tied and padded vocabulary.
DENSE = config(
    pattern=[layer({"window": 5}), layer({"qk_norm": "head"})],
    layers=5,
    tied=True,
    vocab_multiple=8,
    logit_softcap=20.0,
)
#: A dense layer first, then experts with a shared one beside them.
MOE = config(prefix=[layer()], layers=3, moe={"shared_ffw": 16}, vocab_multiple=8)


#: Families that between them have every mechanism; of tests of all families, the others are left to `make slow`.
CORE = ("gpt2", "llama3.1", "gemma3", "qwen3_moe", "phi3-longrope", "olmo2", "gpt_oss", "deepseek_v3")


def families(variants) -> list:
    """Parameters of a test of all of `variants`, those outside of CORE marked slow."""
    return [v if v in CORE else pytest.param(v, marks=pytest.mark.slow) for v in variants]


def one_device(config: ModelConfig, **kernels) -> Model:
    return build(config, make_sharding(ParallelConfig(), jax.devices()[:1]), Kernels(**kernels))


def weights(model: Model, seed: int = 0):
    """Weights in which nothing is at its neutral start: norms are not 1, biases and sinks are not 0.

    Drawn by NumPy, because compiling `model.init` takes longer than most tests.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        if path.endswith(("norm", "scale")):
            value = 1 + 0.3 * noise
        elif path.endswith(("bias", "sinks")):
            value = 0.3 * noise
        else:
            value = noise * model.config.embed**-0.5
        return jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding)

    return tree.map_with_path(draw, model.abstract)


def batch(rows: int = 4, length: int = 16, seed: int = 0, vocab: int = VOCAB) -> TokenBatch:
    """Packed rows: two or three documents each, odd rows end in padding; the first target of a row is not predicted."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, length), np.int32)
    for row in range(rows):
        cuts = np.sort(rng.choice(np.arange(2, length - 3), 2, replace=False))
        segments[row] = 1 + np.searchsorted(cuts, np.arange(length), side="right")
        if row % 2:
            segments[row, -3:] = 0
    return packed(rng.integers(0, vocab, (rows, length)), segments, rng)


def packed(tokens_BT, segments_BT, rng=None) -> TokenBatch:
    """The batch of these tokens and segments, with positions that start over in each document."""
    rng = rng or np.random.default_rng(0)
    segments = np.asarray(segments_BT, np.int32)
    new = np.diff(segments, axis=1, prepend=-1) != 0
    index = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    positions = index - np.maximum.accumulate(np.where(new, index, 0), axis=1)
    mask = (segments > 0).astype(np.float32)
    mask[:, 0] = 0
    targets = rng.integers(0, VOCAB, segments.shape)
    arrays = (np.asarray(tokens_BT, np.int32), targets.astype(np.int32), mask, positions.astype(np.int32), segments)
    return TokenBatch(*map(jnp.asarray, arrays))


def where(batch: TokenBatch) -> dict:
    """The keyword arguments of `Model.apply` that say where each token lies."""
    return {"positions_BT": batch.positions_BT, "segments_BT": batch.segments_BT}


def relative(a, b) -> float:
    """Largest difference over the largest entry of `b`, as float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.max(np.abs(a - b), initial=0) / np.maximum(np.max(np.abs(b), initial=0), 1e-30))


def worst(a, b) -> float:
    """The largest `relative` over the leaves of two trees."""
    return max(jax.tree.leaves(jax.tree.map(relative, a, b)))


def bit_equal(a, b) -> bool:
    """Whether two trees have the same structure and the same bits."""
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(same))


def check_golden(path: Path, kind: str, losses: list[float]) -> None:
    """Losses as recorded; rounding differs between versions and grows, hence the growing tolerance.

    After an intended change: `JAXLLM_GOLDEN=write pytest THE_TEST`, and look at the difference.
    """
    stored = json.loads(path.read_text()) if path.exists() else {}
    if os.environ.get("JAXLLM_GOLDEN") == "write":
        path.write_text(json.dumps(stored | {"jax": jax.__version__, kind: losses}, indent=1) + "\n")
        return
    for i, (loss, expected) in enumerate(zip(losses, stored[kind], strict=True)):
        assert abs(loss - expected) < 1e-5 * (1 + i) * expected, f"step {i}: {loss} and not {expected}"


def arrays(jaxpr):
    """Shapes and dtypes of all intermediate results in a jaxpr, inner ones included."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in jaxpr.eqns:
        yield from (v.aval for v in eqn.outvars)
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from arrays(inner)
