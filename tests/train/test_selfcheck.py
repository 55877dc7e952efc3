"""The self-check: what passes on every mesh, what it says, and what it keeps quiet about. Faults: tests/verify."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tiny

from jaxllm import api
from jaxllm.errors import TrainingError
from jaxllm.model.build import Model, build
from jaxllm.objectives.lm import lm
from jaxllm.sharding import ParallelConfig, make_sharding
from jaxllm.train import plain
from jaxllm.train.probe_rows import ProbeRows
from jaxllm.train.selfcheck import SelfCheck

CONFIGS = {
    "dense": tiny.config(vocab_multiple=2),
    "moe": tiny.config(moe={"z_coef": 1e-3}),
    "capacity": tiny.config(moe={"capacity_factor": 1.0}),
}


def batch(rows=8, length=16):
    """Packed rows whose labels are the tokens after."""
    found = tiny.batch(rows=rows, length=length)
    targets = jnp.concatenate([found.tokens_BT[:, 1:], found.tokens_BT[:, :1]], axis=1)
    return dataclasses.replace(found, targets_BT=targets)


def check(model: Model, **options) -> SelfCheck:
    return SelfCheck(model, functools.partial(lm, z_loss=1e-4), functools.partial(plain.text, z_loss=1e-4), **options)


def stepped(params, change=lambda path, x: x, skipped=0):
    from jaxllm import tree

    return types.SimpleNamespace(params=tree.map_with_path(change, params), extra={"skipped": skipped})


@pytest.mark.parametrize(
    "kind, mesh",
    [
        ("dense", {"fsdp": 1}),
        ("dense", {"fsdp": 4, "context": 2}),
        pytest.param("dense", {"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param("moe", {"expert": 4, "fsdp": 2}, marks=pytest.mark.slow),
        pytest.param("capacity", {"fsdp": 8}, marks=pytest.mark.slow),
    ],
)
def test_what_is_right_passes_on_every_mesh_and_what_leaks_does_not(kind, mesh, monkeypatch):
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    model = build(CONFIGS[kind], make_sharding(ParallelConfig(**mesh), devices))
    params, rows = tiny.weights(model), model.sharding.batch(jax.tree.map(np.asarray, batch()))
    said = check(model).before(params, rows)
    expected = "share the experts' capacity" if kind == "capacity" else "documents of a row see nothing of each other"
    assert expected in said and "the loss is the one reckoned by itself" in said and "\n" not in said
    assert ("the experts are balanced" in said) == (kind != "dense")
    whole = Model.apply

    def leaks(self, *args, **kwargs):
        hidden, cache, aux = whole(self, *args, **kwargs)
        return hidden + 0.1 * jnp.sum(hidden, axis=(0, 1)), cache, aux

    monkeypatch.setattr(Model, "apply", leaks)
    with pytest.raises(TrainingError, match="reaches a document"):
        check(model).before(params, rows)


@pytest.fixture(scope="module")
def model():
    return tiny.one_device(tiny.config(vocab=tiny.VOCAB))


def test_a_frozen_weight_that_moves_in_its_last_bit_is_found(model):
    params = tiny.weights(model)
    one = check(model, trainable="layers/**", lr=1e-3)
    one.before(params, batch())

    def step(path, x):
        return x + 0.01 if path.startswith("layers/") else x

    assert one.after(stepped(params, step)) == ["3 frozen arrays are as they were after the first step"]
    with pytest.raises(TrainingError, match="head is frozen and has moved"):
        bits = np.array(params["head"])
        bits.view(np.uint32)[5, 7] ^= 1
        one.after(stepped(params | {"head": jnp.asarray(bits)}, step))
    with pytest.raises(TrainingError, match="layers/0/attn/q is to train and the first step has not moved it"):
        one.after(stepped(params, lambda path, x: x if path.endswith("attn/q") else step(path, x)))
    assert one.after(stepped(params, skipped=1)) == [], "a step that was skipped moves nothing"
    one.lr = 1e-9
    assert one.after(stepped(params)), "a rate too small for the weights' own rounding is no fault"


def test_nothing_to_learn_and_nothing_finite_are_said(model):
    params = tiny.weights(model)
    with pytest.raises(TrainingError, match="holds no token to learn"):
        check(model).before(params, dataclasses.replace(batch(), mask_BT=jnp.zeros((8, 16))))
    params = params | {"embed": params["embed"] * jnp.nan}
    assert "is not finite" in check(model).before(params, batch())


def test_rows_without_other_documents_are_given_one(model):
    """Text longer than a row: a part of it becomes another document, or packing would not be looked at."""
    tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, (2, 512)).astype(np.int32)
    ones = np.ones_like(tokens)
    long = dataclasses.replace(tiny.packed(tokens, ones), targets_BT=np.roll(tokens, -1, axis=1))
    rows = ProbeRows(model, long)
    assert rows.whole.tokens_BT.shape == (2, 128) and set(rows.whole.segments_BT[0].tolist()) == {1, 2}
    assert {"another document", "a later token", "another row"} == set(rows.outside())
    first = int(np.argmax(rows.whole.segments_BT[0] == 2))
    assert rows.whole.positions_BT[0, first] == 0 and rows.whole.mask_BT[0, first - 1] == 0
    assert rows.kept[0].sum() == 32 and not rows.kept[1].any() and not rows.kept[0, :first].any()


def test_text_is_looked_at_unless_told_otherwise(corpus, tmp_path, capsys):
    for value, lines in ((None, 1), (False, 0)):
        raw = small.settings(corpus, tmp_path / str(value), train__steps=1)
        raw["train"]["self_check"] = value
        api.train(raw)
        assert capsys.readouterr().err.count("self-check: ") == lines
