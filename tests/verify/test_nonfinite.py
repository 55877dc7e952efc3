"""Row 9: a faulty gradient changes nothing and is counted; a step that updates anyway is caught."""

import jax
import jax.numpy as jnp
import pytest
from labs import few

from jaxllm.train import spikes, step
from jaxllm.verify import nonfinite
from jaxllm.verify.nonfinite import wrong_words


@pytest.fixture
def quick(lab, monkeypatch):
    few(monkeypatch, 1)
    return lab


def test_faulty_steps_change_nothing(quick):
    tried, failures = nonfinite.steps(quick)
    assert not failures and tried >= 11


def test_a_step_that_updates_anyway(quick, monkeypatch):
    monkeypatch.setattr(jax.lax, "cond", lambda taken, update, leave, *operands: update(*operands))
    failures = nonfinite.steps(quick)[1]
    assert any("params" in text and "has changed" in text for text in failures), failures
    assert any("opt/" in text and "has changed" in text for text in failures)
    assert any("is not as if there had been none" in text for text in failures)


def test_an_average_that_moves_in_a_skipped_step(quick, monkeypatch):
    extra = step._extra
    monkeypatch.setattr(step, "_extra", lambda state, taken, *rest: extra(state, taken, *rest) | moved(state, *rest))

    def moved(state, decay, chosen):
        return {"ema": jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], chosen)}

    assert any("average" in text for text in nonfinite.steps(quick)[1])


def test_spikes_that_are_let_through_or_learnt(quick, monkeypatch):
    after = spikes.after
    monkeypatch.setattr(spikes, "after", lambda state, norm, taken, spike: after(state, norm, taken | spike, spike))
    assert any("a spike" in text and "spikes/" in text for text in nonfinite.steps(quick)[1])
    monkeypatch.setattr(spikes, "after", after)
    monkeypatch.setattr(spikes, "limit", lambda state, deviations: jnp.float32(jnp.inf))
    assert any("a spike" in text and "params" in text for text in nonfinite.steps(quick)[1])


def test_a_guard_that_skips_good_steps(quick, monkeypatch):
    monkeypatch.setattr(spikes, "limit", lambda state, deviations: jnp.float32(0))
    assert "good steps were skipped" in nonfinite.steps(quick)[1][0]


@pytest.mark.slow
def test_runs_skip_resume_and_stop_with_their_documents(lab):
    tried, failures = nonfinite.runs(lab)
    assert tried == 3 and not failures


def test_last_words_without_their_documents():
    said = (
        "step 20 was skipped, since the gradient was not finite. It read the rows 152 to 159 of train (...)\n"
        "error: step 83: the gradient was not finite in 4 steps in a row (train.max_skipped); the weights have not "
        "changed since step 79. Look at the data with `jaxllm data inspect a.yaml --step 83`. Step 83 read the rows "
        "656 to 663 of train, which hold 7 documents: /a.txt; and 6 more."
    )
    assert wrong_words(said, 83) == []
    assert "which documents" in wrong_words(said.replace("which hold 7 documents", "which hold"), 83)[0]
    assert "why it ended" in wrong_words(said, 84)[0]
    assert "the first skipped step" in wrong_words(said.replace("was skipped", "was not taken"), 83)[0]
