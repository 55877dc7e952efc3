"""The ragged exchange of rows: what each slice says, against a plain simulation of the collective; there and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxllm.kernels import exchange
from jaxllm.kernels.experts import rows_needed

W, E, R, D = 4, 8, 12, 3


def counts(seed: int) -> np.ndarray:
    """Rows of each device for each expert; seed 0 sends all of them to one."""
    rng = np.random.default_rng(seed)
    if seed == 0:
        return np.eye(E, dtype=int)[[5] * W] * R
    return np.stack([np.bincount(rng.integers(0, E, R), minlength=E) for _ in range(W)])


def across(f):
    mesh = Mesh(np.array(jax.devices()[:W]), ("expert",))
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False))


@functools.cache
def planned(seed: int, block: int):
    def f(counts_1E):
        plan, sizes_L = exchange.plan(counts_1E[0], "expert", block)
        parts = plan.first_E, plan.counts_E, plan.there_E, plan.from_N, plan.counts_N, plan.here_N, sizes_L
        return tuple(x[None] for x in parts)

    return [np.asarray(x) for x in across(f)(jnp.asarray(counts(seed)))]


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_slices_are_what_a_ragged_all_to_all_takes(seed, block):
    """The collective as jax documents it: slice i of device s goes to device i // L, to where `there` says."""
    first, sent, there, began, came, here, sizes = planned(seed, block)
    L, rows = E // W, rows_needed(R * W, E // W, block)
    x = np.arange(1, W * R + 1).reshape(W, R)
    out = np.zeros((W, rows), int)
    for s, i in np.ndindex(W, E):
        out[i // L, there[s, i] : there[s, i] + sent[s, i]] = x[s, first[s, i] : first[s, i] + sent[s, i]]
        receiver, slot = i // L, s * L + i % L
        assert (came[receiver, slot], here[receiver, slot]) == (sent[s, i], there[s, i])
        assert began[receiver, slot] == first[s, i]
    for w in range(W):
        starts, total = np.cumsum(sizes[w]) - sizes[w], counts(seed)[:, w * L : (w + 1) * L].sum(axis=0)
        for expert in range(L):
            mine = out[w, starts[expert] : starts[expert] + sizes[w, expert]]
            assert (mine > 0).sum() == total[expert] and sizes[w, expert] % block == 0
    assert sorted(out[out > 0]) == list(range(1, W * R + 1)), "nothing is dropped and nothing comes twice"


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_come_back_to_where_they_were(seed):
    rows = rows_needed(R * W, E // W, 4)
    x = jnp.asarray(np.random.default_rng(seed).standard_normal((W, R, D)), jnp.float32)

    def f(counts_1E, x_1RD):
        def there_and_back(x_RD):
            plan, _ = exchange.plan(counts_1E[0], "expert", 4)
            return plan.back(2 * plan.out(x_RD, rows), R)

        out, pull = jax.vjp(there_and_back, x_1RD[0])
        return out[None], pull(out)[0][None]

    out, gradient = across(f)(jnp.asarray(counts(seed)), x)
    np.testing.assert_array_equal(out, 2 * x)
    np.testing.assert_array_equal(gradient, 4 * x)
