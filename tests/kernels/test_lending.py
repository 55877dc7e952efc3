"""Experts on loan: how even the rows become, and what travels to whom, against plain simulations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxllm.errors import UserError
from jaxllm.kernels import exchange, lending
from jaxllm.kernels.experts import rows_needed

W, E, R, D = 4, 8, 48, 3
AXES = ("expert",)


def load(kind: str, experts: int, rows: int, seed: int = 0) -> np.ndarray:
    """Rows for each expert."""
    if kind == "uniform":
        return np.full(experts, rows // experts)
    rng = np.random.default_rng(seed)
    shares = {
        "one": np.eye(experts)[5],
        "two": np.eye(experts)[1] + np.eye(experts)[4] + 0.2 / experts,
        "two of a device": np.eye(experts)[0] + np.eye(experts)[1] + 0.2 / experts,
        "zipf": 1 / np.arange(1, experts + 1),
        "shuffled zipf": rng.permutation(1 / np.arange(1, experts + 1)),
    }[kind]
    return rng.multinomial(rows, shares / shares.sum())


KINDS = ("uniform", "one", "two", "two of a device", "zipf", "shuffled zipf")


@functools.cache
def assigned(devices: int, slots: int):
    return jax.jit(lambda rows_E: lending.assign(rows_E, devices, slots))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("devices, experts", [(8, 8), (4, 8), (8, 64), (16, 128)])
def test_the_heaviest_device_has_little_more_than_its_share(devices, experts, kind):
    rows_E = load(kind, experts, 4096 * devices)
    held = rows_E.reshape(devices, -1).sum(axis=1)
    loans = assigned(devices, lending.slots(experts, experts // devices))(jnp.asarray(rows_E, jnp.int32))
    rows_W = np.asarray(loans.rows_W())
    assert rows_W.sum() == rows_E.sum() and rows_W.max() <= 1.1 * 4096
    if kind != "uniform":
        assert held.max() > 1.5 * 4096, "without loans one device has that much"
    else:
        assert int(loans.most()) == 0, "what is even already stays where it is"


@pytest.mark.parametrize("experts", [8, 16])
def test_borrowed_ranges_and_own_rows_are_each_row_once(experts):
    for seed in range(20):
        rows_E = np.random.default_rng(seed).multinomial(
            1000, np.random.default_rng(seed).dirichlet(np.full(experts, 0.3))
        )
        loans = jax.tree.map(np.asarray, assigned(8, 2)(jnp.asarray(rows_E, jnp.int32)))
        seen = [np.zeros(n, int) for n in rows_E]
        for expert, own in enumerate(loans.own_E):
            seen[expert][:own] += 1
        for (device, slot), low in np.ndenumerate(loans.low_WS):
            expert, high = loans.expert_WS[device, slot], loans.high_WS[device, slot]
            assert low == high or expert // (experts // 8) != device, "nobody borrows what it has"
            seen[expert][low:high] += 1
        assert all(np.all(x == 1) for x in seen)


def counts(kind: str) -> np.ndarray:
    """Rows of each device for each expert."""
    return np.stack([load(kind, E, R, seed) for seed in range(W)])


def across(f):
    mesh = Mesh(np.array(jax.devices()[:W]), AXES)
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False))


@functools.cache
def planned(kind: str, block: int):
    def f(counts_1E):
        plan, sizes_V, borrowed = lending.plan(counts_1E[0], "expert", block, AXES)
        parts = (plan.first_E, plan.counts_E, plan.there_E, plan.from_N, plan.counts_N, plan.here_N, sizes_V)
        return *(x[None] for x in parts), jax.tree.map(lambda x: x[None], borrowed.loans), borrowed.made[None]

    return jax.tree.map(np.asarray, across(f)(jnp.asarray(counts(kind), jnp.int32)))


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_slices_of_rows_are_what_a_ragged_all_to_all_takes(kind, block):
    """Slice i of device s goes to device i // V, to where `there` says, and is of the expert of that place."""
    first, sent, there, began, came, here, sizes, loans, made = planned(kind, block)
    assert made.all() == (kind != "uniform") and made.any() == made.all()
    L, V = E // W, sizes.shape[1]
    expert_of = np.concatenate([np.arange(E).reshape(W, L), loans.expert_WS[0]], axis=1)
    rows = rows_needed(R * W, V, block)
    ids = np.arange(1, W * R + 1).reshape(W, R)
    experts = np.stack([np.repeat(np.arange(E), n) for n in counts(kind)])
    out, belongs = np.zeros((W, rows), int), np.full((W, rows), -1)
    for s, i in np.ndindex(W, W * V):
        to, mine = slice(there[s, i], there[s, i] + sent[s, i]), slice(first[s, i], first[s, i] + sent[s, i])
        assert not out[i // V, to].any(), "slices do not overlap"
        out[i // V, to], belongs[i // V, to] = ids[s, mine], experts[s, mine]
        receiver, slot = i // V, s * V + i % V
        assert (came[receiver, slot], here[receiver, slot]) == (sent[s, i], there[s, i])
        assert began[receiver, slot] == first[s, i]
    for w in range(W):
        starts = np.cumsum(sizes[w]) - sizes[w]
        for place in range(V):
            here_ = belongs[w, starts[place] : starts[place] + sizes[w, place]]
            assert set(here_[here_ >= 0]) <= {expert_of[w, place]} and sizes[w, place] % block == 0
    assert sorted(out[out > 0]) == list(range(1, W * R + 1)), "nothing is dropped and nothing comes twice"
    assert (out > 0).sum(axis=1).max() <= 1.1 * R


@pytest.mark.parametrize("kind", ["one", "two of a device", "zipf"])
def test_slices_of_weights_are_what_a_ragged_all_to_all_takes(kind):
    """The expert of each slot comes from its owner, and from nobody else."""
    loans = lending.Loans(*(x[0] for x in planned(kind, 1)[-2]))
    S, L = loans.expert_WS.shape[1], E // W
    real = loans.high_WS > loans.low_WS
    owner = np.where(real, loans.expert_WS // L, W)

    def f(x):
        plan = exchange.to_slots("expert", jnp.asarray(owner), jnp.asarray(loans.expert_WS % L))
        parts = (plan.first_E, plan.counts_E, plan.there_E, plan.from_N, plan.counts_N, plan.here_N)
        return tuple(x[None] for x in parts)

    first, sent, there, began, came, here = map(np.asarray, across(f)(jnp.zeros(W)))
    got = np.full((W, S), -1)
    for s, i in np.ndindex(W, W * S):
        if sent[s, i]:
            assert sent[s, i] == 1 and got[i // S, there[s, i]] == -1
            got[i // S, there[s, i]] = s * L + first[s, i]
        receiver, slot = i // S, s * S + i % S
        assert (came[receiver, slot], here[receiver, slot]) == (sent[s, i], there[s, i])
        assert began[receiver, slot] == first[s, i]
    np.testing.assert_array_equal(got, np.where(real, loans.expert_WS, -1))


@pytest.mark.parametrize("kind", ["one", "zipf", "uniform"])
def test_borrowed_weights_are_those_of_their_experts_and_gradients_come_back(kind):
    """Each device weighs its places by their rows; in all, each expert's gradient is the sum of its rows' weights."""
    w_ED = np.random.default_rng(0).standard_normal((E, D)).astype(np.float32)

    def f(counts_1E, w_LD):
        _, sizes_V, borrowed = lending.plan(counts_1E[0], "expert", 1, AXES)
        wide, pull = jax.vjp(lambda w: borrowed.widen(w, jnp.float32), w_LD)
        (back,) = pull(jnp.broadcast_to(sizes_V[:, None].astype(jnp.float32), wide.shape))
        return wide[None], back

    wide, gradient = across(f)(jnp.asarray(counts(kind), jnp.int32), jnp.asarray(w_ED))
    np.testing.assert_array_equal(gradient, np.broadcast_to(counts(kind).sum(axis=0)[:, None], (E, D)))
    loans, L = planned(kind, 1)[-2], E // W
    real = loans.high_WS[0] > loans.low_WS[0]
    assert real.any() == (kind != "uniform")
    np.testing.assert_array_equal(np.asarray(wide)[:, :L].reshape(E, D), w_ED)
    np.testing.assert_array_equal(np.asarray(wide)[:, L:], np.where(real[..., None], w_ED[loans.expert_WS[0]], 0))


def test_nobody_lends_for_a_few_rows():
    """Of 4 devices with 100 rows each but for the first: 12 more are worth a loan, 6 are not, and none where 20 go."""
    for more, worth, lends in ((12, 0, True), (6, 0, False), (12, 20, False)):
        rows_E = jnp.asarray([100 + more, 0, 100, 0, 100, 0, 100 - more, 0], jnp.int32)
        loans = lending.assign(rows_E, 4, 2, worth)
        assert (int(loans.most()) > 0) == lends and int(jnp.max(loans.rows_W())) == (100 if lends else 100 + more)


def test_loans_that_save_less_than_their_journey_are_not_made(monkeypatch):
    assert planned("zipf", 1)[-1].all()
    monkeypatch.setattr(lending, "WORTH", {"cpu": R})
    planned.cache_clear()
    *_, sizes, loans, made = planned("zipf", 1)
    planned.cache_clear()
    assert not made.any() and not (loans.high_WS > loans.low_WS).any()
    np.testing.assert_array_equal(sizes[:, : E // W].reshape(-1), counts("zipf").sum(axis=0))


def test_a_weight_that_cannot_be_lent_is_refused():
    class Odd:
        pass

    class Turned:
        def axes(self, axes):
            return jax.tree.map(lambda _: axes[::-1], {"a": 0})

    loans = lending.no_loans(jnp.zeros(E, jnp.int32), W, 2)
    borrowed = lending.Borrowed("expert", jnp.array(False), loans)
    for weight, said in ((Odd(), "Odd cannot be lent"), (Turned(), "Turned has an array that is not")):
        with pytest.raises(UserError, match=f"{said}.*kernels.experts=wait"):
            borrowed.widen(weight, jnp.float32)
