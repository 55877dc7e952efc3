"""Which family says what a model computes: settings to config.json, proved by reading it back."""

import dataclasses
from typing import Any

from jaxllm.config import diff
from jaxllm.errors import SettingsError
from jaxllm.families.base import Family
from jaxllm.families.registry import FAMILIES, read_config
from jaxllm.model.spec import LayerSpec, ModelConfig, MoeSpec, fold


def config_json(config: ModelConfig, family: str | None = None) -> tuple[Family, dict[str, Any]]:
    """`(family, config.json)` of a model: of the family named, or of the first one whose equations it follows.

    What is written is read back and compared, so nothing can get lost on the way. Raises SettingsError with the
    settings that have no counterpart, in the family that comes nearest.
    """
    wanted, best = essence(config), None
    for candidate in FAMILIES.values() if family is None else (FAMILIES[family],):
        try:
            raw = candidate.write(config)
            found = essence(read_config(raw)[1])
        except (ValueError, TypeError, AttributeError, KeyError):
            continue  # it cannot even say the shape of this model
        changes = diff(found, wanted)
        if not changes:
            return candidate, raw
        if best is None or len(changes) < len(best[1]):
            best = candidate.name, changes
    if best is None:
        raise SettingsError("no known family has this shape of model; it can be used here, and not be exported")
    listed = "; ".join(f"{key}={new!r} (there {old!r})" for key, (old, new) in list(best[1].items())[:4])
    raise SettingsError(
        f"no known family computes what this model does. In the nearest, {best[0]}, these settings have no "
        f"counterpart: {listed}. Train with settings that one of them has ({', '.join(FAMILIES)}), or add a family"
    )


def essence(config: ModelConfig) -> ModelConfig:
    """The settings that say what is computed, each written in one way."""
    prefix, pattern = fold([_layer(spec, config) for spec in config.layer_specs])
    plain = dict(dropout=0.0, dtype="float32", remat="none", vocab_multiple=1)
    return dataclasses.replace(config, prefix=prefix, pattern=pattern, **plain)


def _layer(spec: LayerSpec, config: ModelConfig) -> LayerSpec:
    attn, head = spec.attn, config.head_dim(spec.attn)
    if attn.latent is None:
        attn = dataclasses.replace(attn, kv_heads=attn.kv_heads or attn.heads)
    dims = head + (attn.latent.rope_head if attn.latent else 0)
    scale = None if attn.scale is None or abs(attn.scale * dims**0.5 - 1) < 1e-7 else round(attn.scale, 9)
    window = None if attn.window is None or attn.window >= config.context else attn.window
    attn = dataclasses.replace(attn, head=head, scale=scale, window=window)
    return dataclasses.replace(spec, attn=attn, moe=_moe(spec.moe) if spec.moe else None)


def _moe(moe: MoeSpec) -> MoeSpec:
    """Balancing is training; what remains of it is whether the router has a bias."""
    balance = "bias" if moe.balance == "bias" else "none"
    return dataclasses.replace(moe, balance=balance, balance_coef=None, bias_rate=None, z_coef=0.0)
