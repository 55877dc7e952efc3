"""Beam search against exhaustive search over the plain forward pass, and against greedy decoding."""

import itertools

import jax
import numpy as np
import pytest
import tiny

from jaxllm.errors import SettingsError
from jaxllm.generate import beam
from jaxllm.generate.beam import beam_search
from jaxllm.generate.tokens import generate

VOCAB, LENGTH = 5, 4
PROMPTS = [[1, 2, 3], [4], [0, 0, 2, 1, 3]]


@pytest.fixture(scope="module")
def small():
    """`(model, params)` of five tokens, with a window so that the cache of a layer is written over."""
    model = tiny.one_device(tiny.config({"window": 3}, layers=2, vocab=VOCAB, vocab_multiple=4, context=32))
    params = tiny.weights(model, seed=3)
    return model, {**params, "head": params["head"] * 6}


@pytest.fixture(scope="module")
def score(small):
    """`score(prompt, max_tokens, stops, banned)`: `{ids: sum of log-probabilities}` of every possible continuation."""
    model, params = small
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(model.logits(params, tokens)))

    def every(prompt, stops=(), banned=(), least=0):
        texts = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)), np.int32)
        tokens = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], axis=1)
        logprobs = np.asarray(forward(np.pad(tokens, [(0, 0), (0, 9 - tokens.shape[1])])))
        found = {}
        for row, text in enumerate(texts.tolist()):
            length = next((i + 1 for i, token in enumerate(text) if token in stops), LENGTH)
            if not set(text[:length]) & set(banned) and (length > least or text[length - 1] not in stops):
                at = np.arange(length) + len(prompt) - 1
                found[tuple(text[:length])] = float(logprobs[row, at, text[:length]].sum())
        return found

    return every


def ranked(found, penalty):
    return sorted(((total / len(ids) ** penalty, list(ids)) for ids, total in found.items()), reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5, -1.0])
@pytest.mark.parametrize("stops, banned, least", [((), (), 0), ((2,), (), 0), ((0, 3), (4,), 0), ((2,), (), 2)])
def test_a_beam_that_is_wide_enough_finds_what_exhaustive_search_finds(small, score, penalty, stops, banned, least):
    options = dict(stop_ids=stops, banned_ids=banned, min_tokens=least, length_penalty=penalty)
    rows = beam_search(*small, PROMPTS, max_tokens=LENGTH, beams=VOCAB**LENGTH, n=8, **options)
    for p, prompt in enumerate(PROMPTS):
        every = score(prompt, stops, banned, least)
        for row, (best, ids) in zip(rows[8 * p : 8 * p + 8], ranked(every, penalty), strict=False):
            assert row.ids == ids and row.finish == ("stop" if ids[-1] in stops else "length")
            assert abs(sum(row.logprobs) / len(ids) ** penalty - best) < 1e-4


def test_length_penalty_changes_which_is_best(small, score):
    best = {penalty: ranked(score(PROMPTS[0], (2,)), penalty)[0][1] for penalty in (-2.0, 4.0)}
    assert len(best[-2.0]) < len(best[4.0]), "the cases above tell penalties apart"


@pytest.mark.slow
def test_one_beam_is_greedy_and_more_are_never_worse(small):
    greedy = generate(*small, PROMPTS, max_tokens=12, temperature=0)
    one = beam_search(*small, PROMPTS, max_tokens=12, beams=1)
    assert [row.ids for row in one] == [row.ids for row in greedy]
    np.testing.assert_allclose(one[0].logprobs, greedy[0].logprobs, atol=1e-4)
    wide = beam_search(*small, PROMPTS, max_tokens=12, beams=4)
    assert all(sum(a.logprobs) >= sum(b.logprobs) - 1e-4 for a, b in zip(wide, greedy, strict=True))
    assert any(a.ids != b.ids for a, b in zip(wide, greedy, strict=True))


def test_a_prompt_does_not_depend_on_the_others_and_lengths_are_its_own(small):
    options = dict(beams=3, n=2, stop_ids=[[2], [], [1, 3]])
    together = beam_search(*small, PROMPTS, max_tokens=[12, 3, 8], **options)
    for p, most in enumerate([12, 3, 8]):
        alone = beam_search(*small, [PROMPTS[p]], max_tokens=most, **options | {"stop_ids": options["stop_ids"][p]})
        assert [row.ids for row in alone] == [row.ids for row in together[2 * p : 2 * p + 2]]
    assert len(together[2].ids) == len(together[3].ids) == 3


def test_new_numbers_compile_nothing(small):
    model, _ = small
    search = beam._compiled(model.config, model.sharding, model.kernels)
    beam_search(*small, PROMPTS, max_tokens=10, beams=2)
    before = search._cache_size()
    numbers = dict(n=2, length_penalty=0.3, stop_ids=[1], min_tokens=1)
    beam_search(*small, PROMPTS[::-1], max_tokens=[9, 3, 2], beams=2, **numbers)
    assert search._cache_size() == before


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(beams=2, n=3), "beams=2, n=3"),
        (dict(beams=0), "beams=0"),
        (dict(beams=2, length_penalty=float("nan")), "length_penalty=nan"),
        (dict(beams=30, n=30, max_tokens=1), "has only 5 continuations within max_tokens; set n=5 or less"),
        (dict(beams=2, max_tokens=40), "context of 32"),
        (dict(beams=2, temperature=0.5, stop="x"), "would ignore temperature, stop"),
    ],
)
def test_bad_input_is_refused(small, options, message):
    with pytest.raises(SettingsError, match=message):
        beam_search(*small, PROMPTS[:1], **{"max_tokens": 4} | options)
