"""What chips can do, in one table: peak FLOP/s, memory, links. Sizes in bytes, speeds per second, all of one chip.

TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, as of 2026. GPU: NVIDIA's data sheets of the SXM and HGX boards,
which quote twice these FLOP/s, with sparsity, and NVLink as both directions together.
"""

import dataclasses

GIB, TERA, GIGA = 2**30, 1e12, 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip; `device` is the same for one JAX device. None: the chip has no such thing, or it is not published."""

    name: str
    bf16: float
    """Dense peak FLOP/s in bfloat16."""
    hbm: float
    """Bytes of memory: what the compiler (TPU) or the driver (GPU) leaves of the data sheet's."""
    hbm_bandwidth: float
    ici: float
    """Bytes/s that a chip sends over all its links to its slice, one way; NVLink to its node on a GPU."""
    dcn: float
    """Bytes/s that a chip sends to other slices, as its share of the host's network; InfiniBand on a GPU."""
    int8: float | None = None
    fp8: float | None = None
    """Peak where it is not that of bf16."""
    devices_per_chip: int = 1
    torus: int = 0
    """Dimensions of the torus of a slice; each has two links. 0: a switch joins all GPUs of a node."""
    pod: int = 8
    """Most chips that fast links join: a pod of TPUs, a node of GPUs."""
    largest: int | None = None
    """Chips of the largest slice, where that is not a pod."""
    clock: float | None = None
    """Cycles a second behind the TPU compiler's estimated_cycles: the peak over the FLOPs of a cycle, which are a power
    of two. Its estimates of large bf16 matmuls (16384^3, libtpu 0.0.52) come to 78 to 94 % of that power."""

    @property
    def gpu(self) -> bool:
        return not self.torus

    def flops(self, dtype: str = "bf16") -> float:
        """Peak FLOP/s of matmuls in `bf16`, `int8` or `fp8`; that of bf16 where the chip is no faster in the other."""
        return (self.int8 if dtype == "int8" else self.fp8 if dtype == "fp8" else None) or self.bf16

    @property
    def device(self) -> "Chip":
        """The share of one JAX device: a chip of TPU7x is two devices, each with half of all."""
        shared = ("bf16", "int8", "fp8", "hbm", "hbm_bandwidth", "ici", "dcn")
        n = self.devices_per_chip
        share = {name: value / n for name in shared if (value := getattr(self, name)) is not None}
        return dataclasses.replace(self, devices_per_chip=1, **share)


# ICI is half of the documented "bidirectional" figure, which counts both ways (v4: 6 links of 50 GB/s, Jouppi et al.
# 2023, table 4). DCN: gigabits a chip in the documents; v5e is 2 x 100 Gb/s for 8 chips; v4 is taken as v5p, 4 chips on
# the usual 200 Gb/s of a host. Memory: "exceeds available HBM (95.73G)" and its like, from libtpu 0.0.52.
# A pod of v5p has 8,960 chips, and its largest slice, 16x16x24, 6,144.
TPUS = (
    Chip(
        "v4", bf16=275 * TERA, hbm=30.75 * GIB, hbm_bandwidth=1200 * GIGA, ici=300 * GIGA, dcn=6.25 * GIGA,
        torus=3, pod=4096, clock=275 * TERA / 2**18,
    ),
    Chip(
        "v5e", bf16=197 * TERA, hbm=15.75 * GIB, hbm_bandwidth=819 * GIGA, ici=200 * GIGA, dcn=3.125 * GIGA,
        int8=393 * TERA, torus=2, pod=256, clock=197 * TERA / 2**17,
    ),
    Chip(
        "v5p", bf16=459 * TERA, hbm=95.73 * GIB, hbm_bandwidth=2765 * GIGA, ici=600 * GIGA, dcn=6.25 * GIGA,
        int8=918 * TERA, torus=3, pod=8960, largest=6144, clock=459 * TERA / 2**18,
    ),
    Chip(
        "v6e", bf16=918 * TERA, hbm=31.24 * GIB, hbm_bandwidth=1638 * GIGA, ici=400 * GIGA, dcn=12.5 * GIGA,
        int8=1836 * TERA, torus=2, pod=256, clock=918 * TERA / 2**19,
    ),
    Chip(  # Ironwood; two devices a chip, each with its TensorCore and half of the memory
        "tpu7x", bf16=2307 * TERA, hbm=2 * 94.74 * GIB, hbm_bandwidth=7380 * GIGA, ici=600 * GIGA, dcn=12.5 * GIGA,
        fp8=4614 * TERA, devices_per_chip=2, torus=3, pod=9216, clock=2307 * TERA / 2**20,
    ),
)  # fmt: skip

# Memory as nvidia-smi reports it, in MiB; one InfiniBand port of 200 Gb/s (A100) or 400 Gb/s for each GPU (DGX).
GPUS = (
    Chip(
        "a100", bf16=312 * TERA, hbm=81920 * 2**20, hbm_bandwidth=2039 * GIGA, ici=300 * GIGA, dcn=25 * GIGA,
        int8=624 * TERA,
    ),
    Chip(
        "h100", bf16=989 * TERA, hbm=81559 * 2**20, hbm_bandwidth=3350 * GIGA, ici=450 * GIGA, dcn=50 * GIGA,
        int8=1979 * TERA, fp8=1979 * TERA,
    ),
    Chip(
        "h200", bf16=989 * TERA, hbm=143771 * 2**20, hbm_bandwidth=4800 * GIGA, ici=450 * GIGA, dcn=50 * GIGA,
        int8=1979 * TERA, fp8=1979 * TERA,
    ),
    Chip(
        "b200", bf16=2250 * TERA, hbm=183359 * 2**20, hbm_bandwidth=8000 * GIGA, ici=900 * GIGA, dcn=50 * GIGA,
        int8=4500 * TERA, fp8=4500 * TERA,
    ),
)  # fmt: skip

CHIPS: dict[str, Chip] = {chip.name: chip for chip in TPUS + GPUS}

#: Other names of the same chips. libtpu itself refuses v5litepod, v7x and ironwood.
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e", "ironwood": "tpu7x", "v7x": "tpu7x", "tpu7": "tpu7x"}

#: Peak dense bf16 FLOP/s of one JAX device, by `device_kind`; the first pattern that matches counts. A chip of v4 and
#: v5p is one device (megacore, the default; with megacore turned off MFU reads half of what it is), a chip of v2 and v3
#: is two.
PEAKS = (
    (r"^TPU v2$", 46 * TERA / 2),
    (r"^TPU v3$", 123 * TERA / 2),
    (r"^TPU v4$", CHIPS["v4"].bf16),
    (r"^TPU v5( lite|e)$", CHIPS["v5e"].bf16),
    (r"^TPU v5p?$", CHIPS["v5p"].bf16),
    (r"^TPU v6( lite|e)$", CHIPS["v6e"].bf16),
    (r"^TPU7x$", CHIPS["tpu7x"].device.bf16),
    (r"\bA100\b", CHIPS["a100"].bf16),
    (r"\bH100 PCIe\b", 756 * TERA),
    (r"\b(H100|H200) NVL\b", 835 * TERA),
    (r"\b(H100|H200|GH200)\b", CHIPS["h100"].bf16),
    (r"\bB200\b", CHIPS["b200"].bf16),
)
