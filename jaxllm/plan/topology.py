"""Slices and nodes by name (`v5p:4x4x4` chips, `h100:8x16` is 16 nodes of 8 GPUs), and the devices of absent TPUs."""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import re
import sys
import tempfile

from jaxllm.chips import ALIASES, CHIPS, Chip
from jaxllm.errors import MissingExtra, SettingsError, UserError, nearest

#: Slices of the chips with a 2D torus (cloud.google.com/tpu/docs/{v5e,v6e}).
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
#: Slices smaller than a cube of 4x4x4; above, every side is a multiple of 4 (cloud.google.com/tpu/docs/{v4,v5p,tpu7x}).
SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
#: What libtpu needs so that it neither asks the metadata server of a cloud VM nor insists on being alone.
QUIET = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of TPUs (`shape`: chips along each side), or GPUs (`shape`: GPUs a node, nodes)."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{_text(self.shape)}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """JAX devices: two for each chip of TPU7x, else one."""
        return self.chips * self.chip.devices_per_chip

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which sides of a TPU slice are rings: of v5e and v6e those of 16, elsewhere all from a full cube on."""
        if self.chip.torus == 2:
            return tuple(side == 16 for side in self.shape)
        return (all(side % 4 == 0 for side in self.shape),) * self.chip.torus


def parse_topology(text: str) -> Topology:
    """`v5p:4x4x4`, `h100:8` or `h100:8x16` (GPUs a node x nodes) as a Topology.

    Raises SettingsError that names the nearest chip, or the nearest slice that exists: libtpu accepts any size.
    """
    name, colon, sides = text.strip().lower().partition(":")
    name = ALIASES.get(name, name)
    if name not in CHIPS:
        counted = re.fullmatch(r"(.+)-(\d+)", name)
        if counted and ALIASES.get(counted[1], counted[1]) in CHIPS and not colon:
            raise SettingsError(f"topology {text}: write its shape instead{_by_count(counted[1], int(counted[2]))}")
        raise SettingsError(f"topology {text}: unknown chip {name!r}{nearest(name, CHIPS)}")
    chip = CHIPS[name]
    if not re.fullmatch(r"\d+(x\d+)*", sides):
        example = "8x2" if chip.gpu else "4x4" if chip.torus == 2 else "4x4x4"
        raise SettingsError(f"topology {text}: write chip and shape, such as {name}:{example}")
    shape = tuple(int(side) for side in sides.split("x"))
    if chip.gpu:
        return Topology(chip, _nodes(text, chip, shape))
    if len(shape) != chip.torus:
        raise SettingsError(
            f"topology {text}: {name} has {chip.torus} dimensions, not {len(shape)}; "
            f"did you mean {name}:{_text(_nearest(chip, shape))}?"
        )
    if not _exists(chip, shape):
        raise SettingsError(f"topology {text}: no such slice; did you mean {name}:{_text(_nearest(chip, shape))}?")
    return Topology(chip, shape)


@functools.cache
def slices_of(chip: Chip) -> tuple[tuple[int, ...], ...]:
    """Shapes of all slices of a TPU chip, sides in ascending order from a cube on."""
    if chip.torus == 2:
        return FLAT
    one = ((1, 1, 1),) if chip.name == "tpu7x" else ()
    shapes = itertools.combinations_with_replacement(range(4, 257, 4), 3)
    return one + SMALL + tuple(shape for shape in shapes if math.prod(shape) <= (chip.largest or chip.pod))


def _exists(chip: Chip, shape: tuple[int, ...]) -> bool:
    known = slices_of(chip)
    # The sides of a v4 slice can stand in any order; later chips want them ascending.
    return shape in known or (chip.name == "v4" and min(shape) >= 4 and tuple(sorted(shape)) in known)


def _nearest(chip: Chip, shape: tuple[float, ...]) -> tuple[int, ...]:
    """The slice with the nearest number of chips, then the most alike sides."""
    asked = sorted(shape, reverse=True)

    def distance(other):
        sides = itertools.zip_longest(asked, sorted(other, reverse=True), fillvalue=1)
        chips = abs(math.log(math.prod(other) / max(math.prod(asked), 1)))
        return chips, sum(math.log(max(a, 1) / b) ** 2 for a, b in sides)

    return min(slices_of(chip), key=distance)


def _by_count(name: str, count: int) -> str:
    """What `v5p-128` means: v4, v5p and tpu7x are counted in cores, two a chip, v5e and v6e in chips."""
    chip = CHIPS[ALIASES.get(name, name)]
    if chip.gpu:
        return f": {chip.name}:8x{count // 8}" if count > 8 else f": {chip.name}:{count}"
    chips = max(count // 2 if chip.torus == 3 else count, 1)
    shape = _nearest(chip, (chips ** (1 / chip.torus),) * chip.torus)
    return f": {chip.name}:{_text(shape)} has {math.prod(shape)} chips"


def _nodes(text: str, chip: Chip, shape: tuple[int, ...]) -> tuple[int, ...]:
    per_node, nodes, *rest = (*shape, 1) if len(shape) == 1 else shape
    if rest or per_node not in (1, 2, 4, 8) or nodes < 1:
        meant = max(nodes if len(shape) > 1 else -(-per_node // 8), 2)
        raise SettingsError(f"topology {text}: write GPUs a node (1, 2, 4 or 8) x nodes, such as {chip.name}:8x{meant}")
    return per_node, nodes


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def topology_devices(topology: Topology, slices: int = 1) -> list:
    """JAX devices of absent TPUs, to compile for: `slices` such slices, joined by the data-center network.

    Nothing can run on them. Raises MissingExtra without libtpu, UserError for GPUs and where libtpu refuses.
    """
    if topology.chip.gpu:
        raise UserError(f"{topology.name}: programs are compiled for TPUs only; a GPU plan is by formulas alone")
    if importlib.util.find_spec("libtpu") is None:
        raise MissingExtra(f"compiling for {topology.name}", "libtpu", "plan")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import jax
    from jax.experimental import topologies

    options = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    options |= {"num_slices": slices} if slices > 1 else {}
    try:
        with _held_stderr():
            devices = list(topologies.get_topology_desc(topology.name, "tpu", **options).devices)
    except Exception as error:  # jaxlib's own types, and more of them with each version
        versions = f"jax {jax.__version__} with libtpu {_version('libtpu')}"
        raise UserError(f"{topology.name}: {versions} refuses it: {str(error).splitlines()[0]}") from error
    assert len(devices) == slices * topology.devices, (topology, slices, len(devices))
    return devices


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)


@contextlib.contextmanager
def _held_stderr():
    """Holds back what libtpu writes to stderr while it looks for a TPU; it comes out after all if that fails."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(saved, held.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)
