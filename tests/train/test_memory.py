"""The estimate of a device's memory: exact for the state, taken from the compiler for the step; and what would fit."""

import dataclasses
import re
import shlex
from pathlib import Path
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
from jaxllm.train import loop, memory
from jaxllm.train.estimate import advice
from jaxllm.train.estimate.held import KINDS, held_by, most_of
from jaxllm.train.estimate.step import describe
from jaxllm.train.load import load_run
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
    with pytest.raises(ResourceError, match=r"the layers' inputs alone for \d[\d,]+ tokens ") as told:
        api.train(small.settings(corpus, tmp_path / "run", train__batch=2**33), quiet=True)
    assert not (tmp_path / "run").exists()
    check_told(str(told.value), load_run(small.settings(corpus, "out", train__batch=2**33))[0])


TABLE = ("parameters", "gradients", "optimizer state", "activations", "logits, head", "temporaries")


def check_told(text, config):
    """The table has every kind, and each line of settings saves what it says."""
    for name in TABLE:
        assert re.search(rf"^  {name} +[\d.]+ \wi?B? +[\d.]+ \w", text, re.M), (name, text)
    lines = re.findall(r"^  (\w+\.\w+=.*?) +saves (.+): (.+) needed$", text, re.M)
    assert len(lines) >= 2
    before = held_by(describe(config, jax.device_count()), "cpu").total
    if "together" not in text:
        for words, saves, leaves in (line for line in lines if " devices" not in line[0]):
            after = held_by(describe(advice.applied(config, words.split()), jax.device_count()), "cpu").total
            assert (memory.size(before - after), memory.size(after)) == (saves, leaves)


WIDE = {"embed": 128, "layers": 12, "vocab": 4096, "context": 512, "pattern": small.MODEL["pattern"]}


def wide(**changes):
    """A run of which state, activations and logits are of the same order on a device; nothing of it is read."""
    changes = {"train__batch": 32, "train__seq_len": 128, "model": WIDE, "parallel": {"data": 8, "fsdp": 1}} | changes
    return load_run(small.settings(Path("nowhere"), "out", **changes))[0]


def place(capacity, **changes):
    return advice.Place(8, "cpu", capacity, **changes)


def test_each_way_fits_and_saves_what_it_says():
    seen = set()
    for config in (wide(), wide(train__ema=0.9), wide(train__batch=8, optim__b1=0.8), wide(optim__name="muon")):
        now = place(1).total(config)
        for share in (0.9, 0.5, 0.3):
            ways = advice.ways_to_fit(config, place(share * now))
            assert 2 <= sum(map(len, ways)), share
            for way in ways:
                at, need = config, now
                for one in way:
                    at, seen = advice.applied(at, one.overrides), seen | {one.overrides[0].partition("=")[0]}
                    total = (
                        place(1).total(at) if one.devices is None else held_by(describe(at, one.devices), "cpu").total
                    )
                    assert one.saves == pytest.approx(need - total) and one.saves > 0
                    assert one.total == pytest.approx(total)
                    need = total
                assert need <= share * now, "it does not fit"
                assert len(way) == 1 or all(one.total > share * now for one in way[:-1]), "the last one is not needed"
    assert {"train.accumulate", "model.remat", "optim.name", "parallel.data"} <= seen


def test_what_changes_what_is_learnt_comes_last():
    config = wide()
    alone = [way[0].overrides[0] for way in advice.ways_to_fit(config, place(0.9 * place(1).total(config)))]
    assert alone == ["parallel.data=4", "train.accumulate=2", "model.remat=full"]
    assert advice.ways_to_fit(config, place(1)) == []
    assert advice.listed([])[0].startswith("no other settings would make it fit on so many devices: take more")


def test_ways_are_lines_that_a_shell_takes():
    """Braces and spaces are quoted; the first heading says what they are for, those after it that they are others."""
    lora, rows = (advice.Saving((word,), 1.0, 1.0) for word in ("lora={rank: 16}", "train.batch=8"))
    lines = advice.listed([(lora, rows), (rows, lora)])
    assert [line for line in lines if line[0] != " "] == ["it would fit with these together", "or with these together"]
    typed = [shlex.split(line.partition("  saves ")[0]) for line in lines if line[0] == " "]
    assert typed == [["lora={rank: 16}"], ["train.batch=8"], ["train.batch=8"], ["lora={rank: 16}"]]


def test_overrides_are_those_that_a_settings_file_takes():
    """An optimizer is told what the other one was told as well, and would refuse."""
    raw = small.settings(Path("nowhere"), "out", optim={"name": "adamw", "b1": 0.8}, model=WIDE, train__batch=8)
    config = load_run(raw)[0]
    words = next(advice._optimizer(config, None))
    assert words == ("optim.name=adafactor", "optim.b1=null")
    typed = load_run(raw, words)[0]
    assert typed.optim.name == "adafactor" and place(1).total(typed) == place(1).total(advice.applied(config, words))
    assert list(advice._optimizer(typed, None)) == []


