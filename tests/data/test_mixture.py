import numpy as np
import pytest

from jaxllm.data.mixture import BLOCK, mix
from jaxllm.data.pack import Rows
from jaxllm.errors import SettingsError


@pytest.fixture
def stores(make_store):
    return {
        name: make_store([f"{name} {i} " * 9 for i in range(n)], name) for name, n in (("a", 30), ("b", 7), ("c", 3))
    }


WEIGHTS = {"a": 0.7, "b": 0.25, "c": 0.05}


@pytest.mark.fast
def test_every_prefix_is_close_to_the_weights(stores):
    mixture = mix(stores, WEIGHTS, 16, seed=4)
    sources = np.array([mixture.locate(r)[0] for r in range(5 * BLOCK)])
    for source, weight in enumerate(WEIGHTS.values()):
        off = np.cumsum(sources == source) - weight * np.arange(1, len(sources) + 1)
        assert np.abs(off).max() < 50
        assert np.abs(off[BLOCK - 1 :: BLOCK]).max() < 5  # a block is exact, but for rounding to a row
    first, second = sources[:BLOCK], sources[BLOCK : 2 * BLOCK]
    assert (first != second).any()


def test_each_source_goes_through_its_rows_in_order(stores):
    mixture = mix(stores, WEIGHTS, 16, seed=4)
    for source in range(3):
        found = [k for r in range(3 * BLOCK) for s, k in [mixture.locate(r)] if s == source]
        assert found == list(range(len(found)))
    far = 10**9 + 17  # random access costs the same far out
    s, k = mixture.locate(far)
    assert abs(k - far * list(WEIGHTS.values())[s]) < far / BLOCK
    np.testing.assert_array_equal(mixture.row(far).tokens, mixture.sources[s].row(k).tokens)


def test_weights_are_relative_and_zero_leaves_out(stores):
    assert mix(stores, {"a": 70, "b": 25, "c": 5}, 16).counts.tolist() == mix(stores, WEIGHTS, 16).counts.tolist()
    only = mix(stores, {"a": 0, "b": 2}, 16)
    assert only.names == ("b",) and {only.locate(r)[0] for r in range(100)} == {0}


def test_the_next_stage_goes_on_in_each_source(stores):
    """Two stages of other weights read every row of a source once before the first one comes again."""
    first = mix(stores, {"a": 0.8, "b": 0.2}, 16, seed=4)
    read = BLOCK + 100
    second = mix(stores, {"a": 0.1, "c": 0.9}, 16, seed=4, reached=first.reached(read))
    for stream, rows in ((first, read), (second, 3 * BLOCK)):
        found = {name: [] for name in "abc"}
        for s, k in map(stream.locate, range(rows)):
            found[stream.names[s]].append(k)
        for name, (_, end) in stream.reached(rows).items():
            start = first.reached(read)[name][1] if stream is second and name == "a" else 0
            assert found[name] == list(range(start, end)), name
    assert first.reached(read)["a"][1] == sum(first.locate(r)[0] == 0 for r in range(read)) > 0
    assert second.fingerprint != mix(stores, {"a": 0.1, "c": 0.9}, 16, seed=4).fingerprint


def test_another_length_goes_on_with_the_next_epoch(stores):
    rows, longer = (Rows(stores["a"], length, seed=4) for length in (16, 64))
    n = rows.per_epoch
    assert [longer.go_on(rows, r) for r in (0, 1, n, n + 1)] == [
        0,
        longer.per_epoch,
        longer.per_epoch,
        2 * longer.per_epoch,
    ]
    documents = [Rows(stores["a"], length, seed=4, pack=False) for length in (16, 64)]
    assert documents[1].go_on(documents[0], 7) == 7, "not packed, row r is the same document at any length"


def test_fingerprint_sees_all_that_rows_depend_on(stores):
    base = mix(stores, WEIGHTS, 16).fingerprint
    assert base == mix(stores, WEIGHTS, 16).fingerprint
    others = [
        mix(stores, {**WEIGHTS, "a": 0.5}, 16),
        mix(stores, WEIGHTS, 17),
        mix(stores, WEIGHTS, 16, seed=1),
        mix(stores, WEIGHTS, 16, pack=False),
        mix(stores, WEIGHTS, 16, shuffle=False),
        mix({**stores, "a": stores["b"]}, WEIGHTS, 16),
    ]
    assert len({base, *(m.fingerprint for m in others)}) == 7


def test_bad_weights(stores):
    with pytest.raises(SettingsError, match="weights.d: no such source; known: a, b, c"):
        mix(stores, {"d": 1}, 16)
    with pytest.raises(SettingsError, match="at least one"):
        mix(stores, {"a": 0}, 16)
    with pytest.raises(SettingsError, match="weight 1e-06 of the source b"):
        mix(stores, {"a": 1, "b": 1e-6}, 16)
