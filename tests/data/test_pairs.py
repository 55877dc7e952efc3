"""Pairs of a chosen and a rejected answer: forms, how they stand in a row, and what is wrong with a line."""

import json

import numpy as np
import pytest

from jaxllm.data.config import DataConfig
from jaxllm.data.conversation import pair
from jaxllm.data.pack import Rows
from jaxllm.data.prepare import prepare
from jaxllm.errors import DataError

LINES = [
    {"prompt": "two and two?", "chosen": "four", "rejected": "five"},
    {"prompt": "a", "chosen": "a long answer of several words", "rejected": "no"},
    {
        "chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
        "rejected": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "go away"}],
    },
]


@pytest.fixture
def store(tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    sources = [{"name": "pairs", "path": str(path), "format": "pairs"}]
    config = DataConfig(sources=sources, cache=str(tmp_path / "cache"), tokenizer=str(tmp_path))
    return prepare(config, tokenizer, say=lambda line: None)["pairs"]


def test_a_pair_is_two_segments_that_follow_each_other(store, tokenizer):
    """Each begins at position 0, has the prompt masked, and predicts nothing of the other."""
    assert store.pairs and store.documents == 3
    rows = Rows(store, 160, seed=1)
    seen = set()
    for r in range(rows.per_epoch):
        row = rows.row(r)
        assert row.segments.max() % 2 == 0
        for segment in range(1, row.segments.max() + 1):
            here = row.segments == segment
            assert (row.positions[here] == np.arange(here.sum())).all()
            learnt = tokenizer.decode(row.targets[here & (row.mask > 0)])
            seen.add((tokenizer.decode(row.tokens[here]).strip(), learnt.strip(), segment % 2))
    answers = {(learnt, odd) for _, learnt, odd in seen}
    wanted = {("four", 1), ("five", 0), ("a long answer of several words", 1), ("no", 0), ("hello", 1), ("go away", 0)}
    assert answers == wanted
    assert all("four" not in text for text, learnt, _ in seen if learnt == "five"), "rejected sees nothing of chosen"


def test_values_beside_tokens_come_with_their_targets(store):
    """`places` says where the reference of each target lies, whatever the order of an epoch."""
    rows, plain = Rows(store, 160, seed=1), Rows(store, 160, shuffle=False)
    rows.reference = np.arange(store.tokens, dtype=np.float32)
    ids = np.concatenate([store.doc(i) for i in range(store.documents)])
    for r in range(2 * rows.per_epoch):
        row = rows.row(r)
        assert (ids[row.reference.astype(int)] == row.targets)[row.mask > 0].all()
    for r in range(plain.per_epoch):
        row, places = plain.row(r), plain.places(r)
        assert (ids[places] == row.targets)[places >= 0].all() and (places >= 0).sum() == np.count_nonzero(row.segments)


def test_a_pair_that_is_too_long_is_left_out_whole(store):
    rows = Rows(store, int(store.lengths.max()) - 2, truncate="right")
    assert rows.kept.over == 1 and len(rows.kept.documents) == 2 and "left out" in rows.news


@pytest.mark.parametrize(
    "record, message",
    [
        ({"prompt": "a", "chosen": "b"}, "rejected is missing .keys: prompt, chosen."),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": [1]}, "expected two strings"),
        ([], "expected prompt, chosen and rejected, .* in an object, found a list"),
        ({"chosen": "b", "rejected": "c"}, "chosen holds a str, expected a list of messages"),
    ],
)
def test_what_is_no_pair(record, message):
    with pytest.raises(DataError, match=message):
        pair(record)
