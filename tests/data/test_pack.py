from collections import Counter

import numpy as np
import pytest

from jaxllm.data.pack import Rows, padding_row
from jaxllm.errors import DataError, SettingsError

TEXTS = [chr(97 + i % 26) * (i * 7 % 40) + f" document {i}" for i in range(60)] + ["long " * 300]


@pytest.fixture
def store(make_store):
    return make_store(TEXTS)


def pairs_of(row):
    keep = row.mask > 0
    return list(zip(row.tokens[keep].tolist(), row.targets[keep].tolist(), strict=True))


@pytest.mark.fast
@pytest.mark.parametrize("length", [1, 7, 64, 5000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_target_is_predicted_once_an_epoch(store, length, shuffle):
    rows = Rows(store, length, seed=3, shuffle=shuffle)
    wanted = Counter()
    for i in range(store.documents):
        wanted.update(zip(store.doc(i)[:-1].tolist(), store.doc(i)[1:].tolist(), strict=True))
    for epoch in (0, 2):
        got = Counter()
        for r in range(epoch * rows.per_epoch, (epoch + 1) * rows.per_epoch):
            got.update(pairs_of(rows.row(r)))
        assert got == wanted
    assert sum(wanted.values()) == store.tokens - store.documents


def test_segments_are_runs_of_one_document(store):
    """Each segment is a contiguous piece of exactly one document, its targets the next tokens of that document."""
    rows = Rows(store, 50, seed=1)
    docs = [store.doc(i).tolist() for i in range(store.documents)]
    seen = Counter()
    for r in range(rows.per_epoch):
        row = rows.row(r)
        assert (np.diff(row.segments[row.mask > 0]) >= 0).all()
        for segment in range(1, row.segments.max() + 1):
            here = row.segments == segment
            piece = [*row.tokens[here].tolist(), int(row.targets[here][-1])]
            assert row.targets[here].tolist() == piece[1:]
            np.testing.assert_array_equal(row.positions[here], np.arange(here.sum()))
            found = [(i, s) for i, d in enumerate(docs) for s in range(len(d)) if d[s : s + len(piece)] == piece]
            assert found
            if len(found) == 1:
                seen[found[0]] += 1
    assert max(seen.values()) == 1


def test_padding_is_masked_and_only_in_one_row(store):
    rows = Rows(store, 64, seed=1)
    padded = [row for r in range(rows.per_epoch) if (row := rows.row(r)).mask.min() == 0]
    assert len(padded) == 1
    row = padded[0]
    for array in row[:5]:
        assert not array[row.mask == 0].any()
    assert row.reference is None
    assert (row.segments[row.mask > 0] > 0).all()
    assert rows.padding == pytest.approx((row.mask == 0).sum() / (64 * rows.per_epoch))


def test_rows_are_a_pure_function_of_seed_and_number(store):
    """Any order of access gives the same rows; another seed or epoch gives another order of the same text."""
    rows, again = Rows(store, 32, seed=5), Rows(store, 32, seed=5)
    numbers = np.random.default_rng(0).permutation(3 * rows.per_epoch)
    drawn = {int(r): rows.row(int(r)) for r in numbers}
    for r in range(3 * rows.per_epoch):
        for a, b in zip(drawn[r], again.row(r), strict=True):
            np.testing.assert_array_equal(a, b)
    first, second = rows.row(0).tokens, rows.row(rows.per_epoch).tokens
    assert (first != second).any() and (first != Rows(store, 32, seed=6).row(0).tokens).any()
    assert rows.fingerprint == again.fingerprint != Rows(store, 32, seed=6).fingerprint


def test_pieces_of_a_long_document_are_apart(store):
    rows = Rows(store, 16, seed=0)
    long = store.doc(store.documents - 1)[5:8].tolist()
    at = [r for r in range(rows.per_epoch) if long[0] in rows.row(r).tokens and rows.row(r).segments.max() == 1]
    assert np.abs(np.diff(at)).max() > 1


def test_unshuffled_rows_follow_the_files(store):
    rows = Rows(store, 64, shuffle=False)
    line = [t for r in range(rows.per_epoch) for t in rows.row(r).targets[rows.row(r).mask > 0].tolist()]
    assert line == [t for i in range(store.documents) for t in store.doc(i)[1:].tolist()]


@pytest.mark.parametrize("length", [20, 4000])
def test_not_packed_one_row_is_one_document(store, length):
    rows = Rows(store, length, seed=2, pack=False)
    assert rows.per_epoch == store.documents
    got = sorted(rows.row(r).tokens[rows.row(r).mask > 0].tolist() for r in range(rows.per_epoch))
    assert got == sorted(store.doc(i)[:-1][:length].tolist() for i in range(store.documents))
    over = [max(0, len(store.doc(i)) - 1 - length) for i in range(store.documents)]
    assert rows.cut == (sum(x > 0 for x in over), sum(over)) and (rows.cut[0] > 0) == (length == 20)
    kept = sum(rows.row(r).mask.sum() for r in range(rows.per_epoch))
    assert rows.padding == pytest.approx(1 - kept / (length * rows.per_epoch))


def test_bad_length_and_empty_selection(store):
    with pytest.raises(SettingsError, match="length 0"):
        Rows(store, 0)
    with pytest.raises(DataError, match="no documents"):
        Rows(store.select(np.zeros(0, int)), 8)
    assert not padding_row(8).mask.any()
