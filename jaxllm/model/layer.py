"""What one layer of a model is: frozen, hashable settings of its attention and its feed-forward part."""

from typing import Literal

from jaxllm.config import settings

Activation = Literal["swiglu", "swiglu_clamped", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu2"]


def _refuse(**ignored):
    """Raises ValueError for settings that are set and would do nothing: name=(value, default, why)."""
    for name, (value, default, why) in ignored.items():
        if value != default:
            raise ValueError(f"{name}={value} would be ignored: {why}")


def positive(spec, *names: str) -> None:
    """Raises ValueError for a field that is set and not above 0 (at least 1 where it is an integer)."""
    for name in names:
        value = getattr(spec, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} must be {'at least 1' if isinstance(value, int) else 'above 0'}")


@settings
class RopeSpec:
    """Rotary position embeddings (Su et al. 2021, arXiv 2104.09864) and their extensions to longer contexts."""

    base: float = 10_000.0
    """Base of the wavelengths (theta)."""
    fraction: float = 1.0
    """Share of the head dimension that is rotated (partial rotary)."""
    scaling: Literal["none", "linear", "ntk", "dynamic_ntk", "yarn", "llama3", "longrope"] = "none"
    """How the wavelengths stretch for a longer context."""
    factor: float = 1.0
    """Longer context over original context."""
    original_context: int | None = None
    """Context the model was trained with before scaling (dynamic_ntk, yarn, llama3, longrope)."""
    beta_fast: float = 32.0
    """YaRN: dimensions that turn more often than this in the original context stay as they are."""
    beta_slow: float = 1.0
    """YaRN: dimensions that turn less often than this are interpolated."""
    truncate: bool = True
    """YaRN: whether the bounds between the two are rounded to whole dimensions (GPT-OSS: no)."""
    attention_factor: float | None = None
    """Factor on cos and sin; null means 0.1 ln(factor) + 1 (yarn) or sqrt(1 + ln(factor) / ln(original)) (longrope)."""
    low_freq_factor: float = 1.0
    """Llama 3: wavelengths above original_context / this are interpolated."""
    high_freq_factor: float = 4.0
    """Llama 3: wavelengths below original_context / this stay as they are."""
    short_factors: tuple[float, ...] | None = None
    """LongRoPE: what each wavelength is multiplied by in rows of up to original_context tokens."""
    long_factors: tuple[float, ...] | None = None
    """LongRoPE: the same for longer rows."""

    def __post_init__(self):
        if self.base <= 0 or self.factor < 1 or not 0 < self.fraction <= 1:
            raise ValueError(f"rope needs base > 0, factor >= 1, 0 < fraction <= 1; got {self}")
        positive(self, "original_context", "beta_slow", "low_freq_factor", "high_freq_factor")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be below high_freq_factor={self.high_freq_factor}"
            )
        if self.scaling == "none":
            _refuse(factor=(self.factor, 1.0, "set scaling, such as scaling=yarn"))
        needs_original = self.scaling in ("dynamic_ntk", "yarn", "llama3", "longrope")
        if needs_original and self.original_context is None:
            raise ValueError(f"rope scaling {self.scaling} needs original_context, the context before scaling")
        if not needs_original:
            _refuse(original_context=(self.original_context, None, f"scaling {self.scaling} does not read it"))
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast={self.beta_fast} must not be below beta_slow={self.beta_slow}")
        self._refuse_of_other_scalings()
        if self.scaling == "longrope":
            self._check_longrope()

    def _refuse_of_other_scalings(self):
        why = f"scaling {self.scaling} does not read it"
        if self.scaling not in ("yarn", "longrope"):
            _refuse(attention_factor=(self.attention_factor, None, why))
        if self.scaling != "yarn":
            _refuse(beta_fast=(self.beta_fast, 32.0, why), beta_slow=(self.beta_slow, 1.0, why))
            _refuse(truncate=(self.truncate, True, why))
        if self.scaling != "llama3":
            _refuse(
                low_freq_factor=(self.low_freq_factor, 1.0, why), high_freq_factor=(self.high_freq_factor, 4.0, why)
            )
        if self.scaling != "longrope":
            _refuse(short_factors=(self.short_factors, None, why), long_factors=(self.long_factors, None, why))

    def _check_longrope(self):
        for name in ("short_factors", "long_factors"):
            factors = getattr(self, name)
            if not factors or min(factors) <= 0:
                raise ValueError(f"rope scaling longrope needs {name}, a positive number for each pair; got {factors}")
        if self.attention_factor is not None:
            _refuse(factor=(self.factor, 1.0, f"attention_factor={self.attention_factor} is set"))

    @property
    def by_length(self) -> bool:
        """Whether the angles depend on how long a row is."""
        return self.scaling in ("dynamic_ntk", "longrope")


@settings
class LatentSpec:
    """Multi-head latent attention: keys and values are made from one short vector a token, which is what a cache holds.

    DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C.
    """

    kv_rank: int
    """Width of the vector that all heads' keys and values are made from."""
    q_rank: int | None = None
    """Width of the vector that the queries are made from; null makes them from the residual stream."""
    rope_head: int
    """Rotated dimensions of a query and of the one key that all heads share, beside the head dimension."""
    v_head: int
    """Dimension of a head's values."""
    norm_eps: float = 1e-6
    """Added to the variance in the norms of the short vectors."""

    def __post_init__(self):
        positive(self, "kv_rank", "q_rank", "rope_head", "v_head", "norm_eps")


