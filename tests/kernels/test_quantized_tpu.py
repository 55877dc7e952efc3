"""Products with quantised weights on TPU: numbers of the kernel, interpreted on CPU; bytes of compiled programs."""

import dataclasses
import importlib.util
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxllm.kernels import weight_only
from jaxllm.kernels.backend import alone, tracing_for
from jaxllm.weights import quantized
from jaxllm.weights.form import Form
from jaxllm.weights.formats import get_format

SCRIPT = Path(__file__).parents[2] / "scripts" / "quantized_bytes.py"
RNG = np.random.default_rng(0)
#: format, inputs, how it is quantised
CASES = [
    ("int4", 1024, dict(group=64)),
    ("nf4", 1024, dict(group=64, double=True)),
    ("nf4", 3072, dict(group=16)),  # 192 groups: more than the lanes of a tile
    ("int8", 1024, dict(group=32)),
    ("int8", 1024, dict(symmetric=False)),
    ("int4", 1024, dict()),
    ("int4", 2304, dict(group=144, symmetric=False)),  # groups that begin within a tile
    ("int2", 1024, dict(group=32)),
]


def weight(format, inputs, outputs=384, **how):
    w = jnp.asarray(RNG.standard_normal((inputs, outputs)), jnp.float32)
    return jax.jit(lambda w: quantized.quantize(w, Form("io", w.shape), format, **how))(w)


def rows(n, width):
    return jnp.asarray(RNG.standard_normal((n, width)), jnp.bfloat16)


def rounded(w):
    """The values as the kernel has them: of scales in bfloat16, rounded to bfloat16; `[I, O]` in float64."""
    kind, scale = get_format(w.format), w.scales().astype(jnp.bfloat16).astype(jnp.float32)
    return np.float64(quantized._values(kind, w.codes, scale, w.zero, jnp.float32).astype(jnp.bfloat16)).T


@pytest.mark.parametrize("format, inputs, how", CASES)
def test_the_kernel_multiplies_with_the_values_of_the_codes(format, inputs, how, monkeypatch):
    """Sums in float32; what is left is the rounding of the result to bfloat16, 2^-9 of it."""
    monkeypatch.setattr(weight_only, "INPUTS", 512)  # several blocks of inputs
    monkeypatch.setattr(weight_only, "ROWS", 16)  # several products of rows
    monkeypatch.setattr(weight_only, "ROWS_BYTES", 32 * 2 * inputs)  # and blocks of them
    w = weight(format, inputs, **how)
    kind, values = get_format(format), rounded(w)
    coding = weight_only.Coding(kind.bits, kind.levels)
    x, dy = rows(37, inputs), rows(37, 384)
    assert weight_only.fits(x, w.codes, inputs // w.group, coding)
    for product, given, matrix in ((weight_only.product, x, values), (weight_only.product_back, dy, values.T)):
        found = product(given, w.codes, w.scales(), w.zero, coding, interpret=True)
        assert found.dtype == jnp.bfloat16
        expected = np.float64(given) @ matrix
        np.testing.assert_array_less(np.abs(np.float64(found) - expected), 2.0**-8 * np.abs(expected) + 2e-4)


def test_a_weight_by_the_kernel_has_the_gradients_of_its_values(monkeypatch):
    """Of activations, which QLoRA wants, and of scales."""
    w, x, dy = weight("nf4", 256, 128, group=32), rows(6, 256).reshape(2, 3, 256), rows(6, 128).reshape(2, 3, 128)

    def run(x, scale):
        def f(x, scale):
            return dataclasses.replace(w, scale=scale).einsum("BTD,DF->BTF", x)

        out, pull = jax.vjp(f, x, scale)
        return out, pull(dy)

    expected = jax.jit(run)(x, w.scale)
    used = []
    monkeypatch.setattr(quantized, "_by_kernel", lambda x, w: used.append(1) or True)
    got = jax.jit(lambda *args: run(*args))(x, w.scale)  # traced anew
    assert used and tiny.worst(got, expected) < 0.01
    assert tiny.relative(got[1][0], np.float64(dy) @ np.float64(w.dense(jnp.float32)).T) < 0.01


def test_a_kernel_is_taken_where_a_device_computes_by_itself():
    """XLA cannot split it over devices."""
    assert not alone()  # eight virtual devices of this process
    with tracing_for("tpu", devices=1):
        assert alone()
    with tracing_for("tpu", devices=4):
        assert not alone()
    with tracing_for("tpu"):  # not known
        assert not alone()
        mesh, found = AbstractMesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2), {}
        for names in ({"fsdp"}, {"fsdp", "tensor"}):

            def f(x, names=names):
                found[frozenset(names)] = alone()
                return x

            spec = PartitionSpec("fsdp")
            jax.eval_shape(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=names), jnp.ones(4))
        assert found == {frozenset({"fsdp"}): False, frozenset({"fsdp", "tensor"}): True}


def takes(w, x):
    with tracing_for("tpu", devices=1):
        return quantized._by_kernel(x, w)


def test_the_choice():
    """XLA where it decodes on the way, or the shapes are not the kernel's."""
    x = rows(8, 1024)
    for format, how, kernel in (
        ("int8", {}, False),
        ("int8", dict(group=128), True),
        ("int4", dict(group=64), True),
        ("nf4", dict(group=64), True),
        ("fp8", dict(group=64), False),
        ("int4", dict(group=256), False),  # four groups
    ):
        w = weight(format, 1024, **how)
        assert takes(w, x) == kernel, (format, how)
        assert not takes(w, x.astype(jnp.float32)) and not quantized._by_kernel(x, w)
    assert not takes(weight("int4", 1024, 200, group=64), x)  # outputs that are no whole tiles


@pytest.fixture(scope="module")
def script():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu")
    spec = importlib.util.spec_from_file_location("quantized_bytes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def floats_of(text, size):
    """Arrays of at least so many floats."""
    found = set(re.findall(r"\b(bf16|f32)\[([\d,]+)\]", text))
    return [(kind, dims) for kind, dims in found if math.prod(map(int, dims.split(","))) >= size]


@pytest.mark.tpu_programs
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # which holds no such programs
@pytest.mark.parametrize("chip", ["v5p", "v6e"])
@pytest.mark.parametrize(
    "name", ["int8, int8 activations", "int8", "int8, groups of 128", "int4, groups of 64", "nf4, groups of 64"]
)
def test_codes_are_read_once_and_no_values_are_written(script, name, chip):
    """8 rows and their gradient: the codes once, scales three times (turned on the way), and the rows."""
    inputs, outputs = 2048, 4096
    w = script.weight(name, inputs, outputs)
    most = w.codes.size + 3 * w.scale.size * 4 + 0.3 * 2**20
    x, dy = (jax.ShapeDtypeStruct((8, size), jnp.bfloat16) for size in (inputs, outputs))

    def product(x, w):
        return w.einsum("BD,DF->BF", x)

    def back(x, w, dy):
        return jax.vjp(lambda x: product(x, w), x)[1](dy)

    for f, args in ((product, (x, w)), (back, (x, w, dy))):
        text = script.compiled(f, chip, *args).as_text()
        assert ("weight_only" in text) == takes(w, x)
        moved = script.traffic(text)
        assert w.codes.size <= moved < most < 2 * inputs * outputs, (moved, most)
        assert not floats_of(text[text.index("\nENTRY") :], inputs * outputs)
