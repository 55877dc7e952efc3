"""Reads adapters in the layout of the peft library: `adapter_config.json` and `adapter_model.safetensors`.

Modules have the names that transformers gives them, which a family's table has with `.weight` behind. Ranks and scales
may differ from layer to layer there, and are one for a stack of layers here: smaller ranks are filled up with zeros,
which training keeps, and differences of scale go into B.

Shapes: I inputs, O outputs, R rank.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from jaxllm.adapt.lora import LoraConfig, config_of, lora_plan
from jaxllm.errors import DataError, SettingsError, nearest
from jaxllm.families.base import Family
from jaxllm.families.export import config_json
from jaxllm.hf.factors import Factors, from_peft, lines_of
from jaxllm.hf.peft_config import PeftConfig, read_config
from jaxllm.hf.places import Place, places, rope_dims, stored_forms, unpadded
from jaxllm.hf.safetensors import Entry, read_header
from jaxllm.model.build import Model, Params
from jaxllm.model.change import changed, is_weight, weights_of
from jaxllm.weights.lora import Lora

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
#: What stands behind a module's name, and which factor it is; an embedding multiplies with B first.
PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "b",
    "lora_embedding_B": "a",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "base_layer.weight": "base",
}


def load_peft(model: Model, params: Params, folder: str | Path, *, family: str | None) -> tuple[LoraConfig, Params]:
    """The adapter in a folder over `params`: its settings, and the weights with it.

    Raises DataError for a damaged or incomplete file and for an adapter of another base, with names and shapes;
    SettingsError for what peft can and this cannot do.
    """
    folder = Path(folder)
    settings = read_config(folder / CONFIG)
    chosen, _ = config_json(model.config, family)
    stored = _by_module(folder)
    known = {module: place for place, module in modules_of(model, chosen) if module}
    _untie(model, chosen, folder, stored, known)
    _check_modules(folder, settings, stored, known, chosen, model)
    layers: dict[str, dict[tuple[int, ...], Factors]] = {}
    for module, parts in stored.items():
        place = known[module]
        lines = lines_of(place, stored_forms(model), rope_dims(model.config))
        theirs = _factors(folder, module, parts, lines, settings)
        _check_base(folder, module, parts, place, params, model)
        for path, factors in from_peft(lines, theirs).items():
            layers.setdefault(place.paths[path], {})[place.index] = factors
    return _over(model, params, layers, settings)


def modules_of(model: Model, family: Family) -> Iterator[tuple[Place, str | None]]:
    """`(place, module)` of each matrix of a published model; module is None for experts, which peft does not name."""
    known = stored_forms(model)
    shapes = {path: unpadded(path, shape, model.config) for path, (_, shape) in model.weights.items()}
    for place in places(family, model.config, shapes):
        if all(known[whole] is not None for whole in place.paths.values()):
            experts = any(known[whole].experts for whole in place.paths.values())
            yield place, None if experts else place.name.removesuffix(".weight")


def tables_of(family: Family) -> dict[str, str]:
    """The modules of embedding and head."""
    embed, head = family.base + family.top[0].theirs, family.top[-1].theirs[1:]
    return {"embed": embed.removesuffix(".weight"), "head": head.removesuffix(".weight")}


def _by_module(folder: Path) -> dict[str, dict[str, Entry]]:
    """`{module: {part: entry}}`. Raises DataError for a missing or damaged file, or a tensor that is no adapter's."""
    file = folder / TENSORS
    if not file.is_file():
        pickle = folder / "adapter_model.bin"
        why = f"{pickle} is a pickle, which can run code when it is opened; save the adapter with peft as safetensors"
        raise DataError(why if pickle.is_file() else f"{folder} has no {TENSORS}")
    out: dict[str, dict[str, Entry]] = {}
    for name, entry in read_header(file).items():
        ending = next((part for part in PARTS if name.endswith("." + part)), None)
        if ending is None or not name.startswith(PREFIX):
            raise DataError(f"{file}: {name} is not part of a LoRA or DoRA adapter; nothing here computes with it")
        out.setdefault(name.removeprefix(PREFIX).removesuffix("." + ending), {})[ending] = entry
    return {module: parts for module, parts in out.items() if parts.keys() != {"base_layer.weight"}}


def _untie(model: Model, family: Family, folder: Path, stored, known) -> None:
    """Where the head is the embedding, an adapter must be over both and the same; leaves that of the embedding."""
    tables = tables_of(family)
    if not model.config.tied or not (stored.keys() & set(tables.values())):
        return
    embed, head = (stored.get(tables[name], {}) for name in ("embed", "head"))
    pairs = (("lora_embedding_A", "lora_B.weight"), ("lora_embedding_B", "lora_A.weight"))
    same = all(
        e in embed and h in head and np.array_equal(embed[e].map(), np.asarray(head[h].map()).T) for e, h in pairs
    )
    if not same:
        raise SettingsError(
            f"{folder}: the head of this model is its embedding, and the adapter changes {tables['embed']} and "
            f"{tables['head']} differently; here one adapter is over both. Merge it with peft first"
        )
    del stored[tables["head"]]


