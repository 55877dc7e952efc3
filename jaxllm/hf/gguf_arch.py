"""The architectures of llama.cpp, and between their metadata and the config.json of a family, both ways.

A new architecture is one entry of `ARCHITECTURES`. Sources of the keys and of what llama.cpp takes for granted: the
specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and llama.cpp's converter and model files.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.errors import DataError, SettingsError, nearest
from jaxllm.families.base import Family, Map
from jaxllm.families.keys import Keys
from jaxllm.families.registry import FAMILIES
from jaxllm.hf.gguf_file import Entry
from jaxllm.hf.gguf_forms import GPT2 as GPT2_FORMS
from jaxllm.hf.gguf_forms import GPT_OSS as GPT_OSS_FORMS
from jaxllm.hf.gguf_forms import SAME, SHIFTED, Form, Line, lines, pairs
from jaxllm.hf.gguf_rope import FREQS, LONG, SHORT, read_rope, write_rope

Raw = dict[str, Any]

#: Metadata key, without the architecture's prefix -> key of config.json.
COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
EXPERTS = COMMON | {"expert_used_count": "num_experts_per_tok"}
GPT2 = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "vocab_size": "vocab_size",
}
#: Metadata that says nothing of the function.
DESCRIBES = {
    "rope.scaling.finetuned": "describes how the model was trained",
    "tensor_data_layout": "describes the file",
}
REQUIRED = ("context_length", "embedding_length", "block_count", "attention.head_count")


def _nothing(keys: Keys, raw: Raw, tensors: Mapping[str, Entry]) -> Raw:
    return {}


def _silent(raw: Raw) -> Raw:
    return {}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp as the family whose equations it computes."""

    name: str
    """`general.architecture`."""
    family: str
    keys: Mapping[str, str] = dataclasses.field(default_factory=lambda: COMMON)
    implied: Callable[[Keys, Raw, Mapping[str, Entry]], Raw] = _nothing
    """Keys of config.json that no single key of the metadata says."""
    says: Callable[[Raw], Raw] = _silent
    """The reverse: metadata for such keys."""
    pairs: bool = False
    """Whether queries and keys are stored for rotation in pairs."""
    shifted: bool = False
    """Whether norms are stored as 1 + w."""
    forms: Mapping[str, Form] = dataclasses.field(default_factory=dict)
    rotates: bool = True
    factors: tuple[str, ...] = ()
    """Tensors of factors on wavelengths that llama.cpp looks for."""
    partial: bool = False
    """Whether only a part of a head may rotate."""

    def read(self, keys: Keys, tensors: Mapping[str, Entry]) -> Raw:
        """config.json of a file, from its metadata `keys` without their prefix. Raises SettingsError."""
        for key in REQUIRED:
            keys.number(key)
        keys.number("attention.key_length", None)
        keys.expect("attention.causal", True)
        if keys.get("block_count") > len(tensors):
            raise DataError(f"{keys.where}: block_count={keys.get('block_count'):,} for {len(tensors)} tensors")
        family = FAMILIES[self.family]
        raw: Raw = {"architectures": [family.architectures[0]], "model_type": family.model_types[0]}
        raw |= {ours: keys.get(theirs) for theirs, ours in self.keys.items() if theirs in keys}
        raw |= {"tie_word_embeddings": "output.weight" not in tensors}
        if "vocab_size" not in raw and "token_embd.weight" in tensors:
            raw["vocab_size"] = tensors["token_embd.weight"].shape[0]
        if self.rotates:
            raw |= read_rope(keys, self.head(raw), {name: tensors[name] for name in self.factors if name in tensors})
            keys.expect("attention.value_length", self.head(raw))
            if not self.partial:
                keys.expect("rope.dimension_count", self.head(raw))
        raw |= self.implied(keys, raw, tensors)
        for key, why in DESCRIBES.items():
            keys.ignore(key, why)
        return raw

    def write(self, raw: Raw) -> Raw:
        """Metadata, without the prefix, that `read` makes `raw` of again, as far as there are keys for it."""
        out = {theirs: raw[ours] for theirs, ours in self.keys.items() if raw.get(ours) is not None}
        if self.rotates:
            out |= {"attention.value_length": self.head(raw)} | write_rope(raw, self.head(raw))
        return out | self.says(raw)

    def head(self, raw: Raw) -> int:
        return raw.get("head_dim") or max(1, raw["hidden_size"] // raw["num_attention_heads"])

    def form(self, m: Map, heads: int, kv_heads: int) -> Form:
        """How the tensor of a family's line is stored."""
        if m.theirs in self.forms:
            return self.forms[m.theirs]
        if self.shifted and m.theirs.endswith("norm.weight"):
            return SHIFTED
        if self.pairs and ".q_proj." in m.theirs:
            return pairs(heads)
        if self.pairs and ".k_proj." in m.theirs:
            return pairs(kv_heads)
        return SAME

    def lines(self, config) -> tuple[Line, ...]:
        """The tensors that files of this architecture have, for a model's settings."""
        attn = config.layer_specs[0].attn
        return lines(FAMILIES[self.family], self.name, lambda m: self.form(m, attn.heads, attn.kv_heads or attn.heads))

    def family_as_stored(self) -> Family:
        """The family, with tensors left aside that the settings have been made from."""
        family = FAMILIES[self.family]
        return dataclasses.replace(family, unused=(*family.unused, *self.factors))


def _llama(keys: Keys, raw: Raw, tensors) -> Raw:
    for key in ("expert_count", "expert_used_count"):
        keys.expect(key, 0)
    return {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}


def _mixtral(keys: Keys, raw: Raw, tensors) -> Raw:
    return {"sliding_window": None}


def _kinds(keys: Keys, raw: Raw, period: int, window: int = 0) -> Raw:
    """Which layers have a window: all but the last of each period, or as a list says. `window`: where none is given."""
    window, layers = keys.number("attention.sliding_window", window, 0), raw["num_hidden_layers"]
    given = keys.get("attention.sliding_window_pattern", period)
    if isinstance(given, list):
        windowed = given
    else:
        period = keys.number("attention.sliding_window_pattern", period, 0)
        windowed = [period == 0 or (i + 1) % period != 0 for i in range(layers)]
    kinds = ["sliding_attention" if on and window else "full_attention" for on in windowed]
    return {"layer_types": kinds, "sliding_window": window or 1}


def _write_kinds(raw: Raw, period: int) -> Raw:
    windowed = [kind == "sliding_attention" for kind in raw["layer_types"]]
    if not any(windowed):
        return {"attention.sliding_window": 0}
    out = {"attention.sliding_window": raw["sliding_window"]}
    if windowed != [(i + 1) % period != 0 for i in range(len(windowed))]:
        out["attention.sliding_window_pattern"] = windowed
    return out


def _query_scalar(raw: Raw, largest: int) -> float:
    """llama.cpp has no key for it: the 27B models, known by their number of layers, differ from all others."""
    full = raw["hidden_size"] // raw["num_attention_heads"]
    return full if raw["num_hidden_layers"] == largest else raw.get("head_dim") or full


def _gemma2(keys: Keys, raw: Raw, tensors) -> Raw:
    return _kinds(keys, raw, 2, window=4096) | {
        "query_pre_attn_scalar": _query_scalar(raw, 46),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0, 0, float),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0, 0, float),
    }


