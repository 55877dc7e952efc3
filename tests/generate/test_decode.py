"""Decoding with a cache against the plain forward pass, for the mechanisms that touch positions, masks or rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm.errors import SettingsError, UserError
from jaxllm.generate import decode
from jaxllm.generate.decode import unstack
from jaxllm.generate.sample import make_sampling
from jaxllm.generate.tokens import generate, stream
from jaxllm.model.build import build
from jaxllm.model.cache import make_cache
from jaxllm.sharding import ParallelConfig, make_sharding

VOCAB, CONTEXT = 40, 32
SHAPE = dict(vocab=VOCAB, context=CONTEXT)
LOCAL = tiny.layer({"window": 4, "sinks": True, "qk_norm": "head", "softcap": 5.0})
ALIBI = {"kv_heads": 1, "rope": None, "alibi": True, "qkv_bias": True}
CONFIGS = {
    "dense": tiny.config(tied=True, vocab_multiple=16, **SHAPE),
    "mixed": tiny.config(  # a prefix and one period, no two layers alike
        layers=3,
        prefix=[tiny.layer()],
        pattern=[LOCAL, tiny.layer(ALIBI, moe={"shared_ffw": 8})],
        positions="learned",
        norm="layer",
        norm_placement="both",
        **SHAPE,
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def made(request):
    """`(model, params, forward)`, one of each kind; `forward` gives the logits of rows of CONTEXT tokens."""
    return make(tiny.one_device(CONFIGS[request.param]))


@pytest.fixture(scope="module")
def dense():
    return make(tiny.one_device(CONFIGS["dense"]))


def make(model):
    return model, tiny.weights(model, seed=1), jax.jit(lambda params, tokens: model.logits(params, tokens))


PROMPTS = [[7], [3, 9, 11, 2, 30, 8, 1, 4, 19], [5, 6, 38]]


def logprobs_of(made, prompt, ids):
    """Log-probabilities of `ids` after `prompt` and the logits that they came from, by one forward pass."""
    model, params, forward = made
    row = np.zeros((1, CONTEXT), np.int32)
    row[0, : len(prompt) + len(ids)] = prompt + ids
    logits_TV = np.asarray(forward(params, row))[0, len(prompt) - 1 : len(prompt) + len(ids) - 1]
    return np.asarray(jax.nn.log_softmax(logits_TV))[np.arange(len(ids)), ids], logits_TV


def test_a_cache_filled_in_parts_gives_the_logits_of_one_forward(made):
    model, params, forward = made
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, CONTEXT)).astype(np.int32)
    wanted = forward(params, tokens)
    weights = unstack(params)

    @jax.jit
    def step(cache, tokens, positions):
        hidden, cache, _ = model.apply(weights, tokens, positions_BT=positions, cache=cache)
        return cache, model.unembed(model.head(weights), hidden)

    positions = np.broadcast_to(np.arange(CONTEXT, dtype=np.int32), tokens.shape)
    cache, logits = make_cache(model.config, 2, CONTEXT), []
    for start in range(0, CONTEXT, 4):
        part = np.s_[:, start : start + 4]
        cache, new = step(cache, tokens[part], positions[part])
        logits.append(new)
    assert np.abs(np.concatenate(logits, axis=1) - wanted)[..., :VOCAB].max() < 1e-5


def test_greedy_ragged_batch_equals_argmax_of_the_forward_pass(made):
    """Prompts of 1, 9 and 3 tokens in a batch of four rows: tokens and log-probabilities as of each prompt alone."""
    model, params, _ = made
    rows = generate(model, params, PROMPTS, max_tokens=12, temperature=0, chunk=8)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        logprobs, logits = logprobs_of(made, prompt, row.ids)
        assert row.ids == logits.argmax(-1).tolist() and row.finish == "length" and len(row.ids) == 12
        assert np.abs(np.array(row.logprobs) - logprobs).max() < 1e-4
    assert len({i for row in rows for i in row.ids}) > 3  # not all one token


def test_sampled_rows_do_not_depend_on_their_batch_mates(dense):
    model, params, _ = dense
    options = dict(max_tokens=10, temperature=1.5, top_p=0.95)
    together = generate(model, params, PROMPTS, seed=[1, 2, 3], **options)
    for prompt, seed, row in zip(PROMPTS, (1, 2, 3), together, strict=True):
        (alone,) = generate(model, params, [prompt], seed=seed, **options)
        assert alone.ids == row.ids
        assert np.abs(np.array(row.logprobs) - logprobs_of(dense, prompt, row.ids)[0]).max() < 1e-4
    (other,) = generate(model, params, PROMPTS[1:2], seed=7, **options)
    assert other.ids != together[1].ids


def test_dispatch_size_changes_nothing(dense):
    model, params, _ = dense
    runs = [generate(model, params, PROMPTS, max_tokens=10, seed=5, chunk=chunk) for chunk in (3, 8)]
    assert [r.ids for r in runs[0]] == [r.ids for r in runs[1]]


def test_long_prompts_are_prefilled_in_parts(dense, monkeypatch):
    model, params, _ = dense
    prompt = np.random.default_rng(1).integers(0, VOCAB, 27).tolist()
    whole = generate(model, params, [prompt, [4]], max_tokens=5, temperature=0)
    monkeypatch.setattr(decode, "PREFILL", 16)
    parts = generate(model, params, [prompt, [4]], max_tokens=5, temperature=0)
    assert [r.ids for r in parts] == [r.ids for r in whole]
    assert whole[0].ids == logprobs_of(dense, prompt, whole[0].ids)[1].argmax(-1).tolist()


def test_stop_ids_end_a_row_and_then_the_loop(dense):
    model, params, _ = dense
    free = generate(model, params, PROMPTS, max_tokens=20, temperature=0)
    stops = [row.ids[3] for row in free]
    ended = generate(model, params, PROMPTS, max_tokens=20, temperature=0, stop_ids=stops)
    for row, whole in zip(ended, free, strict=True):
        length = min(whole.ids.index(i) for i in stops if i in whole.ids) + 1
        assert row.ids == whole.ids[:length] and row.finish == "stop" and len(row.logprobs) == length <= 4
    chunks = list(stream(model, params, PROMPTS, max_tokens=20, temperature=0, stop_ids=stops))
    assert len(chunks) == 1


def test_the_loop_itself_exits_when_all_rows_have_ended(dense):
    model, params, _ = dense
    weights = unstack(params)
    run = decode.compiled(model.config, model.sharding, model.kernels)
    state = decode.prefill(model, weights, [[3, 4]], 1, 20)
    everything, nothing = np.ones(model.config.padded_vocab, bool), np.zeros(model.config.padded_vocab, bool)
    state, ids, _ = run.decode(weights, state, make_sampling(1), everything, nothing, chunk=8)
    assert int(state.position_B[0]) == 2 and (np.asarray(ids)[1:] == -1).all() and ids[0, 0] >= 0


def test_banned_ids_are_never_made(dense):
    model, params, _ = dense
    free = generate(model, params, PROMPTS, max_tokens=10, temperature=0)
    banned = sorted({i for row in free for i in row.ids})
    rows = generate(model, params, PROMPTS, max_tokens=10, temperature=[0, 1, 1], banned_ids=banned)
    assert not {i for row in rows for i in row.ids} & set(banned)


def test_new_sampling_parameters_prompts_and_stop_ids_compile_nothing(dense):
    model, params, _ = dense
    weights = unstack(params)
    run = decode.compiled(model.config, model.sharding, model.kernels)
    generate(model, weights, PROMPTS, max_tokens=10)
    before = [f._cache_size() for f in run]
    generate(model, weights, PROMPTS, max_tokens=10, temperature=0.3, top_k=7, top_p=0.5, min_p=0.1, seed=9)
    generate(model, weights, PROMPTS[::-1], max_tokens=10, temperature=[0, 1, 2], stop_ids=[1, 2], banned_ids=[3])
    generate(model, weights, [[1, 2, 3]] * 4, max_tokens=11, temperature=0)
    assert [f._cache_size() for f in run] == before


def test_unstack_is_done_once(dense):
    _, params, _ = dense
    once = unstack(params)
    assert unstack(once) is once
    stacked = jax.tree.map(lambda w: jnp.stack(w), once["layers"], is_leaf=lambda w: isinstance(w, tuple))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), stacked, params["layers"]))


def test_eight_devices_make_the_tokens_of_one(dense):
    where = make_sharding(ParallelConfig(data=2, fsdp=2, tensor=2))
    model, params, _ = make(build(CONFIGS["dense"], where))
    options = dict(max_tokens=8, temperature=0)
    many, one = generate(model, params, PROMPTS, **options), generate(*dense[:2], PROMPTS, **options)
    assert [r.ids for r in many] == [r.ids for r in one]
    run = decode.compiled(model.config, model.sharding, model.kernels)
    assert run.decode._cache_size() == 1  # the cache comes back laid out as it went in


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[1] * 30], {}, "prompt 0 has 30 tokens, and with max_tokens=8 .* context of 32; set max_tokens=2 or less"),
        ([[1], [1] * 40], {}, "prompt 1 has 40 tokens.*; shorten the prompt"),
        ([[1, 2, 99]], {}, "prompt 0: token id 99 .* vocabulary of 40"),
        ([[]], {}, "prompt 0 has no tokens"),
        ([], {}, "no prompt"),
        ([[1]], dict(stop_ids=[40]), "stop id 40 is outside the vocabulary of 40"),
        ([[1]], dict(banned_ids=range(40)), "all 40 ids of the vocabulary are banned"),
        ([[1]], dict(max_tokens=0), "max_tokens=0"),
        ([[1]], dict(temperature=-1), "temperature=-1: must be 0"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(dense, prompts, options, message):
    with pytest.raises(SettingsError, match=message):
        stream(*dense[:2], prompts, **{"max_tokens": 8, **options})


def test_non_finite_logits_are_an_error(dense):
    model, params, _ = dense
    with pytest.raises(UserError, match="not finite"):
        generate(model, {**params, "embed": params["embed"] * jnp.nan}, [[1]], max_tokens=2, temperature=0)
