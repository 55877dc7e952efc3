"""What a model is: frozen, hashable settings. `transformer.py` computes what they say; nothing else defines a model."""

import dataclasses
from typing import Literal

from jaxllm.config import settings

Activation = Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu2"]

#: Values that rematerialisation can keep or offload, in the order in which a layer makes them.
REMAT_NAMES = ("q", "k", "v", "attention", "attention_out", "gate", "up", "mlp_out")
REMAT_PRESETS = {
    "qkv": ("q", "k", "v"),
    "minimal": REMAT_NAMES,
    "offload_qkv": ("offload:q", "offload:k", "offload:v"),
}


def _refuse(**ignored):
    """Raises ValueError for settings that are set and would do nothing: name=(value, default, why)."""
    for name, (value, default, why) in ignored.items():
        if value != default:
            raise ValueError(f"{name}={value} would be ignored: {why}")


@settings
class RopeSpec:
    """Rotary position embeddings (Su et al. 2021, arXiv 2104.09864) and their extensions to longer contexts."""

    base: float = 10_000.0
    """Base of the wavelengths (theta)."""
    fraction: float = 1.0
    """Share of the head dimension that is rotated (partial rotary)."""
    scaling: Literal["none", "linear", "ntk", "dynamic_ntk", "yarn", "llama3"] = "none"
    """How the wavelengths stretch for a longer context."""
    factor: float = 1.0
    """Longer context over original context."""
    original_context: int | None = None
    """Context the model was trained with before scaling (dynamic_ntk, yarn, llama3)."""
    beta_fast: float = 32.0
    """YaRN: dimensions that turn more often than this in the original context stay as they are."""
    beta_slow: float = 1.0
    """YaRN: dimensions that turn less often than this are interpolated."""
    attention_factor: float | None = None
    """YaRN: factor on cos and sin; null means 0.1 ln(factor) + 1."""
    low_freq_factor: float = 1.0
    """Llama 3: wavelengths above original_context / this are interpolated."""
    high_freq_factor: float = 4.0
    """Llama 3: wavelengths below original_context / this stay as they are."""

    def __post_init__(self):
        if self.base <= 0 or self.factor < 1 or not 0 < self.fraction <= 1:
            raise ValueError(f"rope needs base > 0, factor >= 1, 0 < fraction <= 1; got {self}")
        if self.scaling == "none":
            _refuse(factor=(self.factor, 1.0, "set scaling, such as scaling=yarn"))
        needs_original = self.scaling in ("dynamic_ntk", "yarn", "llama3")
        if needs_original and self.original_context is None:
            raise ValueError(f"rope scaling {self.scaling} needs original_context, the context before scaling")
        if not needs_original:
            _refuse(original_context=(self.original_context, None, f"scaling {self.scaling} does not read it"))
        if self.scaling != "yarn":
            why = "only scaling=yarn reads it"
            _refuse(beta_fast=(self.beta_fast, 32.0, why), beta_slow=(self.beta_slow, 1.0, why))
            _refuse(attention_factor=(self.attention_factor, None, why))
        if self.scaling != "llama3":
            why = "only scaling=llama3 reads it"
            _refuse(
                low_freq_factor=(self.low_freq_factor, 1.0, why), high_freq_factor=(self.high_freq_factor, 4.0, why)
            )


@settings
class AttnSpec:
    """Causal self-attention with grouped queries (Ainslie et al. 2023, arXiv 2305.13245)."""

    heads: int
    """Query heads."""
    kv_heads: int | None = None
    """Key and value heads: null means as many as heads (multi-head), 1 is multi-query."""
    head: int | None = None
    """Dimension of a head; null means embed / heads."""
    rope: RopeSpec | None = RopeSpec()
    """Rotary positions; null for none."""
    alibi: bool = False
    """Linear distance penalties instead of rotary positions (Press et al. 2022)."""
    window: int | None = None
    """Sliding window: a query sees this many positions, itself included; null sees all."""
    scale: float | None = None
    """Factor on the logits; null means head ** -0.5."""
    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap)."""
    qk_norm: Literal["head", "all"] | None = None
    """RMSNorm of queries and keys, per head (Qwen3, Gemma 3) or over all heads together (OLMo 2)."""
    sinks: bool = False
    """A learned logit per head that takes part in the softmax and holds no value (GPT-OSS)."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    out_bias: bool = False
    """Bias on the output projection."""

    def __post_init__(self):
        if self.heads < 1 or self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.alibi and self.rope is not None:
            raise ValueError("alibi=true and rope are both set; set rope to null")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")