def _write_gemma2(raw: Raw) -> Raw:
    caps = {key: raw[key] for key in ("attn_logit_softcapping", "final_logit_softcapping") if raw[key] is not None}
    return caps | _write_kinds(raw, 2)


def _gemma3(keys: Keys, raw: Raw, tensors) -> Raw:
    local = "rope.freq_base_swa"
    return _kinds(keys, raw, 6) | {
        "query_pre_attn_scalar": _query_scalar(raw, 62),
        "rope_local_base_freq": keys.number(local, 10_000.0, 0, float),
        "final_logit_softcapping": keys.number("final_logit_softcapping", None, 0, float),
    }


def _write_gemma3(raw: Raw) -> Raw:
    out = _write_kinds(raw, 6)
    if raw["final_logit_softcapping"] is not None:
        out["final_logit_softcapping"] = raw["final_logit_softcapping"]
    return out | ({"rope.freq_base_swa": raw["rope_local_base_freq"]} if "rope_local_base_freq" in raw else {})


def _qwen3_moe(keys: Keys, raw: Raw, tensors) -> Raw:
    return {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}


def _olmoe(keys: Keys, raw: Raw, tensors) -> Raw:
    keys.expect("attention.head_count_kv", raw["num_attention_heads"])
    return {"norm_topk_prob": False}


