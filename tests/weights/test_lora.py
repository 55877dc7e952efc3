"""Adapters on one weight: against NumPy, against the merged weight for every equation of the model, row by row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm.errors import UserError
from jaxllm.weights import seam
from jaxllm.weights.form import form_of
from jaxllm.weights.lora import Lora, add_lora
from jaxllm.weights.quantized import quantize

SIZES = dict(zip("BTDNHFVECRM", (3, 5, 32, 2, 16, 32, 24, 2, 4, 32, 24), strict=True))
KINDS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}
FORMATS = {"int8": {}, "int4": {"group": 16}, "nf4": {"group": 16, "double": True}}
#: Every way in which the model reads a weight that can have an adapter; the last two are compressed latent attention.
EQUATIONS = {
    "q": (("embed", "heads", "head"), "BTD,DNH->BTNH"),
    "o": (("heads", "head", "embed"), "BTNH,NHD->BTD"),
    "up": (("embed", "ffw"), "BTD,DF->BTF"),
    "head": (("vocab", "embed"), "BTD,VD->BTV"),
    "expert": (("expert", "embed", "ffw"), "BECD,EDF->BECF"),
    "k_up": (("rank", "heads", "head"), "BTNH,RNH->BTNR"),
    "v_up": (("rank", "heads", "head"), "BTNR,RNH->BTNH"),
}


def sized(letters: str, seed: int = 0):
    shape = [SIZES[letter] for letter in letters]
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def adapted(axes, w_axes: str, kind: str = "lora", *, format: str | None = None, seed: int = 1, **options) -> Lora:
    """An adapter over a random weight, with nothing at its neutral start."""
    w = sized(w_axes, 0)
    form = form_of(axes, w.shape)
    base = w if format is None else quantize(w, form, format, **FORMATS[format])
    lora = add_lora(base, form, jax.random.key(seed), rank=4, alpha=6.0, **KINDS[kind], **options)
    return randomised(lora, seed)


def randomised(lora: Lora, seed: int) -> Lora:
    rng = np.random.default_rng(seed)
    a, b = (jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in (lora.lora_a, lora.lora_b))
    new = dict(lora_a=a, lora_b=b)
    if lora.lora_magnitude is not None:
        new["lora_magnitude"] = lora.lora_magnitude * (1 + 0.3 * rng.random(lora.lora_magnitude.shape, np.float32))
    return dataclasses.replace(lora, **new)


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_the_papers(kind):
    """In float64: W + s a b with s = alpha / r or alpha / sqrt(r); DoRA's norm is a constant to the gradient."""
    axes, equation = EQUATIONS["q"]
    lora, x, dy = adapted(axes, "DNH", kind), sized("BTD", 2), sized("BTNH", 3)
    learned = {name: getattr(lora, name) for name in ("lora_a", "lora_b", "lora_magnitude")}

    def loss(learned):
        y = dataclasses.replace(lora, **learned).einsum(equation, x)
        return jnp.sum(y * dy), y

    (_, y), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(learned)
    a, b, m = (None if v is None else np.asarray(v, np.float64) for v in learned.values())
    w, x, dy = (np.asarray(v, np.float64) for v in (lora.base.reshape(32, 32), x.reshape(-1, 32), dy.reshape(-1, 32)))
    s = 6.0 / np.sqrt(4) if kind == "rslora" else 6.0 / 4
    merged = w + s * a @ b
    norm = np.linalg.norm(merged, axis=0)
    factor = m / norm if kind == "dora" else np.ones(32)
    assert tiny.relative(y.reshape(-1, 32), x @ merged * factor) < 1e-6
    d = dy * factor
    assert tiny.relative(found["lora_a"], s * x.T @ d @ b.T) < 1e-5
    assert tiny.relative(found["lora_b"], s * (x @ a).T @ d) < 1e-5
    if kind == "dora":
        assert tiny.relative(found["lora_magnitude"], np.sum(dy * (x @ merged), axis=0) / norm) < 1e-5


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", EQUATIONS)
def test_an_adapter_equals_the_merged_weight(name, kind):
    axes, equation = EQUATIONS[name]
    x_axes, w_axes, _ = equation.replace("->", ",").split(",")
    lora, x = adapted(axes, w_axes, kind), sized(x_axes, 2)
    found, merged, base = jax.jit(
        lambda: (
            lora.einsum(equation, x),
            jnp.einsum(equation, x, lora.dense(x.dtype)),
            seam.einsum(equation, x, lora.base),
        )
    )()
    assert tiny.relative(found, merged) < 1e-5
    assert tiny.relative(base, merged) > 0.1


@pytest.mark.fast
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_over_codes_equals_the_merged_weight(kind, format):
    axes, equation = EQUATIONS["q"]
    lora, table, x = (
        adapted(axes, "DNH", kind, format=format),
        adapted(("vocab", "embed"), "VD", kind, format=format),
        0,
    )
    x, ids = sized("BTD", 2), jnp.arange(15).reshape(3, 5)
    found, merged = jax.jit(
        lambda: (
            (lora.einsum(equation, x), table.take(ids, jnp.float32)),
            (jnp.einsum(equation, x, lora.dense(x.dtype)), table.dense(jnp.float32)[ids]),
        )
    )()
    assert tiny.worst(found, merged) < 1e-5


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("block", [1, 8])
def test_experts_and_tables_equal_the_merged_weight(kind, block):
    lora = adapted(("expert", "embed", "ffw"), "EDF", kind)
    table, ids = adapted(("vocab", "embed"), "VD", kind), jnp.arange(15).reshape(3, 5)
    x, sizes = sized("MD", 2), jnp.array([8, 16])

    def both():
        whole = seam.grouped_matmul(x, lora.dense(x.dtype), sizes, block=block)
        rows = table.dense(jnp.float32)[ids]
        return (lora.grouped_matmul(x, sizes, block=block), table.take(ids, jnp.float32)), (whole, rows)

    assert tiny.worst(*jax.jit(both)()) < 1e-5


