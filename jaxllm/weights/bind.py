"""`bind`: what adapters need for one call, put into their leaves: the key of their dropout, the adapter of each row."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.errors import UserError
from jaxllm.weights.lora import Lora


def bind(params, *, key: jax.Array | None = None, adapters_B: jax.Array | None = None):
    """The weights for one call.

    Args:
      key: of the adapters' dropout; None for evaluation.
      adapters_B: int32, the adapter of each row of the batch, -1 for none; needed where weights hold several.
    """
    found = [leaf for leaf in jax.tree.leaves(params, is_leaf=_is_lora) if _is_lora(leaf)]
    if adapters_B is not None and not any(leaf.several for leaf in found):
        raise UserError("adapters by row were chosen, but these weights do not hold several adapters")
    if not found:
        return params
    leaves, treedef = jax.tree.flatten(params, is_leaf=_is_lora)
    return treedef.unflatten(_bound(leaf, i, key, adapters_B) for i, leaf in enumerate(leaves))


def _bound(leaf, index: int, key, adapters_B):
    if not _is_lora(leaf):
        return leaf
    new = {}
    if key is not None and leaf.dropout:
        mine = jax.random.fold_in(key, index)
        new["key"] = _stacked(leaf, lambda n: jax.random.split(mine, n), mine)
    if leaf.several:
        if adapters_B is None:
            raise UserError("these weights hold several adapters: say which one each row takes (adapters)")
        new["rows_B"] = _stacked(leaf, lambda n: jnp.broadcast_to(adapters_B, (n, *adapters_B.shape)), adapters_B)
    return dataclasses.replace(leaf, **new)


def _stacked(leaf: Lora, many, one):
    """What each layer of a stack gets, laid out as the weights are: stacked, or one for each in a tuple."""
    if isinstance(leaf.lora_a, tuple):
        return tuple(many(len(leaf.lora_a)))
    return many(leaf.lora_b.shape[0]) if leaf.stacked else one


def _is_lora(x) -> bool:
    return isinstance(x, Lora)
