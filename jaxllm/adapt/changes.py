"""The list of changes that a model's weights have been through: what a checkpoint must know to describe its arrays."""

from jaxllm.adapt.gather import several_plan
from jaxllm.adapt.lora import TRAINABLE, LoraConfig, float_plan, lora_plan, merge_plan
from jaxllm.adapt.prune import PruneConfig, prune_plan
from jaxllm.adapt.qat import qat_plan, store_plan
from jaxllm.adapt.quantize import QuantizeConfig, quantize_plan
from jaxllm.config import settings
from jaxllm.model.build import Model
from jaxllm.model.change import Plan, changed


@settings
class Change:
    """One thing that is done to weights."""

    quantize: QuantizeConfig | None = None
    """Weights stored in another number format."""
    lora: LoraConfig | None = None
    """Adapters over weights."""
    several: int | None = None
    """So many adapters in the place of each, chosen row by row (`adapt.gather`)."""
    qat: QuantizeConfig | None = None
    """Weights that train as floats and are used rounded, for a number format to store them in."""
    prune: PruneConfig | None = None
    """Weights of which some are zero, and stay so in training."""
    store: bool = False
    """What was trained for a number format, stored in it."""
    merge: bool = False
    """Adapters merged into what was under them; both together are plain float32 then."""
    plain: bool = False
    """All weights made plain float32 arrays."""

    def __post_init__(self):
        if sum(map(bool, vars(self).values())) != 1:
            raise ValueError(f"a change is one of {', '.join(vars(self))}")

    def __str__(self) -> str:
        """Its name, with the number formats that it brings: `quantize int8`."""
        name, value = next((name, value) for name, value in vars(self).items() if value)
        return " ".join([name, *dict.fromkeys(rule.format for rule in getattr(value, "rules", ()))])

    def plan(self, model: Model) -> Plan:
        """What it does to each weight of `model`. Raises SettingsError where it does not fit the model."""
        if self.quantize is not None:
            return quantize_plan(model, self.quantize)
        if self.lora is not None:
            return lora_plan(model, self.lora)
        if self.qat is not None:
            return qat_plan(model, self.qat)
        if self.prune is not None:
            return prune_plan(model, self.prune)
        if self.store:
            return store_plan(model)
        if self.several is not None:
            return several_plan(model, self.several)
        return merge_plan(model) if self.merge else float_plan(model)


Changes = tuple[Change, ...]


def trainable(pattern: str | None, changes: Changes) -> str:
    """The pattern of what trains: as it was given, or all weights, or the adapters where there are any."""
    if pattern is not None:
        return pattern
    adapted = False
    for one in changes:
        adapted = one.lora is not None or (adapted and (one.quantize or one.prune) is not None)
    return TRAINABLE if adapted else "**"


def after(model: Model, changes: Changes) -> Model:
    """The model once all changes are made, one after another."""
    for one in changes:
        model = changed(model, one.plan(model))
    return model
