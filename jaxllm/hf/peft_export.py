"""Writes adapters in the layout of the peft library, by the names that transformers gives the modules of a model."""

import collections
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

from jaxllm.errors import ResourceError, SettingsError
from jaxllm.families.export import config_json
from jaxllm.hf.export import write_json
from jaxllm.hf.factors import Factors, lines_of, to_peft
from jaxllm.hf.peft import CONFIG, PREFIX, TENSORS, modules_of, tables_of
from jaxllm.hf.places import Place, rope_dims, stored_forms
from jaxllm.model.build import Model, Params
from jaxllm.model.change import weights_of
from jaxllm.weights.lora import Lora


def export_peft(
    model: Model, params: Params, out: str | Path, *, family: str | None, rslora: bool, dropout: float
) -> str:
    """Writes the adapters over `params` into the new folder `out`; gives the family whose names they have.

    Raises SettingsError where there are none, where one has no counterpart there, or where `out` exists.
    """
    out, weights = Path(out), weights_of(params)
    if out.exists():
        raise SettingsError(f"{out} exists, and nothing is written over; choose another --out")
    loras = {path: weight for path, weight in weights.items() if isinstance(weight, Lora)}
    if not loras or any(lora.several for lora in loras.values()):
        raise SettingsError("to=peft writes one adapter, and the model has none or several; choose hf or gguf")
    chosen, _ = config_json(model.config, family)
    found = {}
    for place, module in modules_of(model, chosen):
        ours = {path: _factors(loras.get(whole), place, whole, model) for path, whole in place.paths.items()}
        if any(ours.values()):
            if module is None:
                whole = next(iter(place.paths.values()))
                raise SettingsError(f"{whole} has an adapter, and PEFT's layout has none for experts; merge it first")
            found[module] = to_peft(lines_of(place, stored_forms(model), rope_dims(model.config)), ours, place.name)
    tables = tables_of(chosen)
    if tables["embed"] in found and "embed" in loras and loras["embed"].lora_magnitude is not None:
        raise SettingsError("embed has a DoRA adapter, which peft computes along the other axis; merge it first")
    if model.config.tied and tables["embed"] in found:
        found[tables["head"]] = found[tables["embed"]]  # one matrix here, two modules there
    everything = [module for _, module in modules_of(model, chosen) if module] + [tables["head"]]
    _write(out, _settings(found, everything, rslora, dropout), _tensors(found, tables["embed"]))
    return chosen.name


def _factors(lora: Lora | None, place: Place, path: str, model: Model) -> Factors | None:
    """An adapter of one layer on the host, without the rows that pad a vocabulary."""
    if lora is None:
        return None
    a, b, magnitude = (
        None if x is None else np.asarray(jax.device_get(x[place.index] if place.index else x))
        for x in (lora.lora_a, lora.lora_b, lora.lora_magnitude)
    )
    if path in ("embed", "head"):
        b = b[:, : model.config.vocab]
        magnitude = None if magnitude is None else magnitude[: model.config.vocab]
    return Factors(a, b, magnitude, lora.scale)


def _settings(found: Mapping[str, Factors], modules: list[str], rslora: bool, dropout: float) -> dict:
    """adapter_config.json."""

    def alpha(factors):
        rank = factors.a.shape[0]
        return round(factors.scale * (rank**0.5 if rslora else rank), 9)

    sizes = {module: (factors.a.shape[0], alpha(factors)) for module, factors in found.items()}
    (rank, common), _ = collections.Counter(sizes.values()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": common,
        "rank_pattern": {module: r for module, (r, _) in sizes.items() if r != rank},
        "alpha_pattern": {module: a for module, (_, a) in sizes.items() if a != common},
        "lora_dropout": dropout,
        "target_modules": _short(list(found), modules),
        "use_rslora": rslora,
        "use_dora": any(factors.magnitude is not None for factors in found.values()),
        "bias": "none",
        "modules_to_save": None,
    }


def _short(chosen: list[str], modules: list[str]) -> list[str]:
    """The last parts of the modules' names where those choose no others, as is usual; else the names in full."""
    last = {name.rpartition(".")[2] for name in chosen}
    same = {name for name in modules if name.rpartition(".")[2] in last} == set(chosen)
    return sorted(last if same else chosen)


def _tensors(found: Mapping[str, Factors], embed: str) -> dict[str, np.ndarray]:
    out = {}
    for module, factors in found.items():
        name = PREFIX + module
        if module == embed:  # a lookup multiplies with B first, and stores both the other way round
            out |= {f"{name}.lora_embedding_A": factors.b.T, f"{name}.lora_embedding_B": factors.a.T}
        else:
            out |= {f"{name}.lora_A.weight": factors.a, f"{name}.lora_B.weight": factors.b}
        if factors.magnitude is not None:
            out[f"{name}.lora_magnitude_vector"] = factors.magnitude
    return {name: np.ascontiguousarray(value, np.float32) for name, value in out.items()}


def _write(out: Path, settings: dict, tensors: dict[str, np.ndarray]) -> None:
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        safetensors.numpy.save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        write_json(partial / CONFIG, settings)
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ResourceError(f"{out} cannot be written ({error.strerror or error}); choose another --out") from None
