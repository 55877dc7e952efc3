"""Decoding with a cache against the plain forward pass, for the mechanisms that touch positions, masks or rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm.errors import UserError
from jaxllm.generate import decode
from jaxllm.generate.beam import beam_search
from jaxllm.generate.decode import Rules, unstack
from jaxllm.generate.params import make_sampling
from jaxllm.generate.tokens import generate, stream
from jaxllm.model.build import build
from jaxllm.model.cache import make_cache
from jaxllm.sharding import ParallelConfig, make_sharding

PROMPTS = [[7], [3, 9, 11, 2, 30, 8, 1, 4, 19], [5, 6, 38]]
#: Rows end where the plain forward pass of the tests does.
TO_THE_END = [31, 23, 29]


def test_a_cache_filled_in_parts_gives_the_logits_of_one_forward(made):
    model, params = made
    vocab, context = model.config.vocab, model.config.context
    tokens = np.random.default_rng(0).integers(0, vocab, (2, context)).astype(np.int32)
    wanted = made.forward(params, tokens)
    weights, length_B = unstack(params), np.full(2, context, np.int32)

    @jax.jit
    def step(cache, tokens, positions):
        hidden, cache, _ = model.apply(weights, tokens, positions_BT=positions, lengths_B=length_B, cache=cache)
        return cache, model.unembed(model.head(weights), hidden)

    positions = np.broadcast_to(np.arange(context, dtype=np.int32), tokens.shape)
    cache, logits = make_cache(model.config, 2, context, 4), []
    for start in range(0, context, 4):
        part = np.s_[:, start : start + 4]
        cache, new = step(cache, tokens[part], positions[part])
        logits.append(new)
    assert np.abs(np.concatenate(logits, axis=1) - wanted)[..., :vocab].max() < 1e-5


def test_greedy_ragged_batch_equals_argmax_of_the_forward_pass(made):
    """Prompts of 1, 9 and 3 tokens in a batch of four rows: tokens and log-probabilities as of each prompt alone."""
    rows = generate(*made, PROMPTS, max_tokens=TO_THE_END, temperature=0, chunk=8)
    for prompt, row, most in zip(PROMPTS, rows, TO_THE_END, strict=True):
        assert row.ids == made.logits(prompt, row.ids).argmax(-1).tolist()
        assert row.finish == "length" and len(row.ids) == most and row.top == []
        assert np.abs(np.array(row.logprobs) - made.logprobs(prompt, row.ids)).max() < 1e-4
    assert len({i for row in rows for i in row.ids}) > 3  # not all one token


def test_sampled_rows_do_not_depend_on_their_batch_mates(dense):
    model, params = dense
    options = dict(max_tokens=10, temperature=1.5, top_p=0.95)
    together = generate(model, params, PROMPTS, seed=[1, 2, 3], **options)
    for prompt, seed, row in zip(PROMPTS, (1, 2, 3), together, strict=True):
        (alone,) = generate(model, params, [prompt], seed=seed, **options)
        assert alone.ids == row.ids
        assert np.abs(np.array(row.logprobs) - dense.logprobs(prompt, row.ids)).max() < 1e-4
    (other,) = generate(model, params, PROMPTS[1:2], seed=7, **options)
    assert other.ids != together[1].ids


def test_dispatch_size_changes_nothing(dense):
    model, params = dense
    runs = [generate(model, params, PROMPTS, max_tokens=10, seed=5, chunk=chunk) for chunk in (3, 8)]
    assert [r.ids for r in runs[0]] == [r.ids for r in runs[1]]


def test_long_prompts_are_prefilled_in_parts(dense, monkeypatch):
    model, params = dense
    prompt = np.random.default_rng(1).integers(0, 40, 27).tolist()
    whole = generate(model, params, [prompt, [4]], max_tokens=5, temperature=0)
    monkeypatch.setattr(decode, "PREFILL", 16)
    parts = generate(model, params, [prompt, [4]], max_tokens=5, temperature=0)
    assert [r.ids for r in parts] == [r.ids for r in whole]
    assert whole[0].ids == dense.logits(prompt, whole[0].ids).argmax(-1).tolist()


def test_rows_are_prefilled_a_few_at_a_time(dense, monkeypatch):
    """Four ragged rows, two at a time, into an empty cache and then into a filled one."""
    model, params = dense
    rng, lengths = np.random.default_rng(2), np.array([32, 20, 7, 0])
    tokens, at = rng.integers(0, 40, (4, 32)).astype(np.int32), np.arange(32, dtype=np.int32)
    positions = np.where(at < lengths[:, None], at, np.int32(-1))

    def read(most: int):
        monkeypatch.setattr(decode, "PREFILL", most)
        run = jax.jit(lambda cache, *part: decode._prefill(model, unstack(params), cache, *part, lengths))
        cache = make_cache(model.config, 4, 32, 16)
        for part in (np.s_[:, :16], np.s_[:, 16:]):
            assert decode._rows_at_once(model, 4, 16) == min(4, most // 16)
            cache = run(cache, tokens[part], positions[part])
        return cache

    whole, groups = read(512), read(32)
    assert (np.asarray(whole[0].positions_BS) == positions).all()
    assert jax.tree.all(jax.tree.map(lambda a, b: tiny.relative(a, b) < 1e-5, groups, whole))


def test_stop_ids_end_a_row_and_then_the_loop(dense):
    model, params = dense
    free = generate(model, params, PROMPTS, max_tokens=20, temperature=0)
    stops = [row.ids[3] for row in free]
    ended = generate(model, params, PROMPTS, max_tokens=20, temperature=0, stop_ids=stops)
    for row, whole in zip(ended, free, strict=True):
        length = min(whole.ids.index(i) for i in stops if i in whole.ids) + 1
        assert row.ids == whole.ids[:length] and row.finish == "stop" and len(row.logprobs) == length <= 4
    chunks = list(stream(model, params, PROMPTS, max_tokens=20, temperature=0, stop_ids=stops))
    assert len(chunks) == 1


def test_the_loop_itself_exits_when_all_rows_have_ended(dense):
    model, params = dense
    weights, vocab = unstack(params), model.config.padded_vocab
    run = decode.compiled(model.config, model.sharding, model.kernels)
    cache = decode.prefill(model, weights, [[3, 4]], 1, np.array([20]))
    state = run.state(cache, *(np.array([x], np.int32) for x in (4, 1, 20, 22, 0)), None)
    rules = Rules(make_sampling(1), np.arange(vocab, dtype=np.int32)[None], np.zeros(vocab, bool))
    state, ids, *_ = run.decode(weights, state, rules, chunk=8, top=0)
    assert int(state.position_B[0]) == 2 and (np.asarray(ids)[1:] == -1).all() and ids[0, 0] >= 0


def test_unstack_is_done_once(dense):
    _, params = dense
    once = unstack(params)
    assert unstack(once) is once
    stacked = jax.tree.map(lambda w: jnp.stack(w), once["layers"], is_leaf=lambda w: isinstance(w, tuple))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), stacked, params["layers"]))


def test_unstacking_can_free_the_weights_that_it_reads(dense):
    params = tiny.weights(dense.model, seed=1)
    freed = unstack(params, free=True)
    assert all(w.is_deleted() for w in jax.tree.leaves(params["layers"])) and not params["embed"].is_deleted()
    assert tiny.bit_equal(freed, unstack(dense.params))


@pytest.mark.slow
def test_eight_devices_make_the_tokens_of_one(dense):
    where = make_sharding(ParallelConfig(data=2, fsdp=2, tensor=2))
    model = build(dense.model.config, where)
    params = unstack(tiny.weights(model, seed=1))
    run = decode.compiled(model.config, model.sharding, model.kernels)
    penalties = dict(repetition_penalty=1.5, presence_penalty=0.3, logit_bias={3: 1.0})
    for options in (dict(temperature=0), dict(n=2, top_logprobs=2, stop_ids=[5, 6], min_tokens=3, **penalties)):
        many, one = (generate(*m, PROMPTS, max_tokens=20, **options) for m in ((model, params), dense))
        assert [r.ids for r in many] == [r.ids for r in one]
    assert run.decode._cache_size() == 2  # the cache comes back laid out as it went in
    many, one = (beam_search(*m, PROMPTS, max_tokens=20, beams=3, stop_ids=[5]) for m in ((model, params), dense))
    assert [r.ids for r in many] == [r.ids for r in one]


def test_non_finite_logits_are_an_error(dense):
    model, params = dense
    with pytest.raises(UserError, match="not finite"):
        generate(model, {**params, "embed": params["embed"] * jnp.nan}, [[1]], max_tokens=2, temperature=0)
