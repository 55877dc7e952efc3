"""Between the tensors of a Hugging Face folder and a tree of our weights, one tensor at a time, both ways."""

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm import tree
from jaxllm.errors import DataError, nearest
from jaxllm.families.base import Family, Map, stored_shape, to_ours, to_theirs
from jaxllm.model.build import Model, Params
from jaxllm.model.spec import ModelConfig

#: What a letter of `Map.axes` is in config.json, for errors.
LETTERS = {
    "D": "hidden_size",
    "N": "num_attention_heads",
    "K": "num_key_value_heads",
    "H": "head_dim",
    "F": "intermediate_size",
    "V": "vocab_size",
    "E": "number of experts",
    "P": "n_positions",
    "Q": "q_lora_rank",
    "C": "kv_lora_rank",
    "R": "qk_rope_head_dim",
    "W": "v_head_dim",
}


class Stored(Protocol):
    """A tensor that can be read: `safetensors.Entry`, or one made of several (quantised weights)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def map(self) -> np.ndarray: ...


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


def read(model: Model, family: Family, tensors: Mapping[str, Stored], *, dtype=jnp.float32) -> Params:
    """The weights of `model` out of stored tensors, each read straight into its shards.

    The host holds one tensor at a time. Raises DataError for a missing tensor, one that is left over, or one whose
    shape is not what config.json makes it.
    """
    abstract = tree.flatten(model.abstract)
    shapes = {path: unpadded(path, leaf.shape, model.config) for path, leaf in abstract.items()}
    family = based(family, tensors)
    rope = rope_dims(model.config)
    params, used = {}, set()
    for place in places(family, model.config, shapes):
        used.add(place.name)
        local = local_shapes(place, shapes)
        stored = _check(tensors, place, stored_shape(place.map, local))
        for path, piece in to_ours(place.map, stored.map(), local, rope).items():
            whole = place.paths[path]
            params[whole] = _place(params.get(whole), piece, place.index, abstract[whole], dtype)
    absent = shapes.keys() - params.keys()
    assert not absent, f"family {family.name} has no line for {sorted(absent)}"
    check_left_over(family, model.config, tensors, used)
    check_tied(family, model.config, tensors)
    return jax.tree.unflatten(jax.tree.structure(model.abstract), [params[path] for path in abstract])


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


def _check(tensors: Mapping[str, Stored], place: Place, expected: tuple[int, ...]) -> Stored:
    if place.name not in tensors:
        raise DataError(
            f"tensor {place.name} is missing{nearest(place.name, tensors)}; config.json says that the model has it"
        )
    stored = tensors[place.name]
    if tuple(stored.shape) != expected:
        letters = re.findall("[A-Z]", place.map.parts[0][2])
        keys = ", ".join(dict.fromkeys(LETTERS[letter] for letter in letters))
        raise DataError(
            f"tensor {place.name} has shape {list(stored.shape)}, and config.json makes it {list(expected)} "
            f"(from {keys}); the two are not of one model"
        )
    return stored


def _place(whole, piece: np.ndarray, index: tuple[int, ...], leaf: jax.ShapeDtypeStruct, dtype) -> jax.Array:
    """`whole` with `piece` at `index`; without an index, the piece itself, laid out over the devices."""
    sharding = leaf.sharding
    if index:
        spec = (*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec)))
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec[len(index) :]))
    elif piece.shape != leaf.shape:  # rows that pad the vocabulary
        piece = np.pad(piece, [(0, n - m) for n, m in zip(leaf.shape, piece.shape, strict=True)])
    made = jax.make_array_from_callback(piece.shape, sharding, lambda at: _owned(piece[at], dtype))
    if not index:
        return made
    if whole is None:
        whole = jax.jit(lambda: jnp.zeros(leaf.shape, dtype), out_shardings=leaf.sharding)()
    return _set(leaf.sharding)(whole, made, np.asarray(index, np.int32))


def _owned(piece: np.ndarray, dtype) -> np.ndarray:
    """In memory that is not a file's: jax on CPU may keep what it is given, and a file can be written over."""
    whole = np.ascontiguousarray(piece, dtype)
    return whole if whole.flags.writeable else whole.copy()  # what is read-only is still the map


@functools.cache
def _set(sharding):
    """Writes one layer (or one expert of it) into a stack, in place."""
    return jax.jit(
        lambda whole, piece, index: whole.at[tuple(index)].set(piece), donate_argnums=0, out_shardings=sharding
    )


def check_left_over(family: Family, config: ModelConfig, tensors: Mapping[str, Any], used: set[str]) -> None:
    """Raises DataError for stored tensors that nothing reads: a model that has them computes something else."""
    unused = [*family.unused, *([family.top[-1].theirs[1:]] if config.tied else [])]
    left = [name for name in tensors if name not in used and not any(fnmatch.fnmatch(name, p) for p in unused)]
    if family.beyond:
        layer = re.escape(family.base + family.prefix).replace(r"\{i\}", r"(\d+)")
        left = [name for name in left if not ((m := re.match(layer, name)) and int(m[1]) >= config.layers)]
    if left:
        raise DataError(
            f"tensor {sorted(left)[0]} ({len(left)} in all) is in the folder and not in a {family.name} model of "
            f"{config.layers} layers with these settings; the two are not of one model"
        )


def check_tied(family: Family, config: ModelConfig, tensors: Mapping[str, Stored]) -> None:
    """Raises DataError for a head that is stored beside the embedding it is said to be, and is another matrix."""
    head = family.top[-1].theirs[1:]
    if config.tied and head in tensors:
        embed = family.base + family.top[0].theirs
        if not np.array_equal(tensors[head].map(), tensors[embed].map()):
            raise DataError(
                f"tie_word_embeddings says that the head is the embedding, but {head} differs from {embed}; "
                "set tie_word_embeddings to false in config.json if the head is meant"
            )


def write(family: Family, config: ModelConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """`(name, tensor)` of every stored tensor of a model, one at a time on the host."""
    leaves = tree.flatten(params)
    shapes = {path: unpadded(path, leaf.shape, config) for path, leaf in leaves.items()}
    rope = rope_dims(config)
    for place in places(family, config, shapes):
        ours = {path: _host(leaves[whole], place.index, shapes[whole]) for path, whole in place.paths.items()}
        yield place.name, to_theirs(place.map, ours, rope)


def unpadded(path: str, shape, config: ModelConfig):
    """The shape without the rows that pad the vocabulary, which are never stored."""
    return (config.vocab, *shape[1:]) if path in ("embed", "head") else shape


def _host(leaf, index: tuple[int, ...], shape) -> np.ndarray:
    piece = np.asarray(jax.device_get(leaf[index] if index else leaf))
    return piece[: shape[0]] if not index and piece.ndim else piece