@settings
class MlpSpec:
    """Feed-forward layer: gated (SwiGLU, GeGLU; Shazeer 2020, arXiv 2002.05202) or plain (GELU, ReLU squared)."""

    ffw: int
    """Hidden width."""
    activation: Activation = "swiglu"
    """swiglu, geglu and geglu_tanh are gated; gelu, gelu_tanh and relu2 have two matrices."""
    bias: bool = False
    """Biases on all its projections."""


@settings
class MoeSpec:
    """Mixture of experts: a router sends each token to a few feed-forward layers (Shazeer et al. 2017)."""

    experts: int
    """Number of routed experts."""
    experts_per_token: int = 2
    """Experts chosen for each token (top-k)."""
    ffw: int
    """Hidden width of one expert."""
    activation: Activation = "swiglu"
    """As for the dense layer."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Router scores: softmax over the experts, or a sigmoid of each (DeepSeek-V3)."""
    renormalize: bool = True
    """Whether the chosen scores are divided by their sum (Mixtral: yes; OLMoE: no)."""
    scale: float = 1.0
    """Factor on the routed output (DeepSeek-V3: 2.5)."""
    shared_ffw: int = 0
    """Hidden width of the shared expert that every token passes; 0 for none."""
    capacity_factor: float | None = None
    """Tokens an expert takes from a row, over its fair share; the rest are dropped. Null drops none. Not causal: a
    later token's first choice goes before an earlier one's second (as in GShard)."""
    balance: Literal["sequence", "batch", "bias", "none"] = "sequence"
    """Load balancing: a loss per row or over the batch, a router bias without a loss (arXiv 2408.15664), or none."""
    balance_coef: float | None = None
    """Weight of the balancing loss; null means 0.01."""
    bias_rate: float | None = None
    """balance=bias: change of the bias in a step; null means 0.001."""
    z_coef: float = 0.001
    """Weight of the router z-loss (ST-MoE, arXiv 2202.08906, equation 5)."""

    def __post_init__(self):
        if not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(f"experts_per_token={self.experts_per_token} must lie in 1 to experts={self.experts}")
        if self.balance not in ("sequence", "batch"):
            _refuse(balance_coef=(self.balance_coef, None, f"balance={self.balance} has no loss"))
        if self.balance != "bias":
            _refuse(bias_rate=(self.bias_rate, None, f"balance={self.balance} has no bias"))
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(f"capacity_factor={self.capacity_factor} must be positive, or null to drop no token")


@settings
class LayerSpec:
    """One decoder layer: attention, then a dense or a mixture-of-experts feed-forward layer."""

    attn: AttnSpec
    """The attention of this layer."""
    mlp: MlpSpec | None = None
    """Dense feed-forward layer; exactly one of mlp and moe is set."""
    moe: MoeSpec | None = None
    """Mixture-of-experts layer."""

    def __post_init__(self):
        if (self.mlp is None) == (self.moe is None):
            raise ValueError("a layer has exactly one of mlp and moe")


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
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm, or LayerNorm with a bias."""
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
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        for spec in (*self.prefix, *self.pattern):
            self._check_attention(spec.attn)
        remat_policy_names(self.remat)

    def _check_attention(self, attn: AttnSpec):
        if attn.head is None and self.embed % attn.heads:
            raise ValueError(f"embed={self.embed} does not divide by heads={attn.heads}; set attn.head, or other heads")
        if attn.rope:
            rotated = int(self.head_dim(attn) * attn.rope.fraction)
            least = 4 if attn.rope.scaling in ("ntk", "dynamic_ntk") else 2  # NTK divides by the dimensions less 2
            if rotated % 2 or rotated < least:
                raise ValueError(f"rope needs an even head * fraction of at least {least}, got {rotated}")

    def head_dim(self, attn: AttnSpec) -> int:
        return attn.head or self.embed // attn.heads

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
    def padded_vocab(self) -> int:
        return -(-self.vocab // self.vocab_multiple) * self.vocab_multiple


@settings
class Kernels:
    """How the same numbers are computed; never changes what a model is."""

    attention: Literal["blockwise", "reference"] = "blockwise"
    """Training attention: by chunks with its own backward pass, or with all logits in memory."""
    unroll: int | None = None
    """Up to this many layers run unrolled, more are scanned; null means 8 on CPU (8 to 20 % faster), 0 elsewhere."""


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


def with_rope(config: ModelConfig, **changes) -> ModelConfig:
    """The same model with other RoPE settings in every layer that has RoPE (context extension)."""

    def swap(spec: LayerSpec) -> LayerSpec:
        if spec.attn.rope is None:
            return spec
        attn = dataclasses.replace(spec.attn, rope=dataclasses.replace(spec.attn.rope, **changes))
        return dataclasses.replace(spec, attn=attn)

    return dataclasses.replace(config, pattern=tuple(map(swap, config.pattern)), prefix=tuple(map(swap, config.prefix)))
