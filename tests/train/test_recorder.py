"""What becomes of metrics: lines one step late, the rate that was used, patience, the stop after bad gradients."""

import json
import re

import jax.numpy as jnp
import pytest
import small

from jaxllm.optim.schedules import make_schedule
from jaxllm.train.load import load_run
from jaxllm.train.progress import Show
from jaxllm.train.recorder import Recorder

pytestmark = pytest.mark.fast


@pytest.fixture
def make(corpus, tmp_path):
    def make(**changes):
        config, _ = load_run(small.settings(corpus, tmp_path, **changes))
        recorder = Recorder(config, make_schedule(config.optim, config.train.total_steps), Show(8, quiet=True), None)
        recorder.open(tmp_path, None)
        return recorder

    return make


def push(recorder, step, skipped=0, in_row=0):
    metrics = {"loss": jnp.float32(9 - step), "skipped": jnp.int32(skipped), "skipped_in_row": jnp.int32(in_row)}
    recorder.push(step, metrics, tokens=256, flops=1.0, tokens_in_all=256 * step)


def rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_a_step_is_written_when_the_next_one_is_dispatched(make, tmp_path):
    recorder = make()
    push(recorder, 1)
    assert rows(tmp_path) == []
    push(recorder, 2)
    assert [row["step"] for row in rows(tmp_path)] == [1]
    recorder.flush()
    assert [(row["step"], row["tokens"], row["loss"]) for row in rows(tmp_path)] == [(1, 256, 8.0), (2, 512, 7.0)]


def test_every_nth_step_and_all_evaluations_are_written(make, tmp_path):
    recorder = make(log={"every": 3})
    for step in range(1, 8):
        push(recorder, step)
    recorder.flush()
    recorder.evaluated(7, 7 * 256, {"heldout_loss": 2.0, "bits_per_byte": 1.0})
    assert [row["step"] for row in rows(tmp_path)] == [3, 6, 7]


def test_the_learning_rate_is_the_one_the_step_used(make, tmp_path):
    """A skipped step does not advance the schedule."""
    recorder = make(optim={"lr": 1.0, "schedule": {"name": "linear", "warmup": 3}})
    for step, skipped in ((1, 0), (2, 1), (3, 1), (4, 1)):
        push(recorder, step, skipped)
    recorder.flush()
    rates = [row["lr"] for row in rows(tmp_path)]
    assert rates == pytest.approx([0.25, 0.25, 0.5, 0.75])


def test_patience_counts_evaluations_since_the_best(make):
    recorder = make(train__patience=2)
    stops = [
        recorder.evaluated(n, n, {"heldout_loss": x, "bits_per_byte": 1.0}) for n, x in enumerate([3, 2, 2, 1.9, 2, 2])
    ]
    assert stops == [False, False, False, False, False, True]
    assert recorder.best == 1.9
    assert make(train__patience=2).resume(1.9, 2) and not make(train__patience=3).resume(1.9, 2)
    assert not make().resume(1.9, 100)


def test_a_held_out_loss_that_is_no_number_is_never_the_best(make):
    recorder = make(train__patience=2)
    assert not recorder.evaluated(1, 1, {"heldout_loss": float("nan"), "bits_per_byte": 1.0})
    assert not recorder.evaluated(2, 2, {"heldout_loss": 3.0, "bits_per_byte": 1.0})
    assert recorder.best == 3.0


def test_too_many_skipped_steps_are_a_problem_once_they_are_written(make, tmp_path):
    recorder = make(train__max_skipped=2)
    push(recorder, 1)
    push(recorder, 2, skipped=1, in_row=1)
    push(recorder, 3, skipped=2, in_row=2)
    assert recorder.problem is None
    recorder.flush()
    assert re.search(r"step 3: .* 2 steps in a row .*max_skipped.* since step 1\. Lower optim.lr", recorder.problem)
    assert recorder.problem_at == 3 and "--step 3`" in recorder.problem
    assert rows(tmp_path)[-1]["skipped"] == 2


def test_the_first_skipped_step_is_said_with_its_rows_and_spikes_by_their_name(make, monkeypatch):
    recorder, said = make(train__max_skipped=3), []
    monkeypatch.setattr(recorder.show, "say", said.append)
    counts = [(0, 0, 0), (1, 1, 1), (1, 1, 0), (2, 2, 1), (3, 3, 2), (4, 3, 3)]  # skipped, spikes, in a row
    for step, (skipped, spikes, in_row) in enumerate(counts, 1):
        metrics = {"skipped": skipped, "skipped_spikes": spikes, "skipped_in_row": in_row}
        numbers = {"loss": 1.0, "grad_norm": 90.0, "grad_norm_limit": 3.0}
        recorder.push(step, metrics | numbers, tokens=256, flops=1.0, tokens_in_all=256 * step)
    recorder.flush()
    assert len(said) == 1 and said[0].startswith("step 2 was skipped, since the gradient's norm was far above")
    assert "(90, and 3 is the limit). It read the rows 8 to 15 of train" in said[0] and "--step 2`" in said[0]
    assert "was not finite, or its norm far above" in recorder.problem and "in 3 steps in a row" in recorder.problem


def test_a_writer_that_fails_is_said_once_and_tried_again(make, tmp_path, caplog):
    class Away:
        steps = []

        def write(self, step, row):
            if step < 3:
                raise ConnectionError("service is away")
            self.steps.append(step)

        def close(self):
            raise ConnectionError("service is away")

    recorder = make()
    recorder.writers.append(Away())
    for step in (1, 2, 3, 4):
        push(recorder, step)
    recorder.flush()
    recorder.close()
    assert Away.steps == [3, 4] and [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    lost = [message for message in caplog.messages if "metrics are being lost: service is away" in message]
    assert len(lost) == 2 and "step 1" in lost[0] and "closing" in lost[1]


def test_a_sample_is_what_runs_are_compared_by(make):
    recorder = make(train__patience=1)
    assert not recorder.evaluated(1, 1, {"heldout_loss_sample": 2.0, "bits_per_byte_sample": 1.0})
    assert recorder.best == 2.0


@pytest.mark.parametrize("experts, expert, times", [("wait", 2, 1), ("lend", 2, 0), ("wait", 1, 0)])
def test_a_crowded_expert_is_said_once_where_lending_would_help(make, experts, expert, times):
    """100 steps in a row above twice the share; one step below it starts the count anew."""
    recorder = make(kernels={"experts": experts}, parallel={"expert": expert}, model=small.MOE, train__steps=400)
    said = []
    recorder.show.say = said.append
    load = [3.0] * 99 + [1.9] + [3.0] * 99
    for step, value in enumerate(load + [2.1] * 2 + [1.0] + [3.0] * 150, start=1):
        if step == len(load) + 1:
            recorder.flush()
            assert not said
        metrics = {name: jnp.int32(0) for name in ("skipped", "skipped_in_row")}
        recorder.push(step, metrics | {"expert_load_max": jnp.float32(value)}, tokens=1, flops=1.0, tokens_in_all=step)
    recorder.flush()
    assert [("kernels.experts=lend" in line, "2.1" in line) for line in said] == [(True, True)] * times
