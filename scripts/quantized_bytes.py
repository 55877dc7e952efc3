"""Bytes to and from main memory of products with quantised weights on TPU, from programs compiled for absent ones.

    pip install -e '.[plan]'
    python scripts/quantized_bytes.py                  # some minutes
    python scripts/quantized_bytes.py --chips v6e --rows 8

Prints a table in Markdown: MiB that a product of bfloat16 rows with a matrix of 4096 inputs and 14336 outputs moves,
and the gradient of its rows, by format and way: `xla` is what the compiler makes of decoding and multiplying, `kernel`
is `jaxllm/kernels/weight_only.py`. In bold is what jaxllm does. `least` is codes and scales as they are kept, rows in
and rows out, each once.
"""

import argparse
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.kernels import weight_only
from jaxllm.kernels.backend import tracing_for
from jaxllm.plan import cost, hlo
from jaxllm.plan.topology import parse_topology, topology_devices
from jaxllm.weights import quantized
from jaxllm.weights.form import Form
from jaxllm.weights.formats import get_format

TOPOLOGIES = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
FORMATS = {
    "int8, int8 activations": ("int8", dict(activations="int8")),
    "int8": ("int8", {}),
    "int8, groups of 128": ("int8", dict(group=128)),
    "int4, groups of 64": ("int4", dict(group=64)),
    "nf4, groups of 64": ("nf4", dict(group=64)),
    "nf4, groups of 64, scales in 8 bits": ("nf4", dict(group=64, double=True)),
}


def weight(name: str, inputs: int, outputs: int) -> quantized.Quantized:
    """The shapes of such a matrix."""
    format, how = FORMATS[name]
    make = functools.partial(quantized.quantize, form=Form("io", (inputs, outputs)), format=format, **how)
    return jax.eval_shape(make, jax.ShapeDtypeStruct((inputs, outputs), jnp.float32))


def way(name: str, kernel: bool):
    """`x W` by the kernel, or as XLA does it."""

    def product(x, w):
        if w.activations == "int8":
            return w.product(x).astype(x.dtype)
        return quantized._kernel_product(x, w) if kernel else jax.checkpoint(quantized._plain_product)(x, w)

    return product


def compiled(f, chip: str, *args):
    """For one device of such a chip."""
    devices = topology_devices(parse_topology(TOPOLOGIES[chip]))
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    with tracing_for("tpu", devices=1):
        lowered = jax.jit(f).lower(*args)
    return lowered.compile()


def traffic(text: str) -> float:
    """Bytes of all instructions of a program without loops."""
    module = hlo.parse(text)
    entry = module.computations[module.entry]
    # A slice on its way to fast memory is given with the array that it is of.
    moved = (i.shapes[1].bytes if i.op == "slice-start" else cost.traffic(module, i, entry) for i in entry.values())
    return sum(moved)


def kernel_is_ours(x, w) -> bool:
    with tracing_for("tpu", devices=1):
        return w.activations is None and quantized._by_kernel(x, w)


def rows_of_table(chip: str, name: str, rows: list[int], inputs: int, outputs: int):
    """`(way, ours, MiB of each product, MiB of each gradient)`."""
    w = weight(name, inputs, outputs)
    kind = get_format(w.format)
    x = jax.ShapeDtypeStruct((8, inputs), jnp.bfloat16)
    takes = w.activations is None and weight_only.fits(x, w.codes, inputs // w.group, weight_only.Coding(kind.bits))
    for kernel in (False, True)[: 1 + takes]:
        product, found = way(name, kernel), []
        for back in (False, True):
            for n in rows:
                x, dy = (jax.ShapeDtypeStruct((n, size), jnp.bfloat16) for size in (inputs, outputs))
                f = (lambda x, w, dy: jax.vjp(lambda x: product(x, w), x)[1](dy)) if back else product  # noqa: B023
                text = compiled(f, chip, x, w, *[dy] * back).as_text()
                found.append(traffic(text) / 2**20)
        yield "kernel" if kernel else "xla", kernel == kernel_is_ours(x, w), found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", default=list(TOPOLOGIES), choices=TOPOLOGIES)
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 64, 2048])
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=14336)
    args = parser.parse_args()
    heads = [f"{n} rows" for n in args.rows] + [f"gradient, {n} rows" for n in args.rows]
    print(f"| chip | format | way | {' | '.join(heads)} |\n|{'---|' * (3 + len(heads))}")
    for name in FORMATS:
        w = weight(name, args.inputs, args.outputs)
        kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(w))
        least = [(kept + 2 * n * (args.inputs + args.outputs)) / 2**20 for n in args.rows]
        print(f"| | {name} | least | {' | '.join(f'{mib:.1f}' for mib in 2 * least)} |", flush=True)
        for chip in args.chips:
            for how, ours, found in rows_of_table(chip, name, args.rows, args.inputs, args.outputs):
                cells = " | ".join(f"**{mib:.1f}**" if ours else f"{mib:.1f}" for mib in found)
                print(f"| {chip} | {name} | {how} | {cells} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
