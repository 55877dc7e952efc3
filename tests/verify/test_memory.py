"""Row 12: the check sees an estimate that forgets something, settings that save less, and errors that say nothing."""

import dataclasses

import pytest
from labs import planted

from jaxllm.train.estimate import advice, held
from jaxllm.verify import memory

SMALL = [("grouped queries", "fsdp")]


def failures(cases):
    return [text for row in memory.compared(cases) for text in memory.judged(row)]


@pytest.mark.parametrize(
    "kind", ["optimizer", "activations"], ids=["an estimate without the optimizer", "one without activations"]
)
def test_an_estimate_that_forgets_a_kind(monkeypatch, kind):
    assert failures(SMALL) == []
    whole = held.held_by
    monkeypatch.setattr(held, "held_by", lambda *args: dataclasses.replace(whole(*args), **{kind: 0.0}))
    found = failures(SMALL)
    says = {"optimizer": "that its program is given", "activations": "bytes of its program"}[kind]
    assert found and any(says in text for text in found), found


@pytest.mark.fast
def test_settings_that_do_not_save_what_is_said(monkeypatch):
    raw = memory.settings(*SMALL[0])
    assert memory.refused(raw, 0.6) == []
    # Planted: twice the saving, so that settings are named with which it does not fit.
    honest = advice._saving

    def boasting(words, config, place, now):
        if (one := honest(words, config, place, now)) is None:
            return None
        return dataclasses.replace(one, saves=2 * one.saves, total=now - 2 * one.saves)

    monkeypatch.setattr(advice, "_saving", boasting)
    found = memory.refused(raw, 0.4)
    assert any("saves" in text for text in found) and any("it needs" in text for text in found), found


@pytest.mark.fast
def test_fewer_settings_than_three(monkeypatch):
    monkeypatch.setattr(advice, "NAMED", 1)
    monkeypatch.setattr(memory, "_wrong", lambda *_: [])
    assert any("settings are named, not 3" in text for text in memory.refused(memory.settings(*SMALL[0]), 0.85))


def test_a_run_that_is_refused_without_a_table(lab, monkeypatch):
    assert memory._run_that_is_refused(lab) == []
    planted(
        monkeypatch,
        "import contextlib; from jaxllm.train import memory\n"
        "memory.explained = lambda config: contextlib.nullcontext()",
    )
    found = memory._run_that_is_refused(lab)
    assert len(found) == 1 and "the table has no gradients" in found[0] and "0 settings are named" in found[0]


@pytest.mark.slow
def test_an_allocation_that_xla_is_refused_becomes_a_table(lab, monkeypatch):
    """The error is the real one: the process may not have as much as the step asks for, and no check says so before."""
    planted(
        monkeypatch,
        "import resource; from jaxllm.train import memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.RLIM_INFINITY))\n"
        "memory.check_rows = memory.check_step = lambda *args, **more: None\n"
        "memory.available = lambda: 8 << 30",
    )
    changes = dict(train__batch=16384, model__vocab=4096, model__embed=256)
    with lab.started(lab.settings(lab.folder / "run", **changes)) as process:
        code, text = process.wait(120), process.said()
    assert code == 2 and "error: out of memory: RESOURCE_EXHAUSTED" in text and "Traceback" not in text, text[-500:]
    assert all(f"\n  {kind}" in text for kind in ("parameters", "gradients", "optimizer state", "activations"))
    assert all(f"\n  {kind}" in text for kind in ("logits", "temporaries"))
    assert "it would fit with" in text and text.count(" saves ") >= 2 and "  train.accumulate=" in text, text[-900:]


@pytest.mark.slow
def test_the_row_holds(lab):
    found = memory.estimated(lab)
    assert found.passed and found.cases >= 18 + 1 + 6 + 1, found.failures
