"""The learning rate as a function of the step."""

import jax.numpy as jnp
import optax

from jaxllm.errors import SettingsError
from jaxllm.optim.config import OptimConfig


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate of each step, counted from 0 to `steps` - 1.

    Warmup gives peak * (step + 1) / (warmup + 1), so no step is spent at zero and step `warmup` has the peak. From
    there `cosine` (Loshchilov & Hutter 2017, eq. 5) and `linear` reach `end` * peak at step `steps`; `constant` stays;
    `wsd` stays, then falls by 1 - sqrt(x) over the last share `decay` of the steps (Hägele et al. 2024).
    Raises SettingsError when warmup and decay do not fit into `steps`.
    """
    shape, peak = config.schedule, config.lr
    warmup = steps // 20 if shape.warmup is None else shape.warmup
    decay = round((shape.decay or 0.0) * steps)
    if steps < 1 or warmup + decay > steps or warmup == steps:
        raise SettingsError(
            f"a warmup of {warmup} steps and a final decay of {decay} do not fit into {steps} steps; "
            f"set optim.schedule.warmup below {max(steps - decay, 1)}"
        )
    rest = steps - warmup
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=shape.end),
        "linear": lambda: optax.linear_schedule(peak, peak * shape.end, rest),
        "constant": lambda: optax.constant_schedule(peak),
        "wsd": lambda: _stable_decay(peak, shape.end, rest - decay, decay),
    }[shape.name]()
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup])


def first_rate(config: OptimConfig, steps: int) -> float:
    """How far the first step moves a weight, relative to its size or in itself; 0 where it depends on the gradient."""
    by_sign = config.name in ("adamw", "lion", "muon", "adafactor")
    return float(make_schedule(config, steps)(0)) if by_sign else 0.0


def _stable_decay(peak: float, end: float, stable: int, decay: int) -> optax.Schedule:
    def schedule(step):
        x = jnp.clip((step - stable) / max(decay, 1), 0.0, 1.0)
        return peak * (1.0 - (1.0 - end) * jnp.sqrt(x))

    return schedule
