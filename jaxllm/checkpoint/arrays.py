"""Arrays between a tree in memory and the files of one step.

A step holds two orbax items: `params`, so that whoever only generates or evaluates reads nothing else, and `rest`
(optimizer, PRNG key, counters). In both, a leaf stands under its path in nested plain dicts: no class of optax, flax
or our own is part of the format, and the tree to restore gives the structure back.
"""

from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict

from jaxllm import tree
from jaxllm.errors import CheckpointError

PARAMS, REST = "params", "rest"
SHOWN = 3  # leaves named in an error


def table(state) -> dict[str, list]:
    """`{path: [dtype, shape]}` of all leaves, which must be jax arrays (host values belong in the metadata)."""
    leaves = tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves.values()), "orbax narrows numpy's int64 in silence"
    return {path: [str(leaf.dtype), list(leaf.shape)] for path, leaf in leaves.items()}


def to_save(state) -> ocp.args.Composite:
    """The state as orbax items of nested dicts. Empty arrays, which orbax refuses, live in the table alone."""
    leaves = {path: leaf for path, leaf in tree.flatten(state).items() if leaf.size}
    assert len({path.replace("/", ".") for path in leaves}) == len(leaves), "orbax joins keys with dots"
    items = _items(leaves)
    return ocp.args.Composite(**{name: ocp.args.PyTreeSave(nested) for name, nested in items.items()})


def restore(folder: epath.Path, leaves: dict[str, list], abstract, part: str = ""):
    """The arrays of a step (below the path `part`) in the structure and with the shardings of `abstract`.

    `abstract`: leaves with shape, dtype and sharding (default: the first device); None gives nested dicts of numpy
    arrays. Raises CheckpointError that names paths and both shapes where the two do not fit.
    """
    prefix = part + "/" if part else ""
    saved = {path: spec for path, spec in leaves.items() if path.startswith(prefix)}
    if not saved:
        raise CheckpointError(
            f"{folder} holds no {part}; it has {', '.join(sorted({p.split('/')[0] for p in leaves}))}"
        )
    if abstract is None:
        targets = {path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for path, (dtype, shape) in saved.items()}
        values = _read(folder, targets)
        return unflatten_dict({tuple(path.removeprefix(prefix).split("/")): values[path] for path in saved})
    targets = {prefix + path: _target(leaf) for path, leaf in tree.flatten(abstract).items()}
    _compare(folder, saved, targets)
    values = _read(folder, targets)
    return jax.tree.unflatten(jax.tree.structure(abstract), [values[path] for path in targets])


def item_of(path: str) -> str:
    """The orbax item that holds a leaf."""
    return PARAMS if path.split("/")[0] == PARAMS else REST


def _items(leaves: dict[str, Any]) -> dict[str, dict]:
    items: dict[str, dict] = {}
    for path, leaf in leaves.items():
        items.setdefault(item_of(path), {})[tuple(path.split("/"))] = leaf
    return {name: unflatten_dict(flat) for name, flat in items.items()}


def _read(folder: epath.Path, targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    values = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in targets.items() if not leaf.size}
    for name, nested in _items({path: leaf for path, leaf in targets.items() if leaf.size}).items():
        args = ocp.args.PyTreeRestore(
            nested, restore_args=ocp.checkpoint_utils.construct_restore_args(nested), partial_restore=True
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            values |= tree.flatten(reader.restore(folder / name, args=args))
    return values


def _target(leaf) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _compare(folder: epath.Path, saved: dict[str, list], targets: dict[str, jax.ShapeDtypeStruct]) -> None:
    here = {path: [str(leaf.dtype), list(leaf.shape)] for path, leaf in targets.items()}
    wrong = [path for path in here | saved if here.get(path) != saved.get(path)]
    if not wrong:
        return
    lines = [f"{path} is {_show(saved.get(path))} there, {_show(here.get(path))} here" for path in wrong[:SHOWN]]
    more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    raise CheckpointError(
        f"{folder} holds other arrays than these settings make: {'; '.join(lines)}{more}. "
        "Use the settings it was saved with, or another run folder"
    )


def _show(spec: list | None) -> str:
    return "absent" if spec is None else f"{spec[0]}{spec[1]}"
