"""What a model is: frozen, hashable settings. `transformer.py` computes what they say; nothing else defines a model."""

from collections.abc import Sequence
from typing import Literal

from jaxllm.config import settings
from jaxllm.model.layer import AttnSpec, LatentSpec, LayerSpec, MlpSpec, MoeSpec, RopeSpec, positive

__all__ = [
    "AttnSpec",
    "Kernels",
    "LatentSpec",
    "LayerSpec",
    "MlpSpec",
    "ModelConfig",
    "MoeSpec",
    "RopeSpec",
    "fold",
    "remat_policy_names",
]

#: Values that rematerialisation can keep or offload, in the order in which a layer makes them.
REMAT_NAMES = ("q", "k", "v", "attention", "attention_out", "gate", "up", "mlp_out")
REMAT_PRESETS = {
    "qkv": ("q", "k", "v"),
    "minimal": REMAT_NAMES,
    "offload_qkv": ("offload:q", "offload:k", "offload:v"),
}


@settings
class ModelConfig:
    """A decoder-only transformer."""

    vocab: int
    """Token ids are 0 to vocab - 1."""
    embed: int
    """Width of the residual stream."""
    layers: int
    """Number of layers, prefix included."""
    pattern: tuple[LayerSpec, ...]
    """The layers repeat this sequence; whole repeats are scanned, a remainder follows unscanned."""
    prefix: tuple[LayerSpec, ...] = ()
    """Layers before the pattern begins, such as the first dense layers of a mixture of experts."""
    context: int = 2048
    """Longest sequence the model is meant for."""
    positions: Literal["none", "learned", "sinusoidal"] = "none"
    """Absolute positions added to the embeddings (rotary ones and ALiBi belong to the attention)."""
    norm: Literal["rms", "rms_unit_offset", "layer"] = "rms"
    """RMSNorm; the same with weights stored less one (Gemma); or LayerNorm with a bias."""
    norm_placement: Literal["pre", "post", "both"] = "pre"
    """pre: x + f(norm(x)); post: x + norm(f(x)) (OLMo 2); both: x + norm(f(norm(x))) (Gemma 2)."""
    norm_eps: float = 1e-6
    """Added to the variance."""
    tied: bool = False
    """The output head is the embedding table."""
    embed_scale: float | None = None
    """Factor on the embeddings (Gemma: sqrt(embed)); null for none."""
    logit_softcap: float | None = None
    """Final logits become softcap * tanh(logits / softcap)."""
    dropout: float = 0.0
    """Share of activations dropped after the embedding and each sublayer, in training only."""
    vocab_multiple: int = 1
    """Pads the rows of embedding and head to a multiple of this; padded ids are never predicted."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Compute dtype; weights, norms, softmax and loss are float32."""
    remat: str | tuple[str, ...] = "none"
    """Rematerialisation: none, full, a preset (qkv, minimal, offload_qkv) or names to keep (`offload:` offloads)."""

    def __post_init__(self):
        if not self.pattern:
            raise ValueError("pattern needs at least one layer")
        if self.layers < 1 or len(self.prefix) > self.layers:
            raise ValueError(f"layers={self.layers} must be at least 1 and cover the prefix of {len(self.prefix)}")
        positive(self, "vocab", "embed", "context", "vocab_multiple", "norm_eps", "embed_scale", "logit_softcap")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        for spec in (*self.prefix, *self.pattern):
            self._check_attention(spec.attn)
        remat_policy_names(self.remat)

    def _check_attention(self, attn: AttnSpec):
        if attn.head is None and self.embed % attn.heads:
            raise ValueError(f"embed={self.embed} does not divide by heads={attn.heads}; set attn.head, or other heads")
        if attn.rope:
            self._check_rope(attn.rope, int(self.rope_dim(attn) * attn.rope.fraction))

    def _check_rope(self, rope: RopeSpec, rotated: int):
        least = 4 if rope.scaling in ("ntk", "dynamic_ntk") else 2  # NTK divides by the dimensions less 2
        if rotated % 2 or rotated < least:
            raise ValueError(f"rope needs an even head * fraction of at least {least}, got {rotated}")
        for name in ("short_factors", "long_factors"):
            factors = getattr(rope, name)
            if factors is not None and len(factors) != rotated // 2:
                raise ValueError(
                    f"rope.{name} has {len(factors)} numbers, but {rotated} rotated dimensions need {rotated // 2}"
                )

    def head_dim(self, attn: AttnSpec) -> int:
        """Dimension of a head; with latent attention the part of queries and keys that has no position."""
        return attn.head or self.embed // attn.heads

    def qk_dim(self, attn: AttnSpec) -> int:
        """Dimension of a query and a key."""
        return self.head_dim(attn) + (attn.latent.rope_head if attn.latent else 0)

    def v_dim(self, attn: AttnSpec) -> int:
        """Dimension of a value."""
        return attn.latent.v_head if attn.latent else self.head_dim(attn)

    def attention_dim(self, attn: AttnSpec) -> float:
        """Mean of both: what one query costs for each key and head, in multiply-adds, is twice this."""
        return (self.qk_dim(attn) + self.v_dim(attn)) / 2

    def rope_dim(self, attn: AttnSpec) -> int:
        """The dimensions that rotary positions may turn; `rope.fraction` of them are turned."""
        return attn.latent.rope_head if attn.latent else self.head_dim(attn)

    @property
    def periods(self) -> int:
        """Whole repeats of the pattern."""
        return (self.layers - len(self.prefix)) // len(self.pattern)

    @property
    def suffix(self) -> tuple[LayerSpec, ...]:
        """The layers after the last whole repeat."""
        return self.pattern[: (self.layers - len(self.prefix)) % len(self.pattern)]

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """The spec of every layer, in order."""
        return self.prefix + self.pattern * self.periods + self.suffix

    @property
    def dropless(self) -> bool:
        """Whether some layer has experts that compute all rows that choose them."""
        return any(spec.moe is not None and spec.moe.capacity_factor is None for spec in self.layer_specs)

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab // self.vocab_multiple) * self.vocab_multiple


