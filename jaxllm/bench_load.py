"""`jaxllm bench load MODEL_DIR`: how much memory of the host loading takes beside the weights, and how long.

Memory is the process's anonymous memory, read every two milliseconds from /proc (Linux). Pages of mapped files are not
counted: the system drops them when it needs the room.
"""

import json as json_format
import math
import threading
import time
from typing import Any

import jax

from jaxllm import tree
from jaxllm.errors import ResourceError, SettingsError
from jaxllm.hf.open import open_published
from jaxllm.sharding import make_sharding

STATUS, MIB = "/proc/self/status", 1 << 20


def bench_load(path: str, *, dtype: str = "float32", json: bool = False) -> dict[str, Any]:
    """Loads a published model, prints what it took (or a line of JSON) and returns it; sizes in bytes.

    `beside`: the peak of the host above the start, without the weights where the CPU is the device that holds them.
    Raises SettingsError for what is no published model, ResourceError where memory cannot be read.
    """
    if (published := open_published(path)) is None:
        raise SettingsError(f"{path}: no config.json there and no .gguf file; give the folder of a published model")
    sharding = make_sharding(None)
    jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(8))())  # what the runtime takes itself is there at the start
    shapes = [tensor.shape for tensor in published.tensors().values()]
    peak, start = Peak(), time.perf_counter()
    with peak:
        _, params = published.load(sharding, dtype=dtype)
        jax.block_until_ready(params)
    weights = tree.nbytes(params)
    found = {
        "seconds": time.perf_counter() - start,
        "weights": weights,
        "largest_tensor": 4 * max(map(math.prod, shapes)),
        "peak": peak.above,
        "beside": peak.above - (weights if jax.default_backend() == "cpu" else 0),
    }
    print(json_format.dumps(found) if json else show(found, dtype))
    return found


def show(found: dict[str, Any], dtype: str) -> str:
    """The dict of `bench_load` as lines for a person."""
    mib = {key: f"{value / MIB:,.0f} MiB" for key, value in found.items()}
    ratio = found["beside"] / found["largest_tensor"]
    return (
        f"weights         {mib['weights']} in {dtype}, in {found['seconds']:.1f} s\n"
        f"largest tensor  {mib['largest_tensor']} in float32\n"
        f"peak of host    {mib['peak']} above the start\n"
        f"beside weights  {mib['beside']}, {ratio:.2f} of the largest tensor"
    )


class Peak:
    """Within `with`: by how many bytes the largest `resident()` is above the first."""

    def __init__(self):
        self.above, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(resident(),), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _watch(self, start: int) -> None:
        while not self._over.wait(0.002):
            self.above = max(self.above, resident() - start)


def resident() -> int:
    """Bytes of anonymous memory of this process. Raises ResourceError where the system does not say."""
    try:
        with open(STATUS, encoding="utf-8") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        raise ResourceError(f"memory is read from {STATUS}, which this system lacks; run this on Linux") from None