def _phi3(keys: Keys, raw: Raw, tensors) -> Raw:
    return {"sliding_window": keys.number("attention.sliding_window", 0, 0) or None}


def _write_phi3(raw: Raw) -> Raw:
    return {"attention.sliding_window": 0}  # llama.cpp has no windows in this architecture, whatever a file says


def _gpt2(keys: Keys, raw: Raw, tensors) -> Raw:
    keys.expect("attention.head_count_kv", raw["n_head"])
    return {"activation_function": "gelu_new"}


def _gpt_oss(keys: Keys, raw: Raw, tensors) -> Raw:
    keys.expect("feed_forward_length", raw["intermediate_size"])
    if "rope_scaling" in raw:
        # The published models do not round YaRN's bounds. No key says so; llama.cpp rounds them all the same.
        raw["rope_scaling"]["truncate"] = False
    return _kinds(keys, raw, 2) | {"attention_bias": True}


ARCHITECTURES = (
    Architecture("llama", "llama", implied=_llama, pairs=True, factors=(FREQS, LONG, SHORT)),
    Architecture(
        "llama",
        "mixtral",
        EXPERTS | {"expert_count": "num_local_experts"},
        implied=_mixtral,
        pairs=True,
        factors=(FREQS, LONG, SHORT),
    ),
    Architecture("qwen2", "qwen2"),
    Architecture("qwen3", "qwen3"),
    Architecture(
        "qwen3moe",
        "qwen3_moe",
        EXPERTS | {"expert_count": "num_experts", "expert_feed_forward_length": "moe_intermediate_size"},
        implied=_qwen3_moe,
    ),
    Architecture("gemma", "gemma", shifted=True),
    Architecture("gemma2", "gemma2", implied=_gemma2, says=_write_gemma2, shifted=True),
    Architecture("gemma3", "gemma3", implied=_gemma3, says=_write_gemma3, shifted=True),
    Architecture("phi3", "phi3", implied=_phi3, says=_write_phi3, factors=(LONG, SHORT), partial=True),
    Architecture("olmo2", "olmo2"),
    Architecture("olmoe", "olmoe", EXPERTS | {"expert_count": "num_experts"}, implied=_olmoe),
    Architecture("smollm3", "smollm3", pairs=True),
    Architecture("gpt2", "gpt2", GPT2, implied=_gpt2, forms=GPT2_FORMS, rotates=False),
    Architecture(
        "gpt-oss",
        "gpt_oss",
        {k: v for k, v in EXPERTS.items() if k != "feed_forward_length"}
        | {"expert_count": "num_local_experts", "expert_feed_forward_length": "intermediate_size"},
        implied=_gpt_oss,
        says=lambda raw: _write_kinds(raw, 2) | {"feed_forward_length": raw["intermediate_size"]},
        forms=GPT_OSS_FORMS,
    ),
)


def architecture_of(metadata: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that a file names. Raises SettingsError with those that are known."""
    name = metadata.get("general.architecture")
    experts = bool(metadata.get(f"{name}.expert_count"))
    found = [a for a in ARCHITECTURES if a.name == name]
    for architecture in found:
        if len(found) == 1 or ("expert_count" in architecture.keys) == experts:
            return architecture
    known = dict.fromkeys(a.name for a in ARCHITECTURES)
    raise SettingsError(
        f"{where}: the architecture {name!r} is not known{nearest(str(name), known)} Known: {', '.join(known)}"
    )
