"""Grouped matrix products against a loop over experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm.kernels.experts import _on_tpu, block_size, grouped_matmul, owners, rows_needed

COUNTS = {
    "even": [8, 8, 8, 8],
    "uneven": [1, 17, 3, 11],
    "empty": [0, 20, 0, 12],
    "one": [0, 0, 32, 0],
    "last": [0, 0, 0, 32],
}


@pytest.mark.fast
@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped_matmul_equals_a_loop_over_experts(counts, block):
    rng = np.random.default_rng(0)
    sizes = np.array([-(-n // block) * block for n in counts])
    used = int(sizes.sum())
    x = np.zeros((rows_needed(sum(counts), 4, block), 6), np.float32)
    starts = np.cumsum(sizes) - sizes
    for start, n in zip(starts, counts, strict=True):
        x[start : start + n] = rng.standard_normal((n, 6))
    assert used <= len(x)
    w = rng.standard_normal((4, 6, 5)).astype(np.float32)
    dy = rng.standard_normal((len(x), 5)).astype(np.float32)
    dy[used:] = 0  # nobody reads those rows

    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.asarray(sizes), block=block), x, w)
    dx, dw = pull(dy)
    for e, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        rows = slice(start, start + size)
        np.testing.assert_allclose(y[rows], x[rows] @ w[e], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dx[rows], dy[rows] @ w[e].T, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dw[e], x[rows].T @ dy[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.fast
def test_no_distribution_of_rows_overflows_the_bound():
    rng = np.random.default_rng(0)
    for _ in range(300):
        rows, experts, block = rng.integers(1, 70), rng.integers(1, 12), 2 ** rng.integers(0, 6)
        counts = rng.multinomial(rows, rng.dirichlet(np.full(experts, rng.choice([0.1, 1.0, 50.0]))))
        padded = np.sum(-(-counts // block) * block)
        assert padded <= rows_needed(int(rows), int(experts), int(block))
        assert rows_needed(int(rows), int(experts), int(block)) % block == 0


def test_blocks_are_near_a_fair_share():
    assert [block_size(rows, 8) for rows in (4, 64, 100, 800, 100_000)] == [8, 8, 16, 128, 256]


def test_bfloat16_rows_stay_bfloat16():
    x = jnp.ones((16, 4), jnp.bfloat16)
    w = jnp.ones((2, 4, 3), jnp.bfloat16)
    for block in (1, 8):
        y = grouped_matmul(x, w, jnp.array([8, 8]), block=block)
        assert y.dtype == jnp.bfloat16 and tiny.relative(y, np.full((16, 3), 4)) == 0


def test_rows_past_the_last_group_are_nothing_to_the_tpu_kernel():
    """Interpreted; what the kernel leaves unwritten is NaN there. A bias and its gradient see all rows."""
    rng = np.random.default_rng(0)
    x, w, v, b, dy = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((1536, 128), (3, 128, 256), (3, 256, 128), (3, 256), (1536, 128))
    )
    sizes = jnp.array([300, 0, 250])
    dy = dy.at[550:].set(0)  # nobody reads those rows

    def two(product):
        def run(x, w, v, b):
            return product(product(x, w, sizes) + b[owners(sizes, len(x))], v, sizes)

        y, pull = jax.vjp(run, x, w, v, b)
        return y, *pull(dy)

    for found, expected in zip(two(_on_tpu), two(jax.lax.ragged_dot), strict=True):
        assert tiny.relative(found, expected) < 1e-5
