"""Quantisation-aware training: the plan that rounds weights wherever they are used, and the one that stores them so."""

import dataclasses

from jaxllm.adapt.quantize import QuantizeConfig, check_group, rules_by_path
from jaxllm.errors import SettingsError
from jaxllm.model.build import Model
from jaxllm.model.change import Plan, weights_of
from jaxllm.weights.form import Form
from jaxllm.weights.rounded import Rounded


@dataclasses.dataclass(frozen=True)
class Round:
    """The step of a plan: one float weight, used rounded."""

    form: Form
    format: str
    group: int
    symmetric: bool
    activations: str | None

    def __call__(self, weight, key):
        return Rounded(weight, self.form, self.format, self.group, self.symmetric, self.activations)


def qat_plan(model: Model, config: QuantizeConfig) -> Plan:
    """The plan that trains weights for a number format. Raises SettingsError for what only finished weights have."""
    rules = rules_by_path(model, config)
    for rule in rules.values():
        if rule.double or rule.method != "nearest":
            raise SettingsError(
                f"qat: double={rule.double}, method={rule.method}: weights in training are rounded to nearest; leave "
                "both out, and quantise again afterwards if need be"
            )

    def plan(path: str, form: Form):
        if (rule := rules.get(path)) is None:
            return None
        return Round(form, rule.format, check_group(path, form, rule), rule.symmetric, config.activations)

    return plan


@dataclasses.dataclass(frozen=True)
class Store:
    """The step of a plan: what was trained for a number format, stored in it."""

    def __call__(self, weight: Rounded, key):
        return weight.quantized()


def store_plan(model: Model) -> Plan:
    """The plan that stores weights in the format that they were trained for."""
    found = weights_of(model.abstract)
    if not any(isinstance(weight, Rounded) for weight in found.values()):
        raise SettingsError("no weight was trained for a number format (qat); use jaxllm quantize --format")
    return lambda path, form: Store() if isinstance(found[path], Rounded) else None
