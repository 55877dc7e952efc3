"""Between the tensors of a Hugging Face folder and a tree of our weights, one tensor at a time, both ways."""

import fnmatch
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.errors import DataError, SettingsError, nearest
from jaxllm.families.base import Family, stored_shape, to_ours, to_theirs
from jaxllm.hf.coded import Coded
from jaxllm.hf.coded_weights import read_coded, to_coded
from jaxllm.hf.places import Place, based, local_shapes, places, rope_dims, unpadded
from jaxllm.model.build import Model, Params
from jaxllm.model.change import is_weight, weights_of
from jaxllm.model.spec import ModelConfig
from jaxllm.weights.quantized import Quantized

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


def read(model: Model, family: Family, tensors: Mapping[str, Stored], *, dtype=jnp.float32) -> Params:
    """The weights of `model` out of stored tensors, each read straight into its shards.

    The host holds one tensor at a time. A matrix of codes stays one: `model` must have been changed by
    `coded_weights.changes_of`. Raises DataError for a missing tensor, one that is left over, or one whose shape is not
    what config.json makes it.
    """
    abstract = weights_of(model.abstract)
    shapes = {path: unpadded(path, leaf.shape, model.config) for path, leaf in abstract.items()}
    family = based(family, tensors)
    rope = rope_dims(model.config)
    params, used = {}, set()
    for place in places(family, model.config, shapes):
        used.add(place.name)
        if isinstance(coded := tensors[place.name] if place.name in tensors else None, Coded):
            pieces = read_coded(place, coded, model, abstract)
        else:
            local = local_shapes(place, shapes)
            stored = _check(tensors, place, stored_shape(place.map, local))
            pieces = to_ours(place.map, stored.map(), local, rope)
        for path, piece in pieces.items():
            whole = place.paths[path]
            params[whole] = _placed(params.get(whole), piece, place.index, abstract[whole], dtype)
    absent = shapes.keys() - params.keys()
    assert not absent, f"family {family.name} has no line for {sorted(absent)}"
    check_left_over(family, model.config, tensors, used)
    check_tied(family, model.config, tensors)
    return jax.tree.unflatten(
        jax.tree.structure(model.abstract, is_leaf=is_weight), [params[path] for path in abstract]
    )


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


def _placed(whole, piece, index: tuple[int, ...], abstract, dtype):
    """The weight `whole`, of any type, with `piece` at `index`; arrays of a quantised one keep their own dtypes."""
    leaves, structure = jax.tree.flatten(abstract)
    parts, before = jax.tree.leaves(piece), [None] * len(leaves) if whole is None else jax.tree.leaves(whole)
    dtypes = [leaf.dtype if isinstance(abstract, Quantized) else dtype for leaf in leaves]
    placed = zip(before, parts, leaves, dtypes, strict=True)
    return structure.unflatten([_place(old, part, index, leaf, kind) for old, part, leaf, kind in placed])


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
    left = [name for name in left if not _adds_nothing(name, tensors)]
    if left:
        raise DataError(
            f"tensor {sorted(left)[0]} ({len(left)} in all) is in the folder and not in a {family.name} model of "
            f"{config.layers} layers with these settings; the two are not of one model"
        )


def _adds_nothing(name: str, tensors: Mapping[str, Any]) -> bool:
    """Whether it is a bias of zeros beside a matrix of codes: AutoGPTQ gives one to every matrix."""
    weight = name.removesuffix("bias") + "weight"
    coded = name.endswith(".bias") and weight in tensors and isinstance(tensors[weight], Coded)
    return coded and not np.any(tensors[name].map())


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


def write(family: Family, config: ModelConfig, params: Params) -> Iterator[tuple[str, np.ndarray | Coded]]:
    """`(name, tensor)` of every stored tensor of a model, one at a time on the host; quantised ones stay codes.

    Raises SettingsError for quantised weights that do not go into one tensor of the family.
    """
    leaves = weights_of(params)
    shapes = {path: unpadded(path, leaf.shape, config) for path, leaf in leaves.items()}
    rope = rope_dims(config)
    for place in places(family, config, shapes):
        ours = {path: leaves[whole] for path, whole in place.paths.items()}
        coded = [isinstance(leaf, Quantized) for leaf in ours.values()]
        if any(coded) and not all(coded):
            raise SettingsError(f"{place.name} holds {', '.join(ours)}, and only some of them are quantised")
        if all(coded):
            yield place.name, to_coded(place, ours, config)
        else:
            whole = {path: _host(leaf, place.index, shapes[place.paths[path]]) for path, leaf in ours.items()}
            yield place.name, to_theirs(place.map, whole, rope)


def _host(leaf, index: tuple[int, ...], shape) -> np.ndarray:
    piece = np.asarray(jax.device_get(leaf[index] if index else leaf))
    return piece[: shape[0]] if not index and piece.ndim else piece
