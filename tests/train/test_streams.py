"""The stages of a run as one way through the text."""

from collections import Counter

import pytest
import small

from jaxllm.data.prepare import prepare
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.train.load import load_run
from jaxllm.train.streams import make_streams, renewed

pytestmark = pytest.mark.fast


@pytest.fixture
def make(corpus):
    """`make(*stages)`: the streams of stages with these settings, in rows of 32 unless they say otherwise."""

    def make(*stages):
        stages = [{"name": str(n), **stage} for n, stage in enumerate(stages)]
        config, _ = load_run(small.settings(corpus, "run", train={"stages": stages, "seq_len": 32, "batch": 8}))
        stores = prepare(config.data, Tokenizer.load(corpus / "tokenizer"), say=lambda _: None)
        return make_streams(config.data, config.train.resolved_stages, stores)

    return make


def test_stages_that_make_up_an_epoch_read_every_token_once(make):
    (whole,) = make({"steps": 1, "weights": {"prose": 1}})
    rows = whole.sources[0].per_epoch
    first, rest = rows // 16, rows // 8 + 1 - rows // 16
    a, b = make({"steps": first, "weights": {"prose": 1}}, {"steps": rest, "weights": {"prose": 1}})
    read = [a.row(r) for r in range(first * 8)] + [b.row(r) for r in range(rows - first * 8)]
    assert Counter(row.tokens.tobytes() for row in read) == Counter(whole.row(r).tokens.tobytes() for r in range(rows))


def test_a_source_waits_for_the_stage_that_reads_it(make):
    streams = make({"steps": 3, "weights": {"prose": 1}}, {"steps": 2}, {"steps": 1, "weights": {"code": 2.0}})
    assert streams[1].starts == [0, 24] and streams[1].names == ("code", "prose")
    assert streams[2].starts == [streams[1].reached(16)["code"][1]] != [0]
    assert renewed(streams, 2) == renewed(streams, 0) == []


def test_rows_of_another_length_begin_an_epoch_and_it_is_said(make):
    streams = make({"steps": 3, "weights": {"prose": 1}}, {"steps": 2, "seq_len": 64})
    assert streams[1].starts == [0, streams[1].sources[1].per_epoch]
    assert renewed(streams, 1) == ["prose"]