@pytest.mark.fast
def test_a_new_adapter_changes_no_bit():
    """b is 0; DoRA divides the norms by themselves, to rounding."""
    axes, equation = EQUATIONS["q"]
    w, x = sized("DNH"), sized("BTD", 2)
    form = form_of(axes, w.shape)
    for kind, options in KINDS.items():
        lora = add_lora(w, form, jax.random.key(0), rank=4, alpha=6.0, **options)
        found, plain = jax.jit(lambda lora=lora: (lora.einsum(equation, x), seam.einsum(equation, x, w)))()
        assert tiny.relative(found, plain) < 1e-6 if kind == "dora" else tiny.bit_equal(found, plain), kind
    bound = 32**-0.5
    assert 0.9 * bound < jnp.max(jnp.abs(lora.lora_a)) <= bound


@pytest.mark.fast
def test_rows_of_zeros_have_a_gradient_under_dora():
    """Rows that pad a vocabulary have no direction; they must not make the whole gradient NaN."""
    w = sized("VD").at[-2:].set(0)
    lora = add_lora(w, form_of(("vocab", "embed"), w.shape), jax.random.key(0), rank=4, alpha=6.0, dora=True)
    x, ids = sized("BTD", 2), jnp.arange(SIZES["V"])[None]

    def loss(lora):
        return jnp.sum(lora.einsum("BTD,VD->BTV", x) ** 2) + jnp.sum(lora.take(ids, jnp.float32) ** 2)

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(lora)))


def several(axes, w_axes: str, kind: str) -> tuple[list[Lora], Lora]:
    """Three adapters over one base, one by one and as one weight for rows that choose 2, none and 0."""
    ones = [adapted(axes, w_axes, kind, seed=seed) for seed in (1, 2, 3)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *(dataclasses.replace(one, base=None) for one in ones))
    together = dataclasses.replace(stacked, base=ones[0].base, adapters=3, rows_B=jnp.array([2, -1, 0]))
    return ones, together


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", EQUATIONS)
def test_adapters_by_row_equal_each_row_with_its_own(name, kind):
    axes, equation = EQUATIONS[name]
    x_axes, w_axes, _ = equation.replace("->", ",").split(",")
    ones, together = several(axes, w_axes, kind)
    x = sized(x_axes, 2)
    found, base = jax.jit(lambda: (together.einsum(equation, x), seam.einsum(equation, x, ones[0].base)))()
    alone = jax.jit(lambda: [one.einsum(equation, x) for one in ones])()
    assert tiny.relative(found[0], alone[2][0]) < 1e-6
    assert tiny.relative(found[2], alone[0][2]) < 1e-6
    assert tiny.bit_equal(found[1], base[1])


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_by_row_on_a_table(kind):
    ones, together = several(("vocab", "embed"), "VD", kind)
    ids = jnp.arange(15).reshape(3, 5)
    found, alone = jax.jit(lambda: (together.take(ids, jnp.float32), [one.take(ids, jnp.float32) for one in ones]))()
    assert tiny.relative(found[0], alone[2][0]) < 1e-6
    assert tiny.relative(found[2], alone[0][2]) < 1e-6
    assert tiny.bit_equal(found[1], ones[0].base[ids[1]])


@pytest.mark.fast
def test_what_several_adapters_cannot_do_is_said():
    _, together = several(("expert", "embed", "ffw"), "EDF", "lora")
    with pytest.raises(UserError, match="without a capacity"):
        together.grouped_matmul(sized("MD"), jnp.array([8, 16]), block=8)
    with pytest.raises(UserError, match="choose one to merge"):
        together.dense(jnp.float32)


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_keeps_the_expectation(kind):
    """Over many masks the mean is the value without dropout, and no mask gives it; the base is not dropped."""
    axes, equation = EQUATIONS["up"]
    lora, x = adapted(axes, "DF", kind, dropout=0.25), sized("BTD", 2)
    experts = adapted(("expert", "embed", "ffw"), "EDF", kind, dropout=0.25)
    rows, sizes = sized("MD", 3), jnp.array([8, 16])

    def both(lora, experts):
        return lora.einsum(equation, x), experts.grouped_matmul(rows, sizes, block=8)

    def masked(key):
        return both(*(dataclasses.replace(one, key=key) for one in (lora, experts)))

    drawn = jax.jit(jax.vmap(masked))(jax.random.split(jax.random.key(0), 1000))
    for values, whole in zip(drawn, jax.jit(both)(lora, experts), strict=True):
        error = np.std(values, axis=0) / np.sqrt(len(values))
        assert np.all(np.std(values, axis=0) > 0)
        assert np.max(np.abs(np.mean(values, axis=0) - whole) / error) < 5
    without = dataclasses.replace(lora, lora_b=0 * lora.lora_b, key=jax.random.key(0))
    if kind == "lora":
        assert tiny.bit_equal(without.einsum(equation, x), seam.einsum(equation, x, lora.base))
