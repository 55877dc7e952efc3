import pytest

from jaxllm import config
from jaxllm.errors import SettingsError
from jaxllm.optim.config import HYPERPARAMETERS, SCHEDULES, OptimConfig, ScheduleConfig


def load(**raw):
    return config.load(OptimConfig, raw)


def test_left_out_hyperparameters_get_the_defaults_of_the_chosen_optimizer():
    assert load(name="lion").b2 == 0.99
    assert load(name="muon").momentum == 0.95
    assert (load(name="sgd").b1, load(name="sgd").momentum) == (None, 0.9)
    assert load(schedule={"name": "wsd"}).schedule.decay == 0.2
    assert load(schedule={"name": "constant"}).schedule.end is None


def test_class_defaults_are_those_of_the_tables():
    assert OptimConfig() == load() == OptimConfig(name="adamw", **HYPERPARAMETERS["adamw"])
    assert ScheduleConfig() == ScheduleConfig(name="cosine", **SCHEDULES["cosine"])
    assert config.changed(OptimConfig()) == {}


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_resolved_settings_load_again(name):
    first = load(name=name, schedule={"name": "wsd"})
    assert load(**config.to_dict(first)) == first


@pytest.mark.parametrize(
    "raw, words",
    [
        ({"name": "sgd", "b2": 0.9}, ["b2=0.9", "ignored", "sgd", "adamw"]),
        ({"name": "lion", "eps": 1e-8}, ["eps", "lion"]),
        ({"momentum": 0.9}, ["momentum", "adamw", "sgd"]),
        ({"schedule": {"decay": 0.1}}, ["schedule", "decay", "cosine", "wsd"]),
        ({"schedule": {"name": "constant", "end": 0.1}}, ["end", "constant"]),
        ({"name": "adamv"}, ["adamv", "did you mean adamw"]),
        ({"name": ["adamw"]}, ["name"]),
        ({"schedule": {"name": "cosin"}}, ["did you mean cosine"]),
        ({"lr": 0}, ["lr"]),
        ({"b1": 1.0}, ["b1"]),
        ({"clip": -1}, ["clip"]),
        ({"betas": 1}, ["betas"]),
    ],
)
def test_refused(raw, words):
    with pytest.raises(SettingsError) as error:
        load(**raw)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_overrides_switch_the_optimizer():
    resolved = config.load(OptimConfig, {}, ["name=sgd", "lr=1e-2", "momentum=0.5"])
    assert (resolved.name, resolved.lr, resolved.momentum, resolved.eps) == ("sgd", 0.01, 0.5, None)


def test_an_optimizer_from_outside_may_take_any_hyperparameter():
    outside = load(name="some.module:NAME", momentum=0.3)
    assert (outside.momentum, outside.b1) == (0.3, None)
