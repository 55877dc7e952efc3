"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases, GELU; matrices stored input-major."""

from jaxllm.families.base import Family, Map
from jaxllm.families.keys import Keys
from jaxllm.model.spec import AttnSpec, LayerSpec, MlpSpec, ModelConfig, fold

PLAIN = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu"}


def read(keys: Keys) -> ModelConfig:
    embed, heads, layers = (keys.number(f"n_{name}") for name in ("embd", "head", "layer"))
    context = keys.number("n_positions")
    keys.ignore("n_ctx", "n_positions says it")
    keys.expect("activation_function", *PLAIN)
    keys.expect("scale_attn_weights", True)
    keys.expect("add_cross_attention", False)
    keys.expect("scale_attn_by_inverse_layer_idx", False)
    keys.ignore("reorder_and_upcast_attn", "changes rounding in half precision only")
    for key in ("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"):
        keys.ignore(key, "belongs to another head than the language model's")
    keys.ignore("summary_first_dropout", "belongs to another head than the language model's")
    attn = AttnSpec(heads=heads, rope=None, qkv_bias=True, out_bias=True)
    hidden = PLAIN[keys.get("activation_function", "gelu_new")]
    mlp = MlpSpec(ffw=keys.number("n_inner", 4 * embed), activation=hidden, bias=True)
    prefix, pattern = fold([LayerSpec(attn=attn, mlp=mlp)] * layers)
    return ModelConfig(
        vocab=keys.number("vocab_size"),
        embed=embed,
        layers=layers,
        context=context,
        positions="learned",
        norm="layer",
        norm_eps=keys.number("layer_norm_epsilon", 1e-5, 0, float),
        tied=keys.flag("tie_word_embeddings", True),
        prefix=prefix,
        pattern=pattern,
    )


def write(config: ModelConfig) -> dict:
    spec = config.layer_specs[0]
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab,
        "n_embd": config.embed,
        "n_head": spec.attn.heads,
        "n_layer": config.layers,
        "n_positions": config.context,
        "n_inner": spec.mlp.ffw if spec.mlp else None,
        "activation_function": "gelu" if spec.mlp and spec.mlp.activation == "gelu" else "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "torch_dtype": "float32",
    }


QKV = ("attn/q", "attn/k", "attn/v")
FAMILY = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    model_types=("gpt2",),
    read=read,
    write=write,
    base="transformer.",
    prefix="h.{i}.",
    layer=(
        Map(QKV, "attn.c_attn.weight", ("D (N H) -> D N H",) * 3, join=1),
        Map(tuple(f"{name}_bias" for name in QKV), "attn.c_attn.bias", ("(N H) -> N H",) * 3),
        Map("attn/o", "attn.c_proj.weight", "(N H) D -> N H D"),
        Map("attn/o_bias", "attn.c_proj.bias", "D"),
        Map("mlp/up", "mlp.c_fc.weight", "D F"),
        Map("mlp/up_bias", "mlp.c_fc.bias", "F"),
        Map("mlp/down", "mlp.c_proj.weight", "F D"),
        Map("mlp/down_bias", "mlp.c_proj.bias", "D"),
        Map("attn_norm/scale", "ln_1.weight", "D"),
        Map("attn_norm/bias", "ln_1.bias", "D"),
        Map("mlp_norm/scale", "ln_2.weight", "D"),
        Map("mlp_norm/bias", "ln_2.bias", "D"),
    ),
    top=(
        Map("embed", "wte.weight", "V D"),
        Map("positions", "wpe.weight", "P D"),
        Map("norm/scale", "ln_f.weight", "D"),
        Map("norm/bias", "ln_f.bias", "D"),
        Map("head", "/lm_head.weight", "V D"),
    ),
    unused=("*.attn.bias", "*.attn.masked_bias"),
)
