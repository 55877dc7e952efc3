"""The equations of a decoder layer in float64 NumPy, one function for each mechanism.

T query positions, S key positions, N query heads, K kv heads, H head, D embed, F ffw, E experts, X experts chosen.
"""

import math
from collections.abc import Callable

import numpy as np

from jaxllm.errors import SettingsError, nearest

Tensor = Callable[[str], np.ndarray]


class Weights:
    """Raw tensors under a prefix, each turned into float64 when it is asked for and not kept."""

    def __init__(self, tensor: Tensor, prefix: str = "", block: tuple[int, int] = (128, 128)):
        self.raw, self.prefix, self.block = tensor, prefix, block

    def at(self, name: str) -> "Weights":
        """The tensors under `name`."""
        return Weights(self.raw, f"{self.prefix}{name}.", self.block)

    def get(self, name: str) -> np.ndarray:
        """The tensor as it is stored."""
        return self.raw(self.prefix + name)

    def __call__(self, name: str) -> np.ndarray:
        """The tensor in float64; fp8 times the scale of its block (DeepSeek-V3, arXiv 2412.19437, section 3.3)."""
        raw = self.get(name)
        value = raw.astype(np.float64)
        if raw.dtype.name.startswith("float8"):
            scale = self.get(f"{name}_scale_inv").astype(np.float64)
            for axis, size in enumerate(self.block):
                scale = np.repeat(scale, size, axis)
            value = value * scale[: value.shape[0], : value.shape[1]]
        return value

    def linear(self, name: str, x: np.ndarray, bias: bool = False) -> np.ndarray:
        """x W^T + b, the weight stored as [out, in]."""
        y = x @ self(f"{name}.weight").T
        return y + self(f"{name}.bias") if bias else y


def rms_norm(x, weight, eps):
    """arXiv 1910.07467, equation 4."""
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * weight


def layer_norm(x, weight, bias, eps):
    """arXiv 1607.06450."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "silu": silu,
    "swish": silu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
}


def activation(name: str) -> Callable:
    """Raises SettingsError for a name that is not known."""
    if name not in ACTIVATIONS:
        raise SettingsError(f"config.json: activation {name!r} is not known{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def softcap(x, cap: float | None):
    """Gemma 2 (arXiv 2408.00118, section 2): cap tanh(x / cap)."""
    return cap * np.tanh(x / cap) if cap else x


def attend(q_TNH, k_SKH, v_SKH, scale, window=None, cap=None, sinks_N=None):
    """Causal attention of consecutive positions, `[T, N, H]`; query head n reads kv head n K / N (arXiv 2305.13245).

    A query sees itself and the `window - 1` keys before it (Mistral, arXiv 2310.06825). A sink is a logit that takes
    part in the softmax and has no value (gpt-oss model card, section 2.1).
    """
    T, N, K = len(q_TNH), q_TNH.shape[1], k_SKH.shape[1]
    out = np.empty((T, N, v_SKH.shape[2]))
    behind = np.arange(T)[:, None] - np.arange(T)
    seen = (behind >= 0) & (behind < (window or T))
    for n in range(N):
        logits = softcap(q_TNH[:, n] @ k_SKH[:, n * K // N].T * scale, cap)
        logits = np.where(seen, logits, -np.inf)
        if sinks_N is not None:
            logits = np.concatenate([logits, np.full((T, 1), sinks_N[n])], 1)
        out[:, n] = softmax(logits)[:, :T] @ v_SKH[:, n * K // N]
    return out


def gated(w: Weights, x, act: Callable, bias: bool = False, names=("gate_proj", "up_proj", "down_proj")):
    """down(act(gate x) * up x) (arXiv 2002.05202, section 2)."""
    gate, up, down = names
    return w.linear(down, act(w.linear(gate, x, bias)) * w.linear(up, x, bias), bias)


def top(scores, k: int):
    """Indices of the k largest along the last axis."""
    return np.argsort(-scores, -1, kind="stable")[..., :k]


def choose(scores_TE, k: int, renormalize: bool):
    """`(experts, weights)`, each `[T, X]`: the k largest scores of each token (arXiv 2401.04088, section 2.1)."""
    experts = top(scores_TE, k)
    weights = np.take_along_axis(scores_TE, experts, -1)
    return experts, weights / weights.sum(-1, keepdims=True) if renormalize else weights


def within_groups(scores_TE, groups: int, chosen: int, best: int, fill: float):
    """Scores outside of each token's `chosen` groups become `fill`; a group is ranked by the sum of its `best` largest.

    best = 1: DeepSeek-V2 (arXiv 2405.04434, section 2.2.2); best = 2: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
    """
    grouped = scores_TE.reshape(len(scores_TE), groups, -1)
    rank = np.sort(grouped, -1)[..., -best:].sum(-1)
    kept = np.zeros(rank.shape, bool)
    np.put_along_axis(kept, top(rank, chosen), True, -1)
    return np.where(kept[..., None], grouped, fill).reshape(scores_TE.shape)


def mixture(x_TD, experts_TX, weights_TX, expert: Callable[[int, np.ndarray], np.ndarray]):
    """Sum over the chosen experts of weight times expert(x); only those that some token chose are read."""
    out = np.zeros_like(x_TD)
    for e in np.unique(experts_TX):
        t, slot = np.nonzero(experts_TX == e)
        out[t] += weights_TX[t, slot, None] * expert(int(e), x_TD[t])
    return out


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4(blocks, scales):
    """`[..., groups, 16]` bytes and `[..., groups]` exponents as `[..., groups * 32]` numbers.

    OCP Microscaling Formats 1.0, section 5.3: E2M1 numbers, two in a byte, the low half first; 32 share 2^(s - 127).
    """
    values = FP4[np.stack([blocks & 15, blocks >> 4], -1)].reshape(*scales.shape, 32)
    return np.ldexp(values, scales.astype(np.int32)[..., None] - 127).reshape(*scales.shape[:-1], -1)


def clamped_swiglu(gate_up, alpha: float, limit: float):
    """gpt-oss: gate and up take turns, both are clamped, and one is added to up (model card, section 2.2)."""
    gate, up = np.minimum(gate_up[..., 0::2], limit), np.clip(gate_up[..., 1::2], -limit, limit)
    return gate * sigmoid(alpha * gate) * (up + 1)