def test_adapters_are_offered_where_there_are_weights_to_start_from():
    config = wide(train__init="absent", train__batch=8)
    heads = {
        ladder: list(ladder(config, describe(config, 8))) for ladder in (advice._lora, advice._quantize, advice._layers)
    }
    assert [len(words) for words in heads.values()] == [1, 0, 0]
    averaged = wide(train__ema=0.9)
    less = place(1).total(averaged) - place(1).total(advice.applied(averaged, next(advice._ema(averaged, None))))
    assert less == memory.device_bytes(describe(averaged, 8).state.params) and not list(advice._ema(config, None))
    adapters = advice.applied(config, heads[advice._lora][0])
    assert adapters.lora.rank == 16 and place(1).total(adapters) < 0.9 * place(1).total(config)
    assert [words[0] for words in advice._quantize(adapters, None)] == [
        f"quantize={{rules: [{{format: {name}}}]}}" for name in ("int8", "nf4")
    ]


def test_every_kind_is_shown_at_its_own_largest_moment():
    config = wide()
    held = held_by(describe(config, 8), "cpu")
    assert set(held.most) == set(KINDS) and all(held.most[kind] >= held.kinds[kind] for kind in KINDS)
    for kind in ("gradients", "activations", "logits", "temporaries"):
        assert held.most[kind] > 0
    assert sum(held.kinds.values()) == held.total < sum(held.most.values())
    larger = most_of(held, held.kinds | {"temporaries": 2 * held.most["temporaries"]})
    assert larger["temporaries"] == 2 * held.most["temporaries"]


def test_what_the_compiler_says_counts_for_more_than_formulas():
    """A step that fits by formulas alone, and of which the compiler says half as much again."""
    config = wide()
    total = place(1).total(config)
    text = advice.explain(config, "too little", place(1.2 * total), 1.5 * total)
    assert f"a step needs {memory.size(1.5 * total)} of a device, by the compiler" in text
    left = re.findall(r": ([\d.]+) MiB needed", text)
    assert left and all(float(x) * 2**20 <= 1.21 * total for x in left)
    close = advice.explain(config, "too little", place(2 * total))
    left = re.findall(r": ([\d.]+) MiB needed", close)
    assert left and all(float(x) * 2**20 <= 0.91 * total for x in left), "it ran out although formulas say it fits"


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.\nmore lines"),
        jax.errors.JaxRuntimeError("INTERNAL: std::bad_alloc"),
        MemoryError(),
    ],
    ids=["xla", "allocator", "host"],
)
def test_running_out_of_memory_in_a_step_is_an_error_that_says_what_helps(corpus, tmp_path, monkeypatch, error):
    def compile(self, state, batch):
        return lambda *_: (_ for _ in ()).throw(error)

    monkeypatch.setattr(Trainer, "compile", compile)
    monkeypatch.setattr(memory, "available", lambda: 1 << 21)
    raw = small.settings(corpus, tmp_path / "run", train__batch=64)
    with pytest.raises(ResourceError) as told:
        api.train(raw, quiet=True)
    text = str(told.value)
    assert text.startswith("out of memory: ") and "more lines" not in text and "train.accumulate=" in text
    assert all(name in text for name in TABLE) and "there were 2.0 MiB" in text
    found = told.value.__cause__
    assert error in (found, found.__cause__)


def test_a_small_step_is_not_what_takes_the_memory():
    text = advice.explain(wide(), "out of memory", place(2**40))
    assert "there were 1.0 TiB" in text and "look for what else takes memory" in text and "saves" not in text


def test_running_out_elsewhere_is_not_said_of_the_step():
    with pytest.raises(MemoryError, match="of a list"), memory.explained(wide()):
        raise MemoryError("of a list")


def test_other_errors_of_xla_stay_what_they_are():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.explained(wide()):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_compiler_that_refuses_says_how_much_it_needs(monkeypatch):
    """The messages of libtpu: the total counts arguments as well."""
    assert (
        memory.used("XLA:TPU compile permanent error. Ran out of memory. Used 38.62G of 31.25G hbm.") == 38.62 * 2**30
    )
    assert memory.used("the total memory required for HLO temporaries (512.5M) exceeds") == 512.5 * 2**20
    config = wide()
    monkeypatch.setattr(memory, "available", lambda: 1 << 30)
    with pytest.raises(ResourceError, match="a step needs 2.0 GiB of a device, by the compiler"):
        with memory.explained(config):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory. Used 2.00G of 1.00G hbm.")


def test_a_state_too_large_says_what_helps_before_it_is_made(corpus, tmp_path, available):
    raw = small.settings(corpus, tmp_path / "run", parallel={"data": 8, "fsdp": 1})
    config = load_run(raw)[0]
    available(600_000)
    with pytest.raises(
        ResourceError, match="too little memory: a device needs .*weights.*gradients.*optimizer"
    ) as told:
        loop.train(config, quiet=True)
    assert "parallel.data=" in str(told.value) and not (tmp_path / "run").exists()
    assert dataclasses.replace(config.parallel, data=1).fsdp == 1
