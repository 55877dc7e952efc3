"""Settings of the optimizer and of the learning-rate schedule. Loads no jax."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import ArgsKwargs

from jaxllm.config import settings
from jaxllm.errors import nearest

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]

#: What each schedule takes beside `warmup`, with its default.
SCHEDULES = {
    "cosine": {"end": 0.1},
    "linear": {"end": 0.0},
    "constant": {},
    "wsd": {"end": 0.0, "decay": 0.2},
}

#: What each optimizer takes beside `lr`, `weight_decay`, `clip` and `schedule`, with its default.
HYPERPARAMETERS = {
    "adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8},
    "adafactor": {"momentum": 0.0, "eps": 1e-30},
    "lion": {"b1": 0.9, "b2": 0.99},
    "muon": {"momentum": 0.95, "b1": 0.9, "b2": 0.95, "eps": 1e-8},
    "sgd": {"momentum": 0.9},
}


def _fill(data: Any, default: str, table: dict[str, dict], kind: str) -> Any:
    """Puts in the defaults of the chosen name, and refuses what that name would ignore.

    A name from outside the tree (`package.module:NAME`) may be given any of them, and gets None for the others.
    """
    given = data.kwargs if isinstance(data, ArgsKwargs) else data
    if not isinstance(given, dict):
        return data
    given = dict(given or {})
    name, known = given.get("name", default), {key for row in table.values() for key in row}
    if not isinstance(name, str) or (name not in table and ":" not in name):
        raise ValueError(f"name={name!r}: no such {kind}{nearest(name, table)}")
    taken = table.get(name, dict.fromkeys(known))
    for key in sorted(known):
        if key not in taken and given.get(key) is not None:
            users = ", ".join(n for n, row in table.items() if key in row)
            raise ValueError(f"{key}={given[key]!r} would be ignored by {kind} {name} (used by: {users}); remove it")
        if given.get(key) is None:
            given[key] = taken.get(key)
    return given


@settings
class ScheduleConfig:
    """Learning rate over the steps: a linear warmup, then one of four shapes."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warmup: cosine, linear, constant or wsd (warmup, stable, decay)."""
    warmup: Annotated[int, Field(ge=0)] | None = None
    """Steps of linear warmup; null means a twentieth of all steps."""
    end: Share | None = 0.1
    """Learning rate at the end, as a fraction of the peak (cosine 0.1, linear 0, wsd 0)."""
    decay: Share | None = None
    """Share of all steps in the final decay (wsd 0.2)."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        return _fill(data, "cosine", SCHEDULES, "schedule")


@settings
class OptimConfig:
    """The optimizer. What the chosen one would ignore is refused; what is left out gets its own default."""

    name: str = "adamw"
    """adamw, adafactor, lion, muon, sgd, or package.module:NAME for one from outside."""
    lr: Positive = 3e-4
    """Peak learning rate."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over the steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay, times the learning rate; on matrices only (embeddings too; no norms, biases, sinks)."""
    clip: Positive | None = 1.0
    """Largest global norm of the gradient; null turns clipping off."""
    b1: Decay | None = 0.9
    """Decay of the first moment (adamw 0.9, lion 0.9, muon's Adam part 0.9)."""
    b2: Decay | None = 0.95
    """Decay of the second moment (adamw 0.95, muon's Adam part 0.95); of the momentum in lion (0.99)."""
    eps: Positive | None = 1e-8
    """Added to the denominator (adamw 1e-8, muon 1e-8) or to the squared gradient (adafactor 1e-30)."""
    momentum: Decay | None = None
    """Momentum (sgd 0.9, muon 0.95); for adafactor a moving average of the updates (0: none kept)."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        return _fill(data, "adamw", HYPERPARAMETERS, "optimizer")
