"""Fully sharded data parallelism: a layer gathers its weights where it begins, and its gradients come back in parts.

Within a step each device computes on its own rows (`train/rows.py`), so that a gather of a weight is all that it
takes: the derivative of a gather is a reduce-scatter (ZeRO stage 3, arXiv 1910.02054, section 5.3). Outside of it the
compiler lays out products by where their weights are.
"""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxllm import tree
from jaxllm.kernels.backend import platform
from jaxllm.sharding import Sharding, names_of
from jaxllm.weights import seam
from jaxllm.weights.axes import Axes, is_linear_map


@dataclasses.dataclass(frozen=True)
class Gather:
    """Which mesh axes each array of the weights is to be gathered over before it is used."""

    sharding: Sharding
    places: dict[str, tuple[tuple[str, ...], ...]]
    """`{path: axes for each dimension}`, without the dimension of stacked layers."""
    left: dict[str, PartitionSpec]
    """How the compiler splits dimensions that are not gathered, over the axes that are left to it."""
    matrices: frozenset[str]
    """Paths of matrices that products take in the compute dtype: they are gathered in it, everything else as it is."""

    def layer(self, where: tuple[str, ...], weights: Any, x_BTD: jax.Array) -> Any:
        """The weights of one layer that reads `x_BTD`, whose paths begin with `where`."""
        if not self.places:
            return weights
        start, dtype = "/".join(where[:2]), x_BTD.dtype
        if platform() == "tpu":
            # The compiler would cast all layers before the scan and keep the copies (2 bytes a weight), also across an
            # optimization_barrier; it does not where the cast depends on what the layer reads.
            zero = jax.lax.stop_gradient(jnp.minimum(jnp.abs(x_BTD[0, 0, 0]), 0)).astype(jnp.float32)
            weights = tree.map_with_path(
                lambda p, leaf: leaf + zero if f"{start}/{p}" in self.matrices else leaf, weights
            )
        return tree.map_with_path(lambda path, leaf: self.weight(f"{start}/{path}", leaf, dtype), weights)

    def around(self, params: dict[str, Any], dtype) -> dict[str, Any]:
        """The weights with what belongs to no layer and is no table of the vocabulary: the last norm, positions."""
        names = [name for name in params if name not in ("prefix", "layers", "suffix", "embed", "head")]
        return params | {name: self.tree(name, params[name], dtype) for name in names}

    def weight(self, path: str, leaf, dtype) -> jax.Array:
        """One array: a matrix in `dtype`, where devices share it."""
        if path not in self.places:
            return leaf
        return self._whole(path, leaf.astype(dtype) if path in self.matrices else leaf)

    def tree(self, start: str, weight: Any, dtype) -> Any:
        """One weight of any type, whose arrays have paths that begin with `start`."""
        return tree.map_with_path(lambda path, leaf: self.weight(path, leaf, dtype), {start: weight})[start]

    def take(self, path: str, table: Any, ids: jax.Array, dtype) -> jax.Array:
        """Rows of a table in `dtype`; the gradient of a plain one is summed in float32."""
        if path not in self.places:
            return seam.take(self.tree(path, table, dtype), ids, dtype)
        return _taken(self, path, dtype, table, ids)

    def _whole(self, path: str, leaf):
        def gathered(leaf):
            for dim, axes in enumerate(self.places[path]):
                for axis in reversed(axes):  # the last one splits what the ones before it have split
                    leaf = self.sharding.gather(leaf, axis, dim)
            return leaf

        return self.sharding.by_part(gathered, leaf, self.left[path])


def make_gather(sharding: Sharding, abstract, axes, plain: Collection[str]) -> Gather:
    """What `Model.abstract` and `Model.axes` say of each array, for code that sees its own part over `sharding.manual`.

    `plain`: paths of weights; an array by such a path is the weight itself and no part of another type. What lies under
    an adapter goes as if it were plain, but for tables, whose rows the adapter reads in float32, and under DoRA, whose
    norms are of float32, as is what trains rounded. Axes that split experts stay: their tokens come to them.
    """
    names, leaves = tree.flatten(axes, is_leaf=lambda x: isinstance(x, tuple)), tree.flatten(abstract)
    places, left, matrices = {}, {}, set()
    for path, leaf in leaves.items():
        stacked = bool(names[path]) and names[path][0] == "layers"
        split, here = (*leaf.sharding.spec, *[None] * leaf.ndim)[stacked : leaf.ndim], names[path][stacked:]
        apart = tuple(
            tuple(axis for axis in names_of([part]) if sharding.across(axis) and name != "expert")
            for part, name in zip(split, here, strict=True)
        )
        if any(apart):
            places[path] = apart
            others = (tuple(axis for axis in names_of([part]) if axis not in sharding.manual) for part in split)
            left[path] = PartitionSpec(
                *(rest if rest and not gone else None for gone, rest in zip(apart, others, strict=True))
            )
            owner = path.removesuffix("/base")
            adapted = owner != path and owner in plain and f"{owner}/lora_magnitude" not in leaves
            if (path in plain and _is_matrix(here)) or (adapted and is_linear_map(here)):
                matrices.add(path)
    return Gather(sharding, places, left, frozenset(matrices))


def _is_matrix(axes: Axes) -> bool:
    """Whether products take the weight in the compute dtype: it is no norm, bias or router."""
    return is_linear_map(axes) or "vocab" in axes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _taken(gather: Gather, path: str, dtype, table_VD, ids_BT):
    return gather.weight(path, table_VD, dtype)[ids_BT].astype(dtype)


def _save(gather, path, dtype, table_VD, ids_BT):
    return _taken(gather, path, dtype, table_VD, ids_BT), (ids_BT, table_VD)


def _backward(gather: Gather, path, dtype, saved, d_BTD):
    ids_BT, table_VD = saved
    whole_VD, scatter = jax.vjp(functools.partial(gather._whole, path), table_VD)
    return *scatter(jnp.zeros_like(whole_VD).at[ids_BT].add(d_BTD.astype(whole_VD.dtype))), None


_taken.defvjp(_save, _backward)
