import math

import pytest

from jaxllm.errors import SettingsError
from jaxllm.optim.config import OptimConfig, ScheduleConfig
from jaxllm.optim.schedules import make_schedule

PEAK, STEPS, WARMUP = 0.5, 100, 9


def schedule(name, steps=STEPS, warmup=WARMUP, **rest):
    return make_schedule(OptimConfig(lr=PEAK, schedule=ScheduleConfig(name=name, warmup=warmup, **rest)), steps)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_warmup_rises_in_equal_parts_and_wastes_no_step(name):
    lr = schedule(name)
    for step in range(WARMUP + 1):
        assert float(lr(step)) == pytest.approx(PEAK * (step + 1) / (WARMUP + 1))
    assert float(lr(WARMUP)) == pytest.approx(PEAK)
    assert float(schedule(name, warmup=0)(0)) == pytest.approx(PEAK)


def test_middle_and_end():
    cosine, linear = schedule("cosine", end=0.1), schedule("linear", end=0.2)
    for step in (WARMUP, 30, 60, 99, 100):
        x = (step - WARMUP) / (STEPS - WARMUP)
        assert float(cosine(step)) == pytest.approx(PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2), rel=1e-5)
        assert float(linear(step)) == pytest.approx(PEAK * (1 - 0.8 * x), rel=1e-5)
        assert float(schedule("constant")(step)) == pytest.approx(PEAK)


def test_wsd_is_stable_then_falls_by_one_minus_square_root():
    lr = schedule("wsd", decay=0.2, end=0.1)
    assert [float(lr(step)) for step in (WARMUP, 40, 80)] == pytest.approx([PEAK] * 3)
    for step in (81, 85, 95, 99, 100):
        assert float(lr(step)) == pytest.approx(PEAK * (1 - 0.9 * math.sqrt((step - 80) / 20)), rel=1e-5)


def test_warmup_is_a_twentieth_unless_set():
    lr = make_schedule(OptimConfig(lr=PEAK), 200)
    assert float(lr(10)) == pytest.approx(PEAK) and float(lr(9)) < PEAK
    assert float(make_schedule(OptimConfig(lr=PEAK), 1)(0)) == pytest.approx(PEAK)


@pytest.mark.parametrize("steps, warmup, rest", [(10, 10, {}), (10, 11, {}), (0, 0, {}), (10, 6, {"decay": 0.5})])
def test_what_does_not_fit_is_refused(steps, warmup, rest):
    with pytest.raises(SettingsError, match=f"{warmup} steps.*{steps} steps.*optim.schedule.warmup"):
        schedule("wsd" if rest else "linear", steps, warmup, **rest)
