"""What a model says of each position, each device on its own parts of the rows: as one device says it."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding

from jaxllm.data.store import TokenStore
from jaxllm.errors import TrainingError
from jaxllm.model.build import build
from jaxllm.objectives.distill import DistillConfig, teach
from jaxllm.objectives.logprobs import token_logprobs
from jaxllm.sharding import ParallelConfig, make_sharding
from jaxllm.train import reference, teacher
from jaxllm.train.rows import outputs

CONFIGS = {
    "dense": tiny.config({"window": 9}, vocab_multiple=8),
    "moe": tiny.config(moe={"shared_ffw": 16, "experts": 8}, vocab_multiple=8),
}
CASES = [
    ("dense", {"fsdp": 2, "context": 4}, {}),
    ("dense", {"context": 2, "tensor": 2}, {}),
    pytest.param("dense", {"data": 2, "context": 4}, {"context": "ring"}, marks=pytest.mark.slow),
    pytest.param("dense", {"fsdp": 8}, {}, marks=pytest.mark.slow),
    ("moe", {"expert": 4, "context": 2}, {}),
]
TEACH = functools.partial(teach, config=DistillConfig(teacher="-", top_k=5, temperature=2.0), vocab=tiny.VOCAB)


def on(parallel: dict):
    """The mesh of these sizes, over as many devices."""
    return make_sharding(ParallelConfig(**{"fsdp": 1} | parallel), jax.devices()[: math.prod(parallel.values())])


def both(model, params, batch):
    """Log-probabilities of the targets and what a teacher says, of one forward pass each."""
    return token_logprobs(model, params, batch), *TEACH(model, params, batch)


@functools.cache
def said(kind, parallel, kernels=()):
    model = build(CONFIGS[kind], on(dict(parallel)), tiny.Kernels(unroll=0, **dict(kernels)))
    found = jax.jit(lambda params, batch: outputs(model, both, params, batch))
    return found(tiny.weights(model), model.sharding.batch(tiny.batch(rows=8, length=32)))


@pytest.mark.parametrize("kind,parallel,kernels", CASES)
def test_what_is_said_of_each_position_is_what_one_device_says(kind, parallel, kernels):
    found, expected = said(kind, tuple(parallel.items()), tuple(kernels.items())), said(kind, (("data", 1),))
    sharding = on(parallel)
    for one, other in zip(found, expected, strict=True):
        assert one.sharding.is_equivalent_to(NamedSharding(sharding.mesh, sharding.rows_spec(2)), one.ndim)
        assert one.dtype == other.dtype and one.shape == other.shape
    assert tiny.relative(found[0], expected[0]) < 1e-5 and tiny.relative(found[2], expected[2]) < 1e-5
    np.testing.assert_array_equal(found[1], expected[1])


def test_microbatches_say_what_the_batch_says():
    model = build(CONFIGS["dense"], on({"fsdp": 2, "context": 2}), tiny.Kernels(unroll=0))
    batch, seen = model.sharding.batch(tiny.batch(rows=8, length=32)), []

    def f(model, params, batch):
        seen.append(batch.tokens_BT.shape)
        return token_logprobs(model, params, batch)

    found = jax.jit(lambda params, batch: outputs(model, f, params, batch, accumulate=2))(tiny.weights(model), batch)
    assert set(seen) == {(2, 16)}
    assert tiny.relative(found, said("dense", (("data", 1),))[0]) < 1e-5


@pytest.mark.parametrize("context", [2, 3, 4, 8])
@pytest.mark.parametrize("pieces", [1, 2])
def test_positions_come_back_in_their_own_order(context, pieces):
    """Whether devices hold two pieces of a row each, in the balanced order, or one."""
    sharding = on({"context": context})
    model, length = build(CONFIGS["dense"], sharding), context * (3 if pieces == 1 else 8)
    tokens_BT = np.arange(2 * length).reshape(2, length) % tiny.VOCAB
    seen = []

    def f(model, params, tokens_BT):
        seen.append(tokens_BT.shape)
        return tokens_BT, jnp.stack([tokens_BT, -tokens_BT], axis=-1), tokens_BT > 7

    found = jax.jit(lambda tokens_BT: outputs(model, f, {}, tokens_BT))(sharding.batch(tokens_BT))
    assert seen == [(2, length // context)]
    np.testing.assert_array_equal(found[0], tokens_BT)
    np.testing.assert_array_equal(found[1], np.stack([tokens_BT, -tokens_BT], axis=-1))
    np.testing.assert_array_equal(found[2], tokens_BT > 7)


def described(sharding, batch):
    """Shapes of a batch, with where they lie."""

    def one(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(sharding.mesh, sharding.rows_spec(x.ndim)))

    return jax.tree.map(one, batch)


@pytest.mark.parametrize("f", [token_logprobs, TEACH], ids=["reference", "teacher"])
def test_no_device_holds_the_hidden_states_or_logits_of_a_whole_row(f):
    """Arrays whose last dimension is that of hidden states or of logits (no other is) are of a device's positions."""
    config = tiny.config({"heads": 2, "kv_heads": 1, "head": 12}, embed=40, vocab=71, vocab_multiple=8)
    rows, length, temporaries = 2, 768, {}
    for context in (1, 8):
        model = build(config, on({"context": context}), tiny.Kernels(unroll=0))
        batch = described(model.sharding, tiny.batch(rows=rows, length=length))
        program = jax.jit(functools.partial(outputs, model, f)).lower(model.abstract, batch).compile()
        shapes = [tuple(map(int, x.split(","))) for x in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", program.as_text())]
        positions = [math.prod(x[:-1]) for x in shapes if x[-1] in (config.embed, config.padded_vocab)]
        assert max(positions) == rows * length // context
        temporaries[context] = program.memory_analysis().temp_size_in_bytes
    assert temporaries[8] < 0.5 * temporaries[1], "keys are gathered, a layer at a time; all else is a part"


def test_references_and_teachers_see_a_devices_part_of_the_rows(monkeypatch):
    """What they make of it lands at the tokens that it is of."""
    sharding, seen = on({"fsdp": 2, "context": 4}), []
    model = build(CONFIGS["dense"], sharding)

    def logprobs(model, params, batch):
        seen.append(batch.tokens_BT.shape)
        return batch.targets_BT.astype(jnp.float32)

    monkeypatch.setattr(reference, "token_logprobs", logprobs)
    tokens = np.arange(1, 150)
    store = TokenStore(
        name="pairs", tokenizer_hash="", vocab=150, fingerprint="", shards=(tokens.astype(np.uint16),),
        shard_of=np.zeros(1, np.int32), start_of=np.zeros(1, int), lengths=np.array([149]), bytes=np.array([149]),
        hashes=np.arange(1),
    )  # fmt: skip
    found = reference.reference_of(model, {}, store, length=32, batch=2, truncate="right")
    assert set(seen) == {(1, 8)}
    np.testing.assert_array_equal(found[1:], tokens[1:])  # no row holds the first one as a target

    def top(model, params, batch, *, config, vocab):
        seen.append(batch.tokens_BT.shape)
        ids_BT1 = batch.tokens_BT[..., None]
        return ids_BT1, -ids_BT1.astype(jnp.float32)

    monkeypatch.setattr(teacher, "teach", top)
    monkeypatch.setattr(teacher, "frozen_model", lambda *_: (model, {}))
    says = teacher.Teacher(DistillConfig(teacher="-", top_k=1), model.config, sharding, None, accumulate=2)
    batch, seen = sharding.batch(tiny.batch(rows=8, length=32)), []
    taught = says(batch, 0)
    assert set(seen) == {(2, 8)}
    np.testing.assert_array_equal(taught.top_ids_BTN[..., 0], batch.tokens_BT)
    np.testing.assert_array_equal(-taught.top_logprobs_BTN[..., 0], batch.tokens_BT)


@pytest.mark.parametrize("kind", ["dense", "capacity", "sure", "deaf", "late"])
def test_a_teacher_is_refused_where_it_is_not_of_its_tokens_and_nowhere_else(kind, monkeypatch):
    """Experts drop an earlier token for a later one's first choice; and of most tokens a sure teacher says the same."""
    moe = {"experts": 4, "capacity_factor": 0.5, "experts_per_token": 2} if kind == "capacity" else None
    model = build(tiny.config(moe=moe), on({"data": 1}))
    says = {
        "sure": lambda model, params, batch: jnp.where(batch.tokens_BT[..., None] % 2 == 0, 0.0, -1e-7),
        "deaf": lambda model, params, batch: jnp.zeros((*batch.tokens_BT.shape, 1)),
        "late": lambda model, params, batch: -jnp.roll(batch.tokens_BT, -1, axis=1)[..., None].astype(jnp.float32),
    }.get(kind)
    if says:
        unsure = tiny.batch(rows=8, length=32).tokens_BT[0, 16]
        says_ = lambda *args: says(*args) - (kind == "sure") * (args[2].tokens_BT[..., None] == unsure)  # noqa: E731
        monkeypatch.setattr(
            teacher, "teach", lambda *args, **_: (jnp.zeros((*args[2].tokens_BT.shape, 1), int), says_(*args))
        )
    monkeypatch.setattr(teacher, "frozen_model", lambda *_: (model, tiny.weights(model)))
    one = teacher.Teacher(DistillConfig(teacher="-", top_k=1), model.config, model.sharding, None, accumulate=1)
    taught = one(model.sharding.batch(tiny.batch(rows=8, length=32)), 0)
    if kind in ("deaf", "late"):
        with pytest.raises(TrainingError, match="not of its tokens"):
            one.check(taught)
    else:
        assert one.check(taught)
