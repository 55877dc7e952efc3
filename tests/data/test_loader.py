import itertools

import jax
import numpy as np
import pytest

from jaxllm.data.loader import Loader
from jaxllm.data.mixture import mix
from jaxllm.data.pack import Rows
from jaxllm.errors import SettingsError

BATCH = 8


@pytest.fixture
def stream(make_store):
    stores = {name: make_store([f"{name} {i} " * 9 for i in range(40)], name) for name in "ab"}
    return mix(stores, {"a": 2, "b": 1}, 24, seed=1)


def read(stream, steps, **options):
    """`steps` global batches of tokens, put together from all processes."""
    processes = options.pop("processes", 1)
    loaders = [Loader(stream, BATCH, process=p, processes=processes, **options) for p in range(processes)]
    shares = [[b.tokens_BT for b in itertools.islice(loader, steps)] for loader in loaders]
    for loader in loaders:
        loader.close()
    return np.concatenate([np.concatenate(parts) for parts in zip(*shares, strict=True)])


def rows(stream, start, stop):
    return np.stack([stream.row(r).tokens for r in range(start, stop)])


@pytest.mark.fast
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_global_stream_does_not_depend_on_processes_or_prefetch(stream, processes, prefetch):
    got = read(stream, 6, processes=processes, prefetch=prefetch)
    np.testing.assert_array_equal(got, rows(stream, 0, 6 * BATCH))


@pytest.mark.parametrize("prefetch", [0, 3])
def test_resume_goes_on_at_the_exact_row(stream, prefetch):
    loader = Loader(stream, BATCH, start=5, prefetch=prefetch)
    for _ in range(3):
        next(loader)
    assert loader.position == 5 + 3 * BATCH  # consumed, whatever was made ahead
    rest = next(loader).tokens_BT
    np.testing.assert_array_equal(read(stream, 1, start=5 + 3 * BATCH), rest)
    np.testing.assert_array_equal(rest, rows(stream, 29, 37))
    # another batch size goes on at the same row too
    smaller = next(Loader(stream, 4, start=loader.position))
    np.testing.assert_array_equal(smaller.tokens_BT, rows(stream, 37, 41))


@pytest.mark.parametrize("processes", [1, 2])
def test_one_pass_pads_the_last_batch(make_store, processes):
    stream = Rows(make_store([f"text {i} " * 5 for i in range(11)]), 24, shuffle=False)
    assert stream.per_epoch % BATCH
    targets = 0
    for p in range(processes):
        loader = Loader(stream, BATCH, stop=stream.per_epoch, process=p, processes=processes)
        batches = list(loader)
        assert {b.tokens_BT.shape for b in batches} == {(BATCH // processes, 24)}
        targets += sum(b.mask_BT.sum() for b in batches)
    assert targets == stream.store.tokens - stream.store.documents


def test_batch_is_a_pytree_of_five(stream):
    batch = next(Loader(stream, BATCH))
    leaves = jax.tree.leaves(batch)
    assert [x.dtype.name for x in leaves] == ["int32", "int32", "float32", "int32", "int32"]
    assert {x.shape for x in leaves} == {(BATCH, 24)}


def test_batch_that_does_not_divide(stream):
    with pytest.raises(SettingsError, match=r"10 rows does not divide among 4 processes; try \[8, 12\]"):
        Loader(stream, 10, processes=4)


def test_an_error_in_a_row_reaches_the_caller(stream):
    class Broken:
        length = 24

        def row(self, r):
            raise SettingsError("row is broken")

    with pytest.raises(SettingsError, match="row is broken"):
        next(Loader(Broken(), BATCH, prefetch=2))