@settings
class AttnSpec:
    """Causal self-attention with grouped queries (Ainslie et al. 2023, arXiv 2305.13245)."""

    heads: int
    """Query heads."""
    kv_heads: int | None = None
    """Key and value heads: null means as many as heads (multi-head), 1 is multi-query."""
    head: int | None = None
    """Dimension of a head; null means embed / heads. Latent attention adds its rotated dimensions to it."""
    latent: LatentSpec | None = None
    """Multi-head latent attention (DeepSeek); null for plain keys and values."""
    rope: RopeSpec | None = RopeSpec()
    """Rotary positions; null for none."""
    alibi: bool = False
    """Linear distance penalties instead of rotary positions (Press et al. 2022)."""
    window: int | None = None
    """Sliding window: a query sees this many positions, itself included; null sees all."""
    scale: float | None = None
    """Factor on the logits; null means head ** -0.5, with latent attention (head + rope_head) ** -0.5."""
    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap)."""
    qk_norm: Literal["head", "all"] | None = None
    """RMSNorm of queries and keys, per head (Qwen3, Gemma 3) or over all heads together (OLMo 2); as `norm` has it."""
    sinks: bool = False
    """A learned logit per head that takes part in the softmax and holds no value (GPT-OSS)."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    out_bias: bool = False
    """Bias on the output projection."""

    def __post_init__(self):
        positive(self, "heads", "kv_heads", "head", "window", "scale", "softcap")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.alibi and self.rope is not None:
            raise ValueError("alibi=true and rope are both set; set rope to null")
        if self.latent is not None:
            why = "latent attention makes each head's key from the compressed one"
            _refuse(kv_heads=(self.kv_heads, None, why), qk_norm=(self.qk_norm, None, "latent attention has its own"))
            _refuse(qkv_bias=(self.qkv_bias, False, "latent attention has none"))


@settings
class MlpSpec:
    """Feed-forward layer: gated (SwiGLU, GeGLU; Shazeer 2020, arXiv 2002.05202) or plain (GELU, ReLU squared)."""

    ffw: int
    """Hidden width."""
    activation: Activation = "swiglu"
    """swiglu, geglu and geglu_tanh are gated; gelu, gelu_tanh and relu2 have two matrices. swiglu_clamped is GPT-OSS's
    form of swiglu: gate * sigmoid(1.702 gate) * (up + 1), with gate and up held within 7."""
    bias: bool = False
    """Biases on all its projections."""

    def __post_init__(self):
        positive(self, "ffw")


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
    bias: bool = False
    """Biases on all projections of the experts, the shared one included."""
    router_bias: bool = False
    """A learned bias on the router's logits (GPT-OSS); balance=bias is another one, which learns from the load."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Router scores: softmax over the experts, or a sigmoid of each (DeepSeek-V3)."""
    renormalize: bool = True
    """Whether the chosen scores are divided by their sum (Mixtral: yes; OLMoE: no)."""
    scale: float = 1.0
    """Factor on the routed output (DeepSeek-V3: 2.5)."""
    groups: int = 1
    """The experts lie in this many groups, and a token chooses within its best ones (DeepSeek-V2, section 2.2.2)."""
    groups_per_token: int | None = None
    """Groups that a token may choose from."""
    group_score: Literal["max", "top2"] | None = None
    """A group is as good as its best expert (DeepSeek-V2), or its two best together (V3); balancing biases count."""
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
        positive(self, "experts", "ffw", "scale", "capacity_factor", "bias_rate", "groups")
        if self.shared_ffw < 0 or self.z_coef < 0:
            raise ValueError(f"shared_ffw={self.shared_ffw} and z_coef={self.z_coef} must not be negative")
        if not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(f"experts_per_token={self.experts_per_token} must lie in 1 to experts={self.experts}")
        if self.balance not in ("sequence", "batch"):
            _refuse(balance_coef=(self.balance_coef, None, f"balance={self.balance} has no loss"))
        if self.balance != "bias":
            _refuse(bias_rate=(self.bias_rate, None, f"balance={self.balance} has no bias"))
        self._check_groups()

    def _check_groups(self):
        if self.groups == 1:
            _refuse(groups_per_token=(self.groups_per_token, None, "groups=1"))
            return _refuse(group_score=(self.group_score, None, "groups=1"))
        if self.experts % self.groups:
            raise ValueError(f"experts={self.experts} must be a multiple of groups={self.groups}")
        if self.groups_per_token is None or self.group_score is None:
            raise ValueError(f"groups={self.groups} needs groups_per_token and group_score")
        size = self.experts // self.groups
        if not 1 <= self.groups_per_token <= self.groups:
            raise ValueError(f"groups_per_token={self.groups_per_token} must lie in 1 to groups={self.groups}")
        if self.experts_per_token > self.groups_per_token * size:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than groups_per_token={self.groups_per_token} "
                f"groups of {size} experts hold"
            )
        if self.group_score == "top2" and size < 2:
            raise ValueError(f"group_score=top2 needs groups of two experts or more; groups={self.groups} have {size}")


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
