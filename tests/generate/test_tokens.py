"""What a call may ask for: lengths, stops, several samples, log-probabilities, penalties; all of it row by row."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from jaxllm.errors import SettingsError
from jaxllm.generate import decode
from jaxllm.generate.decode import unstack
from jaxllm.generate.tokens import generate, stream
from jaxllm.objectives.lm import lm

PROMPTS = [[7], [3, 9, 11, 2, 30, 8, 1, 4, 19], [5, 6, 38]]
EVERYTHING = dict(
    temperature=[0, 1.3, 1.0],
    top_k=[0, 20, 0],
    top_p=[1, 1, 0.9],
    min_p=[0, 0.01, 0],
    typical_p=[1, 1, 0.8],
    repetition_penalty=[1.3, 1, 1.1],
    frequency_penalty=[0, 0.4, -0.2],
    presence_penalty=[0.5, 0, 0.1],
    logit_bias=[{3: 2.0}, {}, {4: -1.0, 9: 1.0}],
    seed=[1, 2, 3],
    min_tokens=[0, 2, 4],
    stop_ids=[[1, 2, 3, 4], list(range(0, 40, 3)), list(range(1, 40, 2))],
)


def alone(options, row, **more):
    return {name: values[row : row + 1] for name, values in options.items()} | more


@pytest.mark.parametrize("made", ["dense", "mixed", "latent"], indirect=True)
def test_trainer_and_sampler_agree(made):
    """Log-probabilities of sampled tokens, recomputed by the training pass on packed rows: within 1e-4 in float32."""
    lengths = [10, 20, 8]
    rows = generate(*made, PROMPTS, max_tokens=lengths, **EVERYTHING | {"stop_ids": ()})
    tokens, segments, logprobs = (np.zeros((2, 33), dtype) for dtype in (np.int32, np.int32, np.float32))
    for segment, (place, start) in enumerate([(0, 0), (1, 0), (0, 11)], 1):
        prompt, made_here = PROMPTS[segment - 1], rows[segment - 1]
        here = np.s_[place, start : start + len(prompt) + len(made_here.ids)]
        tokens[here], segments[here] = prompt + made_here.ids, segment
        logprobs[here][len(prompt) :] = made_here.logprobs
    batch = tiny.packed(tokens[:, :-1], segments[:, :-1])
    batch = dataclasses.replace(batch, targets_BT=tokens[:, 1:], mask_BT=(logprobs[:, 1:] < 0).astype(np.float32))
    where = tiny.where(batch)
    again = jax.nn.log_softmax(jax.jit(lambda p: made.model.logits(p, batch.tokens_BT, **where))(made.params))
    again = np.take_along_axis(np.asarray(again), batch.targets_BT[..., None], axis=-1)[..., 0]
    assert batch.mask_BT.sum() == sum(lengths)
    assert np.abs(again - logprobs[:, 1:])[batch.mask_BT > 0].max() < 1e-4
    total, count, metrics = jax.jit(lambda p: lm(made.model, p, batch))(made.params)
    assert count == sum(lengths) and abs(metrics["ce"] + logprobs.sum()) < 1e-4 * count


def test_rows_with_all_options_do_not_depend_on_their_batch_mates(dense):
    together = generate(*dense, PROMPTS, max_tokens=[20, 15, 10], **EVERYTHING)
    for row, most in enumerate([20, 15, 10]):
        (one,) = generate(*dense, PROMPTS[row : row + 1], max_tokens=most, **alone(EVERYTHING, row))
        assert one.ids == together[row].ids and one.finish == together[row].finish
        np.testing.assert_allclose(one.logprobs, together[row].logprobs, atol=1e-4)
    assert {row.finish for row in together} == {"stop"}


def test_new_numbers_prompts_and_stop_ids_compile_nothing(dense):
    """Two loops are compiled, without and with penalties; what changes between calls are arrays (32 stop ids)."""
    model, params = dense.model, unstack(dense.params)
    run = decode.compiled(model.config, model.sharding, model.kernels)
    generate(model, params, PROMPTS, max_tokens=10)
    generate(model, params, PROMPTS, max_tokens=10, repetition_penalty=2)
    before = [f._cache_size() for f in run]
    generate(model, params, PROMPTS, max_tokens=10, temperature=0.3, top_k=7, top_p=0.5, min_p=0.1, seed=9)
    generate(model, params, PROMPTS[::-1], max_tokens=9, temperature=[0, 1, 2], stop_ids=[1, 2], banned_ids=[3])
    generate(model, params, [[1, 2, 3]] * 4, max_tokens=[1, 2, 3, 11], temperature=0, typical_p=0.5, min_tokens=1)
    generate(model, params, PROMPTS, max_tokens=[9, 10, 11], **EVERYTHING)
    generate(model, params, PROMPTS, max_tokens=10, logit_bias={1: -5})
    assert [f._cache_size() for f in run] == before


def test_samples_of_a_prompt_are_those_of_the_seeds_that_follow(dense, monkeypatch):
    read = []
    whole = decode.prefill
    monkeypatch.setattr(decode, "prefill", lambda *args: read.append(args[3]) or whole(*args))
    options = dict(max_tokens=8, temperature=[1.5, 1.0], repetition_penalty=1.2)
    rows = generate(*dense, PROMPTS[:2], n=3, seed=[5, 2**32 - 1], **options)
    assert read == [2], "each prompt is read once"
    for i in range(3):
        single = generate(*dense, PROMPTS[:2], seed=[5 + i, (2**32 - 1 + i) % 2**32], **options)
        assert [row.ids for row in single] == [rows[i].ids, rows[3 + i].ids]
    assert len({tuple(row.ids) for row in rows}) == 6


def test_two_samples_of_one_prompt_both_see_it():
    """On CPU a batch in bfloat16 has two rows at least: the second one is a sample here, and not padding."""
    model = tiny.one_device(tiny.config(layers=1, dtype="bfloat16"))
    rows = generate(model, tiny.weights(model), [[3, 9, 11, 2]], n=2, max_tokens=6, seed=[4], temperature=2.0)
    (other,) = generate(model, tiny.weights(model), [[3, 9, 11, 2]], max_tokens=6, seed=5, temperature=2.0)
    assert rows[1].ids == other.ids != rows[0].ids


def test_each_row_has_its_own_lengths_and_stops(dense):
    free = generate(*dense, PROMPTS, max_tokens=[5, 20, 12], temperature=0)
    assert [len(row.ids) for row in free] == [5, 20, 12] and {row.finish for row in free} == {"length"}
    stops = [[row.ids[2], 39] for row in free]
    ended = generate(*dense, PROMPTS, max_tokens=20, temperature=0, stop_ids=stops)
    for row, whole, (stop, _) in zip(ended, free, stops, strict=True):
        assert row.ids == whole.ids[: whole.ids.index(stop) + 1] and row.finish == "stop"
    later = generate(*dense, PROMPTS, max_tokens=20, temperature=0, stop_ids=stops, min_tokens=[0, 8, 4])
    assert later[0].ids == ended[0].ids
    for row, stop, least in zip(later[1:], stops[1:], [8, 4], strict=True):
        assert not set(stop) & set(row.ids[:least]) and len(row.ids) > least
        assert (row.ids[-1] in stop) == (row.finish == "stop")


def test_the_dispatches_end_with_the_last_row(dense):
    chunks = list(stream(*dense, PROMPTS, max_tokens=[3, 20, 3], temperature=0, stop_ids=[[], range(40), []]))
    assert len(chunks) == 1


def test_a_row_that_is_given_up_costs_no_more_dispatches(dense):
    made = stream(*dense, PROMPTS[:2], max_tokens=20, chunk=4, temperature=0)
    chunks = []
    for chunk in made:
        chunks.append(chunk)
        made.end(len(chunks) - 1)
    assert len(chunks) == 2 and chunks[1].ids[0] == [] and len(chunks[1].ids[1]) == 4
    assert made.stopped == [False, False]


def test_penalties_are_those_of_the_definition(dense):
    """Greedy rows, each token of which is worked out again from the plain forward pass."""
    repetition, frequency, presence = [1.5, 1, 0.7], [0.0, 0.6, -0.5], [0.3, 0, 0.4]
    penalties = dict(repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence)
    biases = [{}, {5: 1.0, 7: -2.0}, {1: 0.5}]
    rows = generate(*dense, PROMPTS, max_tokens=15, temperature=0, logit_bias=biases, **penalties)
    for r, (prompt, row) in enumerate(zip(PROMPTS, rows, strict=True)):
        logits = dense.logits(prompt, row.ids).astype(np.float64)
        for t, made in enumerate(row.ids):
            x = logits[t].copy()
            for i, bias in biases[r].items():
                x[i] += bias
            for i in {*prompt, *row.ids[:t]}:
                x[i] = x[i] / repetition[r] if x[i] > 0 else x[i] * repetition[r]
            for i in range(len(x)):
                count = row.ids[:t].count(i)
                x[i] -= frequency[r] * count + presence[r] * (count > 0)
            assert made == x.argmax()
        np.testing.assert_allclose(row.logprobs, dense.logprobs(prompt, row.ids), atol=1e-4)
    assert rows[0].ids != generate(*dense, PROMPTS[:1], max_tokens=15, temperature=0)[0].ids


def test_a_bias_forces_or_forbids_and_banned_ids_are_never_made(dense):
    free = generate(*dense, PROMPTS, max_tokens=10, temperature=0)
    banned = sorted({i for row in free for i in row.ids})
    rows = generate(*dense, PROMPTS, max_tokens=10, temperature=[0, 1, 1], banned_ids=banned)
    assert not {i for row in rows for i in row.ids} & set(banned)
    biased = generate(*dense, PROMPTS, max_tokens=10, temperature=0, logit_bias=dict.fromkeys(banned, -1e6))
    assert biased[0].ids == rows[0].ids
    forced = generate(*dense, PROMPTS, max_tokens=4, temperature=1, logit_bias=[{5: 1e6}, {6: 1e6}, {7: 1e6}])
    assert [row.ids for row in forced] == [[5] * 4, [6] * 4, [7] * 4]
    np.testing.assert_allclose(forced[1].logprobs, dense.logprobs(PROMPTS[1], [6] * 4), atol=1e-4)


@pytest.mark.parametrize("top", [1, 5, 40])
def test_the_likeliest_tokens_are_those_of_the_forward_pass(dense, top):
    rows = generate(*dense, PROMPTS[1:], max_tokens=10, temperature=0.9, top_k=3, top_logprobs=top, presence_penalty=1)
    for prompt, row in zip(PROMPTS[1:], rows, strict=True):
        logprobs = np.asarray(jax.nn.log_softmax(dense.logits(prompt, row.ids)))
        assert [len(places) for places in row.top] == [top] * 10
        for places, here in zip(row.top, logprobs, strict=True):
            ids, values = zip(*places, strict=True)
            np.testing.assert_allclose(values, np.sort(here)[::-1][:top], atol=1e-4)
            np.testing.assert_allclose(values, here[list(ids)], atol=1e-4)
            assert max(ids) < 40 and len(set(ids)) == top


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[1] * 30], {}, "prompt 0 has 30 tokens, and with max_tokens=8 .* context of 32; set max_tokens=2 or less"),
        ([[1], [1] * 40], {}, "prompt 1 has 40 tokens.*; shorten the prompt"),
        ([[1], [1] * 28], dict(max_tokens=[31, 5]), "prompt 1 has 28 tokens, and with max_tokens=5"),
        ([[1, 2, 99]], {}, "prompt 0: token id 99 .* vocabulary of 40"),
        ([[]], {}, "prompt 0 has no tokens"),
        ([], {}, "no prompt"),
        ([[1]], dict(stop_ids=[40]), "stop id 40 is outside the vocabulary of 40"),
        ([[1]], dict(stop_ids=[[1], [2]]), "stop_ids: 2 lists for 1 prompts"),
        ([[1]], dict(banned_ids=range(40)), "all 40 ids of the vocabulary are banned; allow"),
        ([[1]], dict(stop_ids=range(39), banned_ids=[39], min_tokens=1), "all 40 ids .* before min_tokens"),
        ([[1]], dict(max_tokens=0), "max_tokens=0: must be an integer from 1"),
        ([[1]], dict(max_tokens=[3, 3]), "max_tokens: 2 values for 1 prompts"),
        ([[1]], dict(min_tokens=9), "min_tokens=9 is more than max_tokens=8"),
        ([[1]], dict(temperature=-1), "temperature=-1: must be 0"),
        ([[1]], dict(top_logprobs=41), "top_logprobs from 0 to the vocabulary of 40"),
        ([[1]], dict(n=0), "n=0"),
        ([[1]], dict(n=2, temperature=0), "n=2 samples at temperature 0 would all be the same"),
        ([[1]], dict(logit_bias={40: 1.0}), "logit_bias: id 40 is outside"),
        ([[1]], dict(logit_bias={4: float("-inf")}), "logit_bias of id 4 is -inf: must be finite; banned_ids"),
        ([[1]], dict(logit_bias=[{}, {}]), "logit_bias: 2 for 1 prompts"),
        ([[1]], dict(repetition_penality=2), "did you mean repetition_penalty"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(dense, prompts, options, message):
    with pytest.raises(SettingsError, match=message):
        stream(*dense, prompts, **{"max_tokens": 8, **options})
