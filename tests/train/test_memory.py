"""The estimate of a device's memory: exact for the state, taken from the compiler for the step."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import psutil
import pytest
import small
import tiny

from jaxllm import api, tree
from jaxllm.errors import ResourceError
from jaxllm.model.build import build
from jaxllm.optim.config import OptimConfig
from jaxllm.optim.optimizers import make_optimizer
from jaxllm.sharding import ParallelConfig, make_sharding
from jaxllm.train import memory
from jaxllm.train.loop import Trainer
from jaxllm.train.step import abstract_state

pytestmark = pytest.mark.fast


def state(ema=False, **parallel):
    model = build(tiny.config(vocab=64), make_sharding(ParallelConfig(**parallel)))
    return abstract_state(model, make_optimizer(OptimConfig(), 10, model.axes), ema=ema)


@pytest.fixture
def available(monkeypatch):
    def set_(count):
        found = SimpleNamespace(available=count * jax.local_device_count())
        monkeypatch.setattr(psutil, "virtual_memory", lambda: found)

    return set_


def test_the_bytes_of_a_device_are_those_of_its_shards():
    replicated, split = state(data=8, fsdp=1).params, state(fsdp=8).params
    assert memory.device_bytes(replicated) == tree.nbytes(replicated)
    by_hand = sum(
        x.dtype.itemsize * x.sharding.shard_shape(x.shape)[0] * (x.size // x.shape[0]) for x in [split["embed"]]
    )
    assert memory.device_bytes(split["embed"]) in (by_hand, tree.nbytes(split["embed"]) // 8)
    assert memory.device_bytes(split) < tree.nbytes(split) / 6


def test_a_state_that_just_fits_passes_and_a_byte_less_is_refused(available):
    for ema in (False, True):
        made = state(ema=ema, data=8, fsdp=1)
        need = tree.nbytes(made.params) * 2 + tree.nbytes(made.opt) + ema * tree.nbytes(made.params)
        available(need)
        memory.check_state(made)
        available(need - 1)
        with pytest.raises(ResourceError, match="too little memory: a device needs .*weights .*gradients .*optimizer"):
            memory.check_state(made)


def test_frozen_weights_need_no_gradient(available):
    made = state(data=8, fsdp=1)
    attention = {path: leaf for path, leaf in tree.flatten(made.params).items() if "/attn/" in path}
    available(tree.nbytes(made.params) + tree.nbytes(attention) + tree.nbytes(made.opt))
    memory.check_state(made, "**/attn/**")
    with pytest.raises(ResourceError, match="gradients"):
        memory.check_state(made)


def test_a_step_whose_temporaries_do_not_fit_is_refused(available):
    compiled = jax.jit(lambda x: jnp.sort(x @ x.T) @ x).lower(jnp.zeros((256, 256))).compile()
    available(1 << 30)
    memory.check_step(compiled)
    available(1 << 10)
    with pytest.raises(ResourceError, match="activations and other temporaries .*train.accumulate"):
        memory.check_step(compiled)


def test_sizes_are_written_for_people():
    assert [memory.size(n) for n in (12, 1536, 3 << 20, 5 << 40)] == ["12 B", "1.5 KiB", "3.0 MiB", "5.0 TiB"]


def test_rows_that_cannot_fit_are_refused_before_anything_is_compiled(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "compile", lambda *_: pytest.fail("compiled"))
    with pytest.raises(ResourceError, match=r"the layers' inputs alone for \d[\d,]+ tokens .*lower train.batch"):
        api.train(small.settings(corpus, tmp_path / "run", train__batch=2**33), quiet=True)
    assert not (tmp_path / "run").exists()
