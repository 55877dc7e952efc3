"""Where each tensor of a Hugging Face folder lies in a tree of our weights."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jaxllm.families.base import Family, Map
from jaxllm.model.build import Model
from jaxllm.model.spec import ModelConfig
from jaxllm.weights.form import Form, form_of


@dataclasses.dataclass(frozen=True)
class Place:
    """One stored tensor: its name, its line in the family's table, and where its weights lie in our tree."""

    name: str
    map: Map
    paths: dict[str, str]
    """The map's own path -> our path."""
    index: tuple[int, ...]
    """Where in our weight: the period of a stacked layer, then the expert."""


def places(family: Family, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Place]:
    """Every stored tensor of a model. `shapes`: of our weights by path; lines for others are left out."""
    for m in family.top:
        yield from _places(m, family.base, "", (), shapes)
    for i in range(config.layers):
        block, index = where_is(config, i)
        for m in family.layer:
            yield from _places(m, family.base + family.prefix.format(i=i), block, index, shapes)


def where_is(config: ModelConfig, layer: int) -> tuple[str, tuple[int, ...]]:
    """`(path of the block, index into its stack)` of a layer: `("layers/1/", (4,))`, `("prefix/0/", ())`."""
    first, period = len(config.prefix), len(config.pattern)
    if layer < first:
        return f"prefix/{layer}/", ()
    done, slot = divmod(layer - first, period)
    return (f"layers/{slot}/", (done,)) if done < config.periods else (f"suffix/{slot}/", ())


def _places(m: Map, prefix: str, block: str, index, shapes) -> Iterator[Place]:
    paths = {part[0]: block + part[0] for part in m.parts}
    here = [path in shapes for path in paths.values()]
    if not all(here):
        assert not any(here), f"{m.theirs}: only some of {tuple(paths.values())} are weights of this model"
        return
    name = m.theirs[1:] if m.theirs.startswith("/") else prefix + m.theirs
    if "{e}" not in name:
        yield Place(name, m, paths, index)
        return
    for e in range(shapes[next(iter(paths.values()))][len(index)]):
        yield Place(name.format(e=e), m, paths, (*index, e))


def based(family: Family, tensors: Mapping[str, Any]) -> Family:
    """The family with the prefix that the folder's names have: those of a bare decoder lack `base`."""
    if any(name.startswith(family.base) for name in tensors):
        return family
    return dataclasses.replace(family, base="")


def rope_dims(config: ModelConfig) -> int:
    """How many entries of a head rotate, where that is not the whole axis (latent attention)."""
    latent = config.layer_specs[0].attn.latent
    return latent.rope_head if latent is not None else 0


def local_shapes(place: Place, shapes) -> dict[str, tuple[int, ...]]:
    """Shapes of a place's weights without the axes that `index` counts."""
    return {path: shapes[whole][len(place.index) :] for path, whole in place.paths.items()}


def unpadded(path: str, shape, config: ModelConfig):
    """The shape without the rows that pad the vocabulary, which are never stored."""
    return (config.vocab, *shape[1:]) if path in ("embed", "head") else shape


def stored_forms(model: Model) -> dict[str, Form | None]:
    """The form of each weight, without the rows that pad a vocabulary."""
    return {path: form_of(axes, unpadded(path, shape, model.config)) for path, (axes, shape) in model.weights.items()}
