"""Rotary positions between GGUF metadata and config.json. Llama 3's and LongRoPE's factors are tensors there."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.errors import DataError, SettingsError
from jaxllm.families.keys import Keys
from jaxllm.hf.gguf_file import Entry
from jaxllm.model.rope import frequencies
from jaxllm.model.spec import LayerSpec, ModelConfig, RopeSpec

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ORIGINAL = "rope.scaling.original_context_length"


def read_rope(keys: Keys, head: int, tensors: Mapping[str, Entry]) -> dict[str, Any]:
    """`rope_theta`, `partial_rotary_factor` and `rope_scaling` of config.json. Raises SettingsError, DataError."""
    out: dict[str, Any] = {"rope_theta": keys.number("rope.freq_base", 10_000.0, 0, float)}
    dims = keys.number("rope.dimension_count", head)
    if dims != head:
        out["partial_rotary_factor"] = dims / head
    old = keys.number("rope.scale_linear", 1.0, 0, float)
    factor, context = keys.number("rope.scaling.factor", old, 0, float), keys.number("context_length")
    kind = keys.get("rope.scaling.type", "linear")
    kind = "longrope" if LONG in tensors else "factors" if FREQS in tensors else kind
    if kind not in READERS:
        raise SettingsError(
            f"{keys.where}: rope.scaling.type={kind!r} is not known; known: none, linear, yarn, longrope"
        )
    scaling = READERS[kind](keys, factor, context, dims, tensors)
    if ORIGINAL in keys:
        keys.get(ORIGINAL)
    return out | ({"rope_scaling": scaling} if scaling else {})


def _none(keys, factor, context, dims, tensors):
    return None


def _linear(keys, factor, context, dims, tensors):
    return {"rope_type": "linear", "factor": factor} if factor not in (0, 1) else None


def _yarn(keys, factor, context, dims, tensors):
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.number(ORIGINAL, context),
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0, 0, float),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0, 0, float),
    }


def _longrope(keys, factor, context, dims, tensors):
    if LONG not in tensors or SHORT not in tensors:
        raise DataError(f"{keys.where}: longrope needs the tensors {LONG} and {SHORT}")
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "original_max_position_embeddings": keys.number(ORIGINAL, context),
        "short_factor": _factors(tensors[SHORT], dims),
        "long_factor": _factors(tensors[LONG], dims),
        "attention_factor": keys.number("rope.scaling.attn_factor", 1.0, 0, float),
    }


def _llama3(keys, factor, context, dims, tensors):
    """Factors for each pair of dimensions: Llama 3.1's rule where they are its, else LongRoPE with one set of them."""
    keys.expect("rope.scaling.type", "none", "linear")
    keys.expect("rope.scaling.factor", 1.0)
    factors = _factors(tensors[FREQS], dims)
    base = keys.number("rope.freq_base", 10_000.0, 0, float)
    known = {"factor": max(factors), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if max(factors) >= 1:
        rope = RopeSpec(base=base, scaling="llama3", original_context=8192, **known)
        if np.allclose(_stretch(rope, dims), factors, rtol=1e-5):
            return {"rope_type": "llama3", "original_max_position_embeddings": 8192} | known
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "original_max_position_embeddings": context,
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
    }


READERS = {"none": _none, "linear": _linear, "yarn": _yarn, "longrope": _longrope, "factors": _llama3}


def _factors(entry: Entry, dims: int) -> list[float]:
    if entry.shape != (dims // 2,):
        expected = f"{dims} rotated dimensions make it [{dims // 2}]"
        raise DataError(f"tensor {entry.name} has shape {list(entry.shape)}, and {expected}")
    values = np.asarray(entry.map(), np.float32)
    if not (np.isfinite(values).all() and values.min() > 0):
        raise DataError(f"tensor {entry.name} must hold positive numbers")
    return list(_decimal(values))


def _decimal(values) -> tuple[float, ...]:
    """The shortest decimals that give the same float32."""
    return tuple(float(str(value)) for value in np.asarray(values, np.float32))


def _stretch(rope: RopeSpec, head: int) -> np.ndarray:
    """How many times longer each wavelength is than without scaling."""
    plain = rope.base ** -(np.arange(0, head, 2) / head)
    return plain / np.asarray(frequencies(rope, head)[0], np.float64)


def write_rope(raw: dict[str, Any], head: int) -> dict[str, Any]:
    """Metadata for the keys of config.json, factors left out: `factor_tensors` has them."""
    out = {"rope.freq_base": raw.get("rope_theta", 10_000.0)}
    out["rope.dimension_count"] = int(head * raw.get("partial_rotary_factor", 1.0))
    scaling = raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type")
    if kind in ("linear", "yarn"):
        out |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":  # other bounds than 32 and 1 have keys, which llama.cpp does not read in these architectures
        out[ORIGINAL] = scaling["original_max_position_embeddings"]
    if kind == "longrope" and not _one_set(scaling):
        out |= {"rope.scaling.type": kind, "rope.scaling.attn_factor": float(scaling["attention_factor"])}
        out[ORIGINAL] = raw.get("original_max_position_embeddings") or scaling["original_max_position_embeddings"]
    return out


def factor_tensors(raw: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors that hold a model's factors."""
    scaling = raw.get("rope_scaling") or {}
    if scaling.get("rope_type") != "longrope":
        return {}
    short, long = (np.asarray(scaling[key], np.float32) for key in ("short_factor", "long_factor"))
    return {FREQS: short} if _one_set(scaling) else {LONG: long, SHORT: short}


def _one_set(scaling: dict[str, Any]) -> bool:
    return scaling["short_factor"] == scaling["long_factor"] and scaling["attention_factor"] == 1.0


def canonical(config: ModelConfig) -> ModelConfig:
    """The same model with its rotary scaling in the words that GGUF has: Llama 3's rule as factors."""

    def layer(spec: LayerSpec) -> LayerSpec:
        if spec.attn.rope is None:
            return spec
        rope = _canonical(spec.attn.rope, config.head_dim(spec.attn), config.context)
        return dataclasses.replace(spec, attn=dataclasses.replace(spec.attn, rope=rope))

    prefix, pattern = (tuple(map(layer, specs)) for specs in (config.prefix, config.pattern))
    return dataclasses.replace(config, prefix=prefix, pattern=pattern)


def _canonical(rope: RopeSpec, head: int, context: int) -> RopeSpec:
    shared = dict(base=rope.base, fraction=rope.fraction, scaling="longrope")
    if rope.scaling == "llama3":
        factors = _decimal(_stretch(rope, int(head * rope.fraction)))
        return RopeSpec(
            **shared, original_context=context, short_factors=factors, long_factors=factors, attention_factor=1.0
        )
    if rope.scaling != "longrope":
        return rope
    factor = rope.attention_factor
    if factor is None:
        factor = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_context))
    factor = _decimal([factor])[0]
    one_set = rope.short_factors == rope.long_factors and factor == 1.0
    original = context if one_set else rope.original_context
    return dataclasses.replace(rope, factor=1.0, attention_factor=factor, original_context=original)
