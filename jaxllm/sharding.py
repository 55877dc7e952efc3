"""One mesh, one table from logical axes to mesh axes, and the shardings that follow from them.

A weight or an activation names its axes ("embed", "heads", ...); RULES says which mesh axis splits each one. The
same code runs on one device and on thousands: a mesh axis of size 1 splits nothing.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxllm.config import settings
from jaxllm.errors import SettingsError, nearest

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")

#: Logical axis -> the mesh axes that split it. "batch", "seq" and "residual" belong to activations, the rest to weights
#: as well. "residual" is the sequence between layers, where norms and sums are: devices that split heads split it there
#: (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2).
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp", "expert"),
    "seq": "context",
    "residual": ("context", "tensor"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "ffw": "tensor",
    "vocab": "tensor",
    "expert": "expert",
    "layers": None,
    "rank": None,
}

#: What else a user can do when an axis does not divide, beside another mesh.
OPT_INS = {
    "kv_heads": "or replicate the kv heads: parallel.rules.kv_heads=null",
    "vocab": "or pad the vocabulary: model.vocab_multiple={size}",
}


@settings
class ParallelConfig:
    """How many devices split each mesh axis; one of them may be -1 and takes what is left."""

    processes: int | None = 1
    """Processes (hosts) of the run, joined by jax.distributed; null takes what the cluster says (TPU pod, SLURM)."""
    data: int = 1
    """Replicas of the model, each with its own rows (across slices too)."""
    fsdp: int = -1
    """Devices that share the weights and split the rows (fully sharded data parallelism)."""
    expert: int = 1
    """Devices that split the experts of a mixture of experts, and the rows elsewhere."""
    context: int = 1
    """Devices that split each sequence."""
    tensor: int = 1
    """Devices that split heads, feed-forward and vocabulary."""
    rules: dict[str, str | tuple[str, ...] | None] = dataclasses.field(default_factory=dict)
    """Overrides of the table from logical axes to mesh axes, such as {kv_heads: null}."""


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh and its rules: gives the sharding of anything that names its axes."""

    mesh: Mesh
    rules: tuple[tuple[str, str | tuple[str, ...] | None], ...] = tuple(RULES.items())
    manual: tuple[str, ...] = ()
    """Mesh axes over which the code at hand sees the part of one device (within `jax.shard_map`)."""

    def inside(self) -> "Sharding":
        """For code that sees the rows of one device; only what splits weights within a row is left to the compiler."""
        rows = names_of([dict(self.rules)["batch"], dict(self.rules)["seq"]])
        others = any(n > 1 for axis, n in self.mesh.shape.items() if axis not in rows)
        return dataclasses.replace(self, manual=rows if others else self.mesh.axis_names)

    @property
    def by_row(self) -> tuple[str, ...]:
        """The mesh axes that split the rows of a batch, or each row."""
        rows = names_of([dict(self.rules)["batch"], dict(self.rules)["seq"]])
        return tuple(axis for axis in rows if self.mesh.shape[axis] > 1)

    @property
    def spread(self) -> int:
        """The number of devices that the arrays at hand are spread over."""
        return math.prod(n for axis, n in self.mesh.shape.items() if axis not in self.manual)

    def rows_spec(self, ndim: int) -> PartitionSpec:
        """The partition of an array `[B]` or `[B, T, ...]` of a batch."""
        rules = dict(self.rules)
        return PartitionSpec(rules["batch"], *([rules["seq"]] if ndim > 1 else []))

    @property
    def platform(self) -> str:
        """`cpu`, `tpu` or `gpu`: what the mesh is made of, which may be absent from this machine."""
        return self.mesh.devices.flat[0].platform

    @property
    def batch_size(self) -> int:
        """Number of ways in which the rows of a batch are split."""
        return self.ways(dict(self.rules)["batch"])

    def ways(self, mesh_axes) -> int:
        """Into how many parts these mesh axes split an array."""
        return math.prod(self.mesh.shape[axis] for axis in _tuple(mesh_axes))

    def spec(self, axes: Sequence[str | None], shape: Sequence[int], path: str) -> PartitionSpec:
        """The partition of a weight. Raises SettingsError where a dimension does not divide or shares a mesh axis."""
        rules, out, owner = dict(self.rules), [], {}
        for axis, dim in zip(axes, shape, strict=True):
            mesh_axes = rules[axis] if axis else None
            if dim % self.ways(mesh_axes):
                raise SettingsError(self._does_not_divide(axis, dim, mesh_axes, path))
            for name in _tuple(mesh_axes):
                if name in owner:
                    raise SettingsError(f"{path}: {name} would split both {owner[name]} and {axis}; see parallel.rules")
                owner[name] = axis
            out.append(mesh_axes)
        return PartitionSpec(*out)

    def _does_not_divide(self, axis, dim, mesh_axes, path) -> str:
        size = self.ways(mesh_axes)
        names = "*".join(_tuple(mesh_axes))
        fits = ", ".join(str(n) for n in range(1, size) if dim % n == 0)
        hint = OPT_INS.get(axis, "").format(size=size)
        return (
            f"{path}: {axis}={dim} does not divide over {names}={size}; sizes that fit: {fits}{'; ' * bool(hint)}{hint}"
        )

    def weight(self, axes, shape, path: str) -> NamedSharding:
        """The sharding of a weight with these logical axes."""
        return NamedSharding(self.mesh, self.spec(axes, shape, path))

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Asks the compiler to lay out an activation by its logical axes; one that does not divide is left whole."""
        spec = self.activation(axes, x.shape)
        if not self.manual:
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))
        return jax.lax.with_sharding_constraint(x, spec) if self.spread > 1 else x

    def activation(self, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """The partition of an activation with these logical axes; an axis that does not divide is left whole."""
        rules, out = dict(self.rules), []
        for axis, n in zip(axes, shape, strict=True):
            left = tuple(name for name in _tuple(rules[axis] if axis else None) if name not in self.manual)
            out.append(left if left and n % self.ways(left) == 0 else None)
        return PartitionSpec(*out)

    def map(self, f, in_specs, out_specs):
        """`f` on the part of each device; where the code at hand sees such parts already, `f` itself."""
        names = set(self.mesh.axis_names) - set(self.manual)
        if not names:
            return f
        mesh = None if self.manual else self.mesh  # within another shard_map it is the mesh at hand
        return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)

    def by_part(self, f, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        """`f(x)` on each part of what the compiler splits by `spec`, for collectives over manual axes.

        The compiler splits none of these: it would make x whole before them, and all devices would move all of it.
        """
        return self.map(f, spec, spec)(x) if any(spec) else f(x)

    def gather(self, x: jax.Array, axis: str, dim: int) -> jax.Array:
        """The parts of an array that devices along a manual mesh axis hold, one after another along `dim`."""
        for groups in _stages(self.mesh, axis):
            x = jax.lax.all_gather(x, axis, axis=dim, tiled=True, axis_index_groups=groups)
        return x

    def across(self, axis: str) -> str | None:
        """The mesh axis, where it is more than one device and the code at hand sees the part of one."""
        return axis if axis in self.manual and self.mesh.shape[axis] > 1 else None

    def own_key(self, key: jax.Array | None) -> jax.Array | None:
        """A key of this device's rows, where the code at hand sees those of one."""
        if key is None or not (self.manual and self.by_row):
            return key
        return jax.random.fold_in(key, jax.lax.axis_index(self.by_row))

    def row_length(self, held: int) -> int:
        """Tokens of a whole row, of which so many are at hand."""
        return held * self.mesh.shape["context"] if self.across("context") else held

    def order(self, length: int) -> np.ndarray:
        """The places in a row of the tokens that devices along the context axis hold, one device after another.

        Device i of n holds pieces i and 2n - 1 - i of 2n, so that each has as much causal attention to compute; where
        the length does not divide so, one piece each.
        """
        n = self.mesh.shape["context"]
        pieces = np.arange(length).reshape(2 * n, -1) if length % (2 * n) == 0 else np.arange(length).reshape(n, -1)
        if len(pieces) == n:
            return pieces.reshape(-1)
        return np.concatenate([pieces[j] for i in range(n) for j in (i, 2 * n - 1 - i)])

    def part(self, x: jax.Array, dim: int = 1) -> jax.Array:
        """This device's part of whole rows, in the order of `order`."""
        if self.across("context") is None:
            return x
        size = x.shape[dim] // self.mesh.shape["context"]
        mine = jax.lax.dynamic_slice_in_dim(jnp.asarray(self.order(x.shape[dim])), self.piece * size, size)
        return jnp.take(x, mine, axis=dim)

    def whole(self, x: jax.Array, dim: int = 1) -> jax.Array:
        """Whole rows, in their natural order, of the parts that devices along the context axis hold."""
        if self.across("context") is None:
            return x
        x = self.gather(x, "context", dim)
        n, back = self.mesh.shape["context"], np.argsort(self.order(x.shape[dim]))
        runs = 2 * n if x.shape[dim] % (2 * n) == 0 else n  # whole pieces move: a gather of single tokens would be slow
        pieces = x.reshape(*x.shape[:dim], runs, -1, *x.shape[dim + 1 :])
        size = x.shape[dim] // runs
        return jnp.concatenate([jax.lax.index_in_dim(pieces, int(i), dim, False) for i in back[::size] // size], dim)

    @property
    def piece(self):
        """The place of this device along the context axis."""
        return jax.lax.axis_index("context")

    @property
    def first_part(self):
        """Whether no other device holds an earlier part of the same rows."""
        return self.piece == 0 if self.across("context") else True

    def row_total(self, x):
        """Sums over the devices that hold other parts of the same rows."""
        return jax.lax.psum(x, "context") if self.across("context") else x

    def total(self, x):
        """Sums over the devices that hold other rows, where the code at hand sees the rows of one."""
        return jax.lax.psum(x, self.by_row) if self.manual and self.by_row else x

    def first_row(self, rows: int):
        """The place of the first of these rows in the whole batch."""
        axes = [axis for axis in _tuple(dict(self.rules)["batch"]) if axis in self.manual]
        return jax.lax.axis_index(axes) * rows if axes else 0

    @functools.cached_property
    def share(self) -> tuple[int, int]:
        """`(p, P)`: this process reads the p-th of P equal shares of the rows of each batch.

        Processes whose devices hold parts of the same rows read the same share. Raises SettingsError where the mesh
        does not give every process whole shares.
        """
        place = {axis: i for i, axis in enumerate(self.mesh.axis_names)}
        axes = [place[axis] for axis in _tuple(dict(self.rules)["batch"])]
        sizes, held = [self.mesh.devices.shape[i] for i in axes], {}
        for index, device in np.ndenumerate(self.mesh.devices):
            block = int(np.ravel_multi_index([index[i] for i in axes], sizes)) if axes else 0
            held.setdefault(device.process_index, set()).add(block)
        n = len(held[min(held)])
        for blocks in held.values():
            if sorted(blocks) != list(range(min(blocks), min(blocks) + n)) or min(blocks) % n:
                mesh = " x ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items() if size > 1)
                raise SettingsError(
                    f"the mesh {mesh} gives the {len(held)} processes rows that do not lie together; make "
                    f"parallel.context x parallel.tensor divide, or be a multiple of, the {jax.local_device_count()} "
                    "devices of a process"
                )
        return min(held[jax.process_index()]) // n, self.batch_size // n

    def batch(self, batch: Any) -> Any:
        """Puts the host arrays of this process's share of the rows, [rows, T] or [rows], on the devices."""
        share, shares = self.share

        def put(x):
            x = np.asarray(x)
            first, sharding = share * len(x), NamedSharding(self.mesh, self.rows_spec(x.ndim))

            def part(index):
                start, stop, _ = index[0].indices(shares * len(x))
                return x[(slice(start - first, stop - first), *index[1:])]

            return jax.make_array_from_callback((shares * len(x), *x.shape[1:]), sharding, part)

        return jax.tree.map(put, batch)


def _tuple(mesh_axes) -> tuple[str, ...]:
    return () if mesh_axes is None else (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes)


def names_of(spec) -> tuple[str, ...]:
    """The mesh axes in a PartitionSpec, or in a part of one."""
    return tuple(axis for split in spec for axis in _tuple(split))


@functools.cache
def _stages(mesh: Mesh, axis: str) -> tuple[list[list[int]] | None, ...]:
    """Groups of devices for one gather after another along a mesh axis; (None,) for all at once.

    On TPU a gather or a reduce-scatter over a whole slice is made an all-reduce by libtpu, which moves twice the bytes.
    Over one dimension of the torus after another it stays what it is, and can run beside products. The last dimension
    comes first, with the small parts.
    """
    line = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0).reshape(mesh.shape[axis], -1)[:, 0]
    if line[0].platform != "tpu":
        return (None,)
    coords = np.array([(*device.coords, getattr(device, "core_on_chip", 0)) for device in line])
    steps, stride, n = [], 1, len(line)
    while stride < n:
        size = _straight(coords[::stride])
        if size < 2 or (n // stride) % size:
            return (None,)
        starts = [start + i for start in range(0, n, stride * size) for i in range(stride)]
        steps.append([[start + stride * i for i in range(size)] for start in starts])
        stride *= size
    return tuple(steps) if len(steps) > 1 else (None,)


def _straight(coords: np.ndarray) -> int:
    """How many of these places `[n, dims]`, from the first one on, lie along one dimension."""
    moving = np.flatnonzero(coords[1] != coords[0])
    others = np.delete(coords, moving, axis=1)
    straight = (others == others[0]).all(axis=1)
    return len(coords) if straight.all() else int(np.argmin(straight))


def _slices(devices) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices})


