"""`bind`: what adapters need for one call, put into their leaves: the key of their dropout, the adapter of each row."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.errors import UserError
from jaxllm.weights.lora import Lora

#: Folded into the key, since the model's own dropout folds small numbers into the same one.
ADAPTERS = 0x10A0


def bind(params, *, key: jax.Array | None = None, adapters_B: jax.Array | None = None):
    """The weights for one call; those without adapters are given back as they are.

    Args:
      key: of the adapters' dropout, another one for each weight and layer; None for evaluation.
      adapters_B: int32, the adapter of each row of the batch, -1 for none; needed where weights hold several.

    Raises UserError for rows that cannot choose, or must.
    """
    leaves, treedef = jax.tree.flatten(params, is_leaf=_is_lora)
    several = [leaf for leaf in leaves if _is_lora(leaf) and leaf.several]
    if several and adapters_B is None:
        raise UserError("these weights hold several adapters: say which one each row takes (adapters)")
    if adapters_B is not None and not several:
        raise UserError("adapters by row were chosen, but these weights do not hold several adapters")
    if key is not None:
        key = jax.random.fold_in(key, ADAPTERS)
    return treedef.unflatten(
        _bound(leaf, key, i, adapters_B) if _is_lora(leaf) else leaf for i, leaf in enumerate(leaves)
    )


def _bound(leaf: Lora, key, index: int, adapters_B) -> Lora:
    new = {}
    if key is not None and leaf.dropout:
        new["key"] = _laid_out(leaf, jax.random.fold_in(key, index), jax.random.split)
    if leaf.several:
        rows_B = jnp.asarray(adapters_B, jnp.int32)
        new["rows_B"] = _laid_out(leaf, rows_B, lambda x, n: jnp.broadcast_to(x, (n, *x.shape)))
    return dataclasses.replace(leaf, **new)


def _laid_out(leaf: Lora, one, many):
    """`one`, or `many(one, layers)` in the way that the weights of the layers are kept: stacked, or in a tuple."""
    if isinstance(leaf.lora_b, tuple):
        return tuple(many(one, len(leaf.lora_b)))
    return many(one, leaf.lora_b.shape[0]) if leaf.stacked else one


def _is_lora(x) -> bool:
    return isinstance(x, Lora)
