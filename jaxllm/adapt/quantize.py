"""Settings of quantisation, and the plan that rounds a model's weights to nearest."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from jaxllm.config import settings
from jaxllm.errors import SettingsError
from jaxllm.model.build import Model
from jaxllm.model.change import Plan, choose, weights_of
from jaxllm.weights.form import Form
from jaxllm.weights.formats import get_format
from jaxllm.weights.lora import Lora
from jaxllm.weights.pruned import Pruned
from jaxllm.weights.quantized import Quantized, quantize
from jaxllm.weights.rounded import Rounded

#: What is quantised where nothing else is said: the matrices of the layers, but for the router, which is small and
#: decides.
LAYERS = "prefix/**,layers/**,suffix/**"
TABLES = "embed,head"


@settings
class QuantizeRule:
    """A number format for the weights that a pattern chooses."""

    pattern: str = LAYERS
    """Paths of the weights; vectors (norms, biases) and routers stay as they are."""
    format: str
    """int8, int4, nf4, int2, fp8, float (left as it is), or package.module:NAME."""
    group: int | None = None
    """Inputs that share a scale; null takes the format's own: 64 for int4 and nf4, 32 for int2, all for int8, fp8."""
    double: bool = False
    """Scales in 8 bits, too."""
    symmetric: bool = True
    """Whether 0 is the code 0; false gives each group a zero of its own (int8 and int4 alone)."""
    method: Literal["nearest", "gptq", "awq"] = "nearest"
    """nearest rounds each weight by itself; gptq and awq make up for its error as calibration text shows it."""
    ordered: bool = False
    """gptq: the inputs of the largest activations are rounded first, and stored in that order (act_order)."""

    def __post_init__(self):
        if self.ordered and self.method != "gptq":
            raise ValueError(f"ordered=true is for method=gptq, and method={self.method} would ignore it")
        if not self.symmetric and (self.double or self.format not in ("int8", "int4")):
            raise ValueError(
                f"format={self.format}, double={self.double}: symmetric=false is for int8 and int4, without double"
            )
        if self.group is not None and self.group < 1:
            raise ValueError(f"group={self.group} must be at least 1")
        if self.format != "float":
            get_format(self.format)
        if self.format == "float" and (self.group or self.double or self.method != "nearest"):
            raise ValueError("format=float leaves weights as they are, and would ignore group, double and method")


@settings
class QuantizeConfig:
    """How the weights of a model are stored, and how products with them are taken."""

    rules: tuple[QuantizeRule, ...]
    """The first rule whose pattern chooses a weight decides; weights that none chooses stay as they are."""
    activations: str | None = None
    """int8 quantises activations row by row and takes integer products (w8a8); null computes with floats. Lookups, and
    experts on accelerators, are computed with floats in any case."""

    def __post_init__(self):
        if not self.rules:
            raise ValueError("rules is empty: nothing would be quantised")
        if self.activations not in (None, "int8"):
            raise ValueError(f"activations={self.activations!r}: int8 or null")
        for rule in self.rules:
            integer = rule.format == "float" or get_format(rule.format).integer
            if self.activations and not (integer and rule.symmetric):
                raise ValueError(f"activations=int8 needs symmetric integers, not {rule.format}; use int8 or int4")

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is needed."""
        return any(rule.method != "nearest" for rule in self.rules)


@dataclasses.dataclass(frozen=True)
class RoundToNearest:
    """The step of a plan: one weight, rounded to nearest."""

    form: Form
    format: str
    group: int | None
    double: bool
    symmetric: bool
    ordered: bool
    activations: str | None
    method: str = "nearest"

    @property
    def stand_in(self) -> str | None:
        """With a method that needs text this step only says what comes out of it; why it cannot make that itself."""
        if self.method == "nearest":
            return None
        return f"method={self.method} needs calibration text: use jaxllm quantize --calibrate FILE, or method=nearest"

    def __call__(self, weight, key):
        options = dict(group=self.group, double=self.double, symmetric=self.symmetric, activations=self.activations)
        rounded = quantize(weight, self.form, self.format, **options)
        if not self.ordered:
            return rounded
        order = jnp.broadcast_to(jnp.arange(self.form.inputs), (*self.form.experts, self.form.inputs))
        return dataclasses.replace(rounded, order=order)


def quantize_plan(model: Model, config: QuantizeConfig) -> Plan:
    """The plan that rounds to nearest, and that says what comes out of every other method.

    Raises SettingsError for a pattern that chooses nothing, a group that does not divide, or weights that are
    quantised or adapted already.
    """
    rules = rules_by_path(model, config)

    def plan(path: str, form: Form):
        if (rule := rules.get(path)) is None:
            return None
        group = check_group(path, form, rule)
        how = (rule.double, rule.symmetric, rule.ordered, config.activations, rule.method)
        return RoundToNearest(form, rule.format, group, *how)

    return plan


def rules_by_path(model: Model, config: QuantizeConfig) -> dict[str, QuantizeRule]:
    """The rule of each weight that is to be quantised. Raises SettingsError as `quantize_plan` does."""
    found: dict[str, QuantizeRule] = {}
    for rule in config.rules:
        found = dict.fromkeys(choose(model, rule.pattern, "quantize"), rule) | found
    rules = {path: rule for path, rule in found.items() if rule.format != "float"}
    weights = weights_of(model.abstract)
    for path in rules:
        if isinstance(weights[path], Quantized):
            raise SettingsError(
                f"{path} is quantised already ({weights[path].format}); quantise the model that this one was made from"
            )
        if isinstance(weights[path], Rounded):
            raise SettingsError(
                f"{path} was trained for {weights[path].format} (qat) and is still used rounded: jaxllm quantize "
                "without --format stores it so; jaxllm merge makes it plain, for another format"
            )
        if isinstance(weights[path], Lora):
            raise SettingsError(f"{path} has an adapter; merge it first (jaxllm merge), then quantise")
        if isinstance(weights[path], Pruned):
            raise SettingsError(
                f"{path} is pruned; make it plain first (jaxllm merge): rounding to nearest leaves zeros as they are, "
                "in all formats but int2"
            )
    return rules


def check_group(path: str, form: Form, rule: QuantizeRule) -> int:
    """Inputs that share a scale. Raises SettingsError for a group that does not divide, with those that do."""
    kind = get_format(rule.format)
    group = rule.group or kind.group or form.inputs
    if form.inputs % group or group % kind.per_byte:
        fits = [n for n in (16, 32, 64, 128, 256) if form.inputs % n == 0] or [
            n for n in range(kind.per_byte, form.inputs + 1, kind.per_byte) if form.inputs % n == 0
        ][:8]
        raise SettingsError(
            f"{path}: group={group} does not divide its {form.inputs} inputs; "
            f"groups that do: {', '.join(map(str, fits))}"
        )
    return group
