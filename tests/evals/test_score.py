"""Scores of continuations against a plain forward pass, and where a text is cut into context and continuation."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import tiny

from jaxllm.errors import DataError, SettingsError, UserError
from jaxllm.evals import score
from jaxllm.evals.score import Pair, encode_pair, loglikelihoods
from jaxllm.sharding import make_sharding

#: (context, continuation) in tokens: ragged, either one the longer, and one that just fits 48.
SIZES = [(3, 1), (1, 20), (20, 3), (46, 3), (1, 48), (7, 9), (16, 1)]


def pairs_of(seed=0):
    rng = np.random.default_rng(seed)
    return [Pair(rng.integers(0, 300, c).tolist(), rng.integers(0, 300, k).tolist()) for c, k in SIZES]


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_scores_are_those_of_a_plain_pass(loaded, batch):
    pairs = pairs_of()
    seen = []
    scores = loglikelihoods(
        loaded.model, loaded.params, pairs, batch=batch, progress=lambda done, of: seen.append((done, of))
    )
    assert [s.logprob for s in scores] == pytest.approx([loaded.by_hand(*pair)[0] for pair in pairs], rel=1e-5)
    assert [s.tokens for s in scores] == [k for _, k in SIZES] and not any(s.greedy for s in scores)
    assert seen[-1] == (7, 7) and len(seen) == math.ceil(7 / batch)


def test_neighbours_and_padding_change_nothing(loaded):
    pair, *others = pairs_of()
    alone = loglikelihoods(loaded.model, loaded.params, [pair])[0].logprob
    for beside in ([others[0]], [others[3]], others):
        among = loglikelihoods(loaded.model, loaded.params, [*beside, pair], batch=8)[-1].logprob
        assert among == pytest.approx(alone, rel=1e-5)


def test_greedy_says_what_decoding_would_say(loaded):
    context = pairs_of()[0].context
    said = list(context)
    for _ in range(5):
        row = np.array([said + [0] * (48 - len(said))], np.int32)
        said.append(int(np.asarray(loaded.forward(loaded.params, row))[0, len(said) - 1].argmax()))
    said = said[len(context) :]
    wrong = [*said[:4], (said[4] + 1) % 300]
    found = loglikelihoods(loaded.model, loaded.params, [Pair(context, said), Pair(context, wrong)])
    assert [s.greedy for s in found] == [True, False]
    assert [s.greedy for s in found] == [loaded.by_hand(context, ids)[1] for ids in (said, wrong)]


def test_a_uniform_model_gives_log_1_over_v_a_token(uniform):
    for found in loglikelihoods(uniform.model, uniform.params, pairs_of()):
        assert found.logprob == pytest.approx(-found.tokens * math.log(310), rel=1e-6), "no mass on padded ids"


def test_positions_that_go_by_length_see_the_row_without_padding(tokenizer):
    rope = {"scaling": "dynamic_ntk", "original_context": 8, "factor": 4.0}
    model = tiny.one_device(tiny.config({"rope": rope}, vocab=300, context=48))
    params = tiny.weights(model)
    context, continuation = pairs_of()[2]
    ids = np.array([[*context, *continuation]], np.int32)
    logprobs = np.asarray(jax.nn.log_softmax(model.logits(params, ids[:, :-1])))[0, len(context) - 1 :]
    wanted = logprobs[np.arange(3), continuation].sum()
    assert loglikelihoods(model, params, [Pair(context, continuation)])[0].logprob == pytest.approx(wanted, rel=1e-5)


def test_eight_devices_and_small_chunks_of_logits_give_the_same(loaded, monkeypatch):
    pairs = pairs_of()
    one = [s.logprob for s in loglikelihoods(loaded.model, loaded.params, pairs)]
    model = score.build(loaded.model.config, make_sharding())
    params = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), loaded.params, model.abstract)
    assert len(jax.devices()) == 8
    assert [s.logprob for s in loglikelihoods(model, params, pairs)] == pytest.approx(one, rel=1e-5)
    monkeypatch.setattr(score, "CHUNK_LOGITS", 4 * 320 * 8)  # four places of eight rows, of 64
    score._compiled.cache_clear()
    assert [s.logprob for s in loglikelihoods(loaded.model, loaded.params, pairs)] == pytest.approx(one, rel=1e-5)
    score._compiled.cache_clear()


def test_what_cannot_be_scored_is_refused(loaded):
    def refused(words, pair, **options):
        with pytest.raises(SettingsError, match=words):
            loglikelihoods(loaded.model, loaded.params, [Pair([1], [2]), pair], **options)

    refused(r"pair 1: 40 tokens of context and 10 to score .* context of 48", Pair([1] * 40, [2] * 10))
    refused("pair 1: context and continuation need a token each", Pair([1], []))
    refused("pair 1: token id 310 at .* outside the vocabulary of 310", Pair([1], [310]))
    refused("batch=0", Pair([1], [2]), batch=0)
    with pytest.raises(UserError, match="not finite"):
        broken = jax.tree.map(lambda x: np.full_like(x, np.nan), loaded.params)
        loglikelihoods(loaded.model, broken, [Pair([1], [2])])
    assert loglikelihoods(loaded.model, loaded.params, []) == []


def test_the_cut_is_where_the_context_alone_would_end(tokenizer):
    bos = [tokenizer.bos]
    context, continuation = encode_pair(tokenizer, "the quick", " brown fox")
    assert context == bos + tokenizer.encode("the quick").tolist()
    assert tokenizer.decode(continuation, continued=True) == " brown fox"
    assert encode_pair(tokenizer, "the quick ", "brown fox") == (context, continuation), "its space belongs to the word"
    assert encode_pair(tokenizer, "", "the quick") == (bos, tokenizer.encode("the quick").tolist())
    assert encode_pair(tokenizer, " \n", "dog") == (bos, tokenizer.encode(" \ndog").tolist())


def test_a_word_that_is_one_token_with_its_prompt_is_scored(tokenizer):
    whole = tokenizer.encode("the").tolist()
    assert len(whole) == 1, "the premise"
    assert encode_pair(tokenizer, "t", "he") == ([tokenizer.bos], whole)


def test_a_text_needs_something_before_it(tokenizer):
    no_bos = dataclasses.make_dataclass("NoBos", ["before", "eos"])
    assert score.prefix(no_bos((), 7)) == [7] and score.prefix(no_bos((3, 4), 7)) == [3, 4]
    with pytest.raises(DataError, match="neither a begin-of-text nor an end-of-text id"):
        score.prefix(no_bos((), None))
    with pytest.raises(DataError, match="without text"):
        encode_pair(tokenizer, "the", "")