@settings
class Kernels:
    """How the numbers are computed; never changes what a model is."""

    attention: Literal["auto", "splash", "cudnn", "blockwise", "reference"] = "auto"
    """Training attention: splash is for TPU, cudnn for GPU; blockwise goes by chunks with its own backward pass,
    reference holds all logits in memory. auto takes the best one for the devices and logs which, and why."""
    context: Literal["gather", "ring"] = "gather"
    """Where parallel.context splits rows: gather brings all keys and values of a row to each device, ring passes them
    around, so that a device holds its own and those of one other."""
    experts: Literal["wait", "lend"] = "wait"
    """Where parallel.expert splits experts and some get more rows than others: wait leaves rows to the device of their
    expert, lend brings weights of hot experts to devices with less to do, whenever that should be faster."""
    unroll: int | None = None
    """Up to this many layers run unrolled, more are scanned; null means 8 on CPU (8 to 20 % faster), 0 elsewhere."""
    cache: Literal["float", "int8"] = "float"
    """Of generation: int8 rounds what the key-value cache keeps to 8 bits, with a scale for each head and position."""


def remat_policy_names(remat: str | tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """`(names to save, names to offload)`, or None for no rematerialisation. Raises ValueError for unknown names."""
    if remat == "none":
        return None
    names = () if remat == "full" else REMAT_PRESETS.get(remat) if isinstance(remat, str) else remat
    if names is None:
        raise ValueError(f"remat={remat!r}: known are none, full, {', '.join(REMAT_PRESETS)}, or a list of names")
    for name in names:
        if name.removeprefix("offload:") not in REMAT_NAMES:
            raise ValueError(f"remat name {name!r}: known are {', '.join(REMAT_NAMES)}")
    offload = tuple(n.removeprefix("offload:") for n in names if n.startswith("offload:"))
    return tuple(n for n in names if not n.startswith("offload:")), offload


def fold(layers: Sequence[LayerSpec]) -> tuple[tuple[LayerSpec, ...], tuple[LayerSpec, ...]]:
    """The shortest `(prefix, pattern)` whose `ModelConfig.layer_specs` are these layers.

    At equal length the one that leaves fewer layers to the suffix, then the one with less prefix. Example: three dense
    layers, then 58 with experts -> a prefix of three and a pattern of one.
    """
    kinds = {spec: i for i, spec in enumerate(dict.fromkeys(layers))}
    ids, n = [kinds[spec] for spec in layers], len(layers)
    for total in range(1, n + 1):
        # From `total` on, every layer equals the one a period before it.
        starts = [start for start in range(total) if ids[total:] == ids[start : n - total + start]]
        if starts:
            start = min(starts, key=lambda start: (n - start) % (total - start))
            return tuple(layers[:start]), tuple(layers[start:total])
    raise ValueError("fold needs at least one layer")