def join_processes(config: ParallelConfig) -> None:
    """Joins the other processes of a run, before anything else touches jax; does nothing for a single process.

    On TPU pods, SLURM, MPI and Kubernetes jax finds the others by itself; elsewhere JAX_COORDINATOR_ADDRESS
    (host:port of process 0) and JAX_PROCESS_ID say where they are. Raises SettingsError when the count differs.
    """
    if config.processes == 1 or jax.distributed.is_initialized():
        return
    if "JAX_PROCESS_ID" in os.environ and config.processes is not None:
        jax.distributed.initialize(num_processes=config.processes, process_id=int(os.environ["JAX_PROCESS_ID"]))
    else:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise SettingsError(
                f"parallel.processes={config.processes}: the cluster does not say where the others are ({error}); "
                "set JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID for each process"
            ) from None
    if config.processes not in (None, jax.process_count()):
        raise SettingsError(f"parallel.processes={config.processes}, but {jax.process_count()} processes joined")


def make_sharding(config: ParallelConfig | None = None, devices=None) -> Sharding:
    """The mesh and rules that the settings ask for, over `devices` (default: all).

    Raises SettingsError that says which sizes would fit.
    """
    config = config or ParallelConfig()
    devices = list(devices if devices is not None else jax.devices())
    sizes = _sizes(config, len(devices))
    mesh = _mesh(sizes, devices)
    for axis, target in config.rules.items():
        if axis not in RULES:
            raise SettingsError(f"parallel.rules: unknown logical axis {axis}{nearest(axis, RULES)}")
        for name in _tuple(target):
            if name not in MESH_AXES:
                raise SettingsError(f"parallel.rules.{axis}: unknown mesh axis {name}{nearest(name, MESH_AXES)}")
    _check_fixed(config, dict(zip(MESH_AXES, sizes, strict=True)))
    return Sharding(mesh, tuple((RULES | config.rules).items()))