def _check_modules(folder, settings: PeftConfig, stored, known, family: Family, model: Model) -> None:
    """Raises DataError for a module that the model does not have, or one that should be there and is not."""
    for module in stored:
        if module not in known:
            what = f"a {family.name} model of {model.config.layers} layers"
            experts = "; adapters of experts are not read" if ".experts" in module else ""
            raise DataError(
                f"{folder}: the adapter is over {module}, which {what} does not have{nearest(module, known)}; it "
                f"belongs to another base{experts}"
            )
    if absent := [module for module in known if module not in stored and settings.targets(module)]:
        raise DataError(f"{folder / TENSORS} has nothing for {absent[0]}, which target_modules in {CONFIG} names")
    if not stored:
        raise DataError(f"{folder / TENSORS} holds no adapter")


def _factors(folder, module: str, parts: Mapping[str, Entry], lines, settings: PeftConfig) -> Factors:
    """The factors of one module, in float32. Raises DataError for a missing one, or shapes of another base."""
    by_role = {PARTS[part]: (part, entry) for part, entry in parts.items()}
    embedding = any(part.startswith("lora_embedding") for part in parts)
    dora = "magnitude" in by_role
    if embedding and dora:
        raise SettingsError(f"{folder}: {module} has DoRA over an embedding, which peft computes along the other axis")
    if dora != settings.dora:
        raise DataError(f"{folder}: use_dora={settings.dora} and {module} {'has' if dora else 'lacks'} a magnitude")
    if absent := {"a", "b"} - by_role.keys():
        raise DataError(f"{folder / TENSORS}: {module} has no lora_{absent.pop().upper()}")
    rank = by_role["a"][1].shape[1 if embedding else 0] if len(by_role["a"][1].shape) == 2 else 0
    a, b = lines.shapes(rank)
    expected = {"a": a, "b": b, "magnitude": b[:1]}
    arrays: dict[str, np.ndarray | None] = {"magnitude": None}
    for role, (part, entry) in by_role.items():
        if role == "base":
            continue
        shape = entry.shape[::-1] if embedding else entry.shape
        if shape != expected[role]:
            raise DataError(
                f"{folder}: {module}.{part} has shape {list(entry.shape)}, and this model needs "
                f"{list(expected[role][::-1] if embedding else expected[role])}; the adapter belongs to another base"
            )
        value = np.asarray(entry.map(), np.float32)
        if not np.isfinite(value).all():
            raise DataError(f"{folder}: {module}.{part} holds NaN or infinity; the file is damaged")
        arrays[role] = value.T if embedding else value
    if rank != (named := settings.rank(module)):
        raise DataError(f"{folder}: {module} has rank {rank}, and {CONFIG} says {named}")
    return Factors(**arrays, scale=settings.scale(module))


def _check_base(folder, module: str, parts, place: Place, params: Params, model: Model) -> None:
    """peft saves a copy of embedding and head where they have adapters: it must be the table of this model."""
    if "base_layer.weight" not in parts or place.map.ours not in ("embed", "head"):
        return
    entry, table = parts["base_layer.weight"], weights_of(params)[place.map.ours]
    if not isinstance(table, jax.Array):
        return  # quantised: equal to no table of floats
    ours = np.asarray(jax.device_get(table))[: model.config.vocab]
    if ours.shape != entry.shape or not np.array_equal(ours.astype(entry.dtype), np.asarray(entry.map())):
        raise DataError(f"{folder}: {module}.base_layer.weight is another table than this model's; it was changed too")


def _over(model: Model, params: Params, layers, settings: PeftConfig) -> tuple[LoraConfig, Params]:
    """The adapters laid over the weights, stacked as those are."""
    sizes = {}
    for path, found in layers.items():
        rank, scale = max((factors.a.shape[1], factors.scale) for factors in found.values())
        sizes[path] = rank, round(scale * (rank**0.5 if settings.kind == "rslora" else rank), 9)
    config = config_of(sizes, settings.kind, settings.dropout)
    abstract = weights_of(changed(model, lora_plan(model, config)).abstract)
    weights = weights_of(params)
    for path, found in layers.items():
        weights[path] = _stacked(path, found, abstract[path], weights[path])
    return config, jax.tree.structure(params, is_leaf=is_weight).unflatten(weights.values())


def _stacked(path: str, found: Mapping[tuple[int, ...], Factors], abstract: Lora, base) -> Lora:
    """One adapter for all layers of a stack; those that have none get zeros, which training keeps."""
    arrays = {name: getattr(abstract, name) for name in ("lora_a", "lora_b", "lora_magnitude")}
    arrays = {name: np.zeros(leaf.shape, np.float32) for name, leaf in arrays.items() if leaf is not None}
    if "lora_magnitude" in arrays and abstract.stacked and len(found) < len(arrays["lora_a"]):
        raise SettingsError(f"{path}: only {len(found)} of its {len(arrays['lora_a'])} layers have a DoRA adapter")
    for index, factors in found.items():
        rank = factors.a.shape[1]
        arrays["lora_a"][(*index, ..., slice(rank))] = factors.a
        ratio = factors.scale / abstract.scale
        b = factors.b if abs(ratio - 1) < 1e-6 else factors.b * ratio
        arrays["lora_b"][(*index, slice(rank), slice(b.shape[-1]))] = b
        if factors.magnitude is not None:
            arrays["lora_magnitude"][(*index, slice(b.shape[-1]))] = factors.magnitude
    placed = {name: jax.device_put(value, getattr(abstract, name).sharding) for name, value in arrays.items()}
    return dataclasses.replace(abstract, base=base, **placed)
