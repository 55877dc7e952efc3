"""How much memory loading a published model takes on the host: its peak beside the weights and the largest tensor.

    python scripts/load_memory.py MODEL_DIR [--dtype float32]

Anonymous memory of a process that does nothing else, read from /proc (Linux); pages of mapped files can be dropped by
the system at any time and are not counted.
"""

import argparse
import math
import threading
import time

import jax

from jaxllm import tree
from jaxllm.hf.open import open_published


def resident() -> int:
    """Bytes of anonymous memory of this process."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """The largest `resident()`, looked at every few milliseconds."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.over = 0, threading.Event()

    def run(self):
        while not self.over.wait(0.002):
            self.most = max(self.most, resident())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(8))())
    published = open_published(options.model)
    tensors = published.tensors()
    largest = max(4 * math.prod(tensors[name].shape) for name in tensors)
    before, peak, start = resident(), Peak(), time.perf_counter()
    peak.start()
    _, params = published.load(dtype=options.dtype)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    peak.over.set()
    peak.join()
    weights = tree.nbytes(params)
    print(f"weights {weights / 2**20:,.0f} MiB, largest tensor {largest / 2**20:,.0f} MiB as float32")
    print(f"peak of the host above the start {(peak.most - before) / 2**20:,.0f} MiB, {seconds:.1f} s")
    print(f"(peak - weights) / largest tensor: {(peak.most - before - weights) / largest:.2f}")


if __name__ == "__main__":
    main()
