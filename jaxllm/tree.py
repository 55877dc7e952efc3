"""Paths into a tree of weights, and the choice of leaves by a pattern over them.

A path joins the keys with slashes: `layers/0/attn/q`. In a pattern `*` stands for one key or a part of it, `**`
for any number of keys, and a leading `!` for everything that does not match; commas separate alternatives.
"""

import re
from typing import Any

import jax

from jaxllm.errors import SettingsError, nearest


def path_of(key_path) -> str:
    """`layers/0/attn/q` for a key path of jax.tree_util."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def flatten(tree, is_leaf=None) -> dict[str, Any]:
    """`{path: leaf}` in the tree's own order."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def map_with_path(f, tree, *rest, is_leaf=None):
    """`jax.tree.map` whose function gets the path as its first argument."""
    return jax.tree_util.tree_map_with_path(lambda path, *xs: f(path_of(path), *xs), tree, *rest, is_leaf=is_leaf)


def matches(pattern: str, path: str) -> bool:
    """Whether `path` is chosen by `pattern`."""
    if pattern.startswith("!"):
        return not matches(pattern[1:], path)
    return any(re.fullmatch(_regex(part.strip()), path) for part in pattern.split(","))


def _regex(pattern: str) -> str:
    out = ""
    for piece in re.split(r"(\*\*/|/\*\*|\*\*|\*)", pattern):
        out += {"**/": "(?:.*/)?", "/**": "(?:/.*)?", "**": ".*", "*": "[^/]*"}.get(piece, re.escape(piece))
    return out


def select(tree, pattern: str):
    """A tree of bools: which leaves `pattern` chooses; never integers (masks, codes), which have no gradient.

    Raises SettingsError when it chooses none.
    """
    mask = map_with_path(lambda path, leaf: matches(pattern, path) and not _integer(leaf), tree)
    if not any(jax.tree.leaves(mask)):
        raise SettingsError(f"no parameter matches {pattern!r}{nearest(pattern, flatten(tree))}")
    return mask


def _integer(leaf) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.numpy.integer)


def partition(tree, mask):
    """`(chosen, rest)`: two trees of the same shape, with None where the other one has the leaf."""
    chosen = jax.tree.map(lambda m, x: x if m else None, mask, tree)
    rest = jax.tree.map(lambda m, x: None if m else x, mask, tree)
    return chosen, rest


def combine(chosen, rest):
    """The tree that `partition` split."""
    return jax.tree.map(lambda a, b: b if a is None else a, chosen, rest, is_leaf=lambda x: x is None)


def count(tree) -> int:
    """Number of scalars in all leaves (arrays or shapes)."""
    return sum(x.size for x in jax.tree.leaves(tree))


def nbytes(tree) -> int:
    """Bytes of all leaves (arrays or shapes)."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
