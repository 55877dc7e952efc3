"""What a plan is for: a slice of TPUs, nodes of GPUs, or devices of this machine's CPU (`cpu:8`)."""

import dataclasses
import os
import re
from collections.abc import Mapping

from jaxllm.chips import Chip
from jaxllm.errors import SettingsError
from jaxllm.plan.topology import Topology, parse_topology, topology_devices

#: What makes this process have so many CPU devices; jax reads it when it first looks for devices.
CPU_DEVICES = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices by name. `topology` is None for CPU devices, of which no speed is known."""

    name: str
    devices: int
    slices: int = 1
    topology: Topology | None = None

    @property
    def chip(self) -> Chip | None:
        return self.topology and self.topology.chip

    @property
    def chips(self) -> int:
        return self.slices * self.topology.chips if self.topology else self.devices

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`."""
        return "cpu" if self.chip is None else "gpu" if self.chip.gpu else "tpu"

    @property
    def compiles(self) -> bool:
        """Whether there are devices to compile for; a GPU plan is by formulas alone."""
        return self.platform != "gpu"

    @property
    def per_slice(self) -> int:
        return self.devices // self.slices

    def jax_devices(self) -> list:
        """The devices, most of them absent. Raises UserError as `topology_devices`, and for too few CPU devices."""
        if self.topology is not None:
            return topology_devices(self.topology, self.slices)
        import jax

        if len(found := jax.devices("cpu")) < self.devices:
            raise SettingsError(
                f"topology {self.name}: this process has {len(found)} CPU devices; "
                f"set XLA_FLAGS={CPU_DEVICES}={self.devices} before it starts"
            )
        return found[: self.devices]


def parse_target(text: str, slices: int = 1) -> Target:
    """`v5p:4x4x4`, `h100:8x2` or `cpu:8` as a Target. Raises SettingsError that names the nearest topology."""
    if slices < 1:
        raise SettingsError(f"--slices {slices}: must be at least 1")
    if found := re.fullmatch(r"\s*cpu:([1-9]\d*)\s*", text.lower()):
        if slices > 1:
            raise SettingsError(f"--slices {slices} would be ignored: CPU devices are one slice; leave it out")
        return Target(f"cpu:{found[1]}", int(found[1]))
    if text.strip().lower().partition(":")[0] == "cpu":
        raise SettingsError(f"topology {text}: write how many devices of this machine's CPU, such as cpu:8")
    topology = parse_topology(text)
    if topology.chip.gpu and slices > 1:
        nodes = topology.shape[1] * slices
        raise SettingsError(
            f"--slices {slices} would be ignored: write all nodes into the shape, "
            f"{topology.chip.name}:{topology.shape[0]}x{nodes}"
        )
    return Target(topology.name, topology.devices * slices, slices, topology)


def prepare_environment(target: Target, environ: Mapping[str, str] = os.environ) -> None:
    """Before jax is loaded: programs are compiled on the CPU's side, and are not looked for in a cache.

    A TPU of this machine is left alone. jax 0.10.2 cannot read cached programs of absent TPUs again, and warns each
    time that it tries.
    """
    environ.setdefault("JAX_PLATFORMS", "cpu")
    if target.topology is not None:
        environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    elif CPU_DEVICES not in (flags := environ.get("XLA_FLAGS", "")):
        environ["XLA_FLAGS"] = f"{flags} {CPU_DEVICES}={target.devices}".strip()