def _check_fixed(config: ParallelConfig, sizes: dict[str, int]) -> None:
    """Rows, positions and experts travel by code that knows their axes: other rules would give wrong numbers."""
    for axis in ("batch", "seq", "expert"):
        asked, wanted = (
            tuple(name for name in _tuple(rules.get(axis, RULES[axis])) if sizes[name] > 1)
            for rules in (config.rules, RULES)
        )
        if asked != wanted and not (axis == "seq" and not asked):
            sizes_asked = " ".join(f"parallel.{name}=1" for name in dict.fromkeys((*asked, *wanted)))
            raise SettingsError(
                f"parallel.rules.{axis}={config.rules[axis]!r}: {axis} is split over {_tuple(RULES[axis])} and no "
                f"other axes; leave the rule out, and choose the sizes instead ({sizes_asked})"
            )


def _sizes(config: ParallelConfig, n: int) -> tuple[int, ...]:
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    bad = [f"parallel.{axis}={size}" for axis, size in sizes.items() if size < 1 and size != -1]
    if bad or len(free) > 1:
        raise SettingsError(f"{', '.join(bad) or 'parallel: more than one -1'}: a size is 1 or more, and one may be -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if n % fixed or (not free and fixed != n):
        asked = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
        fits = ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
        advice = f"products that fit: {fits}" if free else f"the product must be {n}, or set parallel.fsdp=-1"
        raise SettingsError(f"the mesh {asked or 'of size 1'} does not fit {n} devices; {advice}")
    return tuple(n // fixed if size == -1 else size for size in sizes.values())


def _mesh(sizes: tuple[int, ...], devices: list) -> Mesh:
    # Auto, said in words: jax.make_mesh now defaults to Explicit, under which `table[tokens]` raises.
    types = (AxisType.Auto,) * len(sizes)
    if devices[0].platform == "cpu":
        return Mesh(np.array(devices).reshape(sizes), MESH_AXES, axis_types=types)
    slices = _slices(devices)
    if slices > 1:  # only the data axis crosses the slow network between slices
        from jax.experimental.mesh_utils import create_hybrid_device_mesh

        if sizes[0] % slices:
            raise SettingsError(
                f"parallel.data={sizes[0]} does not divide over {slices} slices; use a multiple of {slices}"
            )
        inner, outer = (sizes[0] // slices, *sizes[1:]), (slices, *[1] * (len(sizes) - 1))
        return Mesh(create_hybrid_device_mesh(inner, outer, devices), MESH_AXES, axis_types=types)
    from jax.experimental.mesh_utils import create_device_mesh

    # A dimension of the torus may belong to two axes: 8 x 8 over a slice of 4 x 4 x 4.
    return Mesh(create_device_mesh(sizes, devices, allow_split_physical_axes=True), MESH_AXES, axis_types=types)
