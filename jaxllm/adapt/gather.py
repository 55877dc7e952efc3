"""Several adapters over one base in one tree of weights, so that each row of a batch can have its own."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxllm.adapt.lora import LoraConfig, config_of
from jaxllm.errors import SettingsError
from jaxllm.model.build import Model, Params
from jaxllm.model.change import Plan, is_weight, weights_of
from jaxllm.weights.lora import Lora

ARRAYS = ("lora_a", "lora_b", "lora_magnitude")


@dataclasses.dataclass(frozen=True)
class Copies:
    """The step of a plan: so many copies of an adapter, along an axis of its own."""

    adapters: int

    def __call__(self, weight: Lora, key) -> Lora:
        parts = {name: getattr(weight, name) for name in ARRAYS}
        many = {name: jnp.broadcast_to(x, (self.adapters, *x.shape)) for name, x in parts.items() if x is not None}
        return dataclasses.replace(weight, adapters=self.adapters, **many)


def several_plan(model: Model, adapters: int) -> Plan:
    """The plan that makes several adapters of each one. Raises SettingsError where there are none, or several."""
    found = weights_of(model.abstract)
    loras = [weight for weight in found.values() if isinstance(weight, Lora)]
    if not loras or loras[0].several:
        raise SettingsError(
            f"several={adapters}: the model must have one adapter over its weights, not none or several"
        )
    return lambda path, form: Copies(adapters) if isinstance(found[path], Lora) else None


def gather(adapted: Sequence[Params]) -> tuple[LoraConfig, Params]:
    """Adapters that were trained one by one over the same weights, side by side, and the settings of their sizes.

    Adapters may differ in rank, scale and the weights that they lie over: ranks are filled up with zeros, scales go
    into b. Raises SettingsError where what they lie over differs, or where only some are DoRA.
    """
    trees = [weights_of(params) for params in adapted]
    if any(tree.keys() != trees[0].keys() for tree in trees):
        raise SettingsError("these adapters lie over models of different layers; they cannot be used together")
    sizes, out, dora = {}, [], False
    for path in trees[0]:
        found = [tree[path] for tree in trees]
        _check_same(path, [weight.base if isinstance(weight, Lora) else weight for weight in found])
        loras = [weight if isinstance(weight, Lora) else None for weight in found]
        if not any(loras):
            out.append(found[0])
            continue
        together = _side_by_side(path, loras)
        dora |= together.lora_magnitude is not None
        sizes[path] = together.lora_a.shape[-1], float(together.lora_a.shape[-1])
        out.append(together)
    if not sizes:
        raise SettingsError("none of these models has an adapter")
    params = jax.tree.structure(adapted[0], is_leaf=is_weight).unflatten(out)
    return config_of(sizes, "dora" if dora else "lora"), params


def _check_same(path: str, bases: list) -> None:
    first, *others = (jax.tree.leaves(base) for base in bases)
    for i, other in enumerate(others, 1):
        shapes = [[x.shape for x in leaves] for leaves in (first, other)]
        if shapes[0] != shapes[1]:
            raise SettingsError(f"{path}: adapters 0 and {i} lie over weights of shapes {shapes[0]} and {shapes[1]}")
        if not all(x is y or bool(jnp.array_equal(x, y)) for x, y in zip(first, other, strict=True)):
            raise SettingsError(
                f"{path}: adapters 0 and {i} lie over different weights; adapters can be used together that were "
                "trained over the same model, with other weights frozen"
            )


def _side_by_side(path: str, loras: list[Lora | None]) -> Lora:
    one = next(lora for lora in loras if lora is not None)
    if one.several:
        raise SettingsError(f"{path} holds several adapters already; give the adapters one by one")
    dora = [lora is not None and lora.lora_magnitude is not None for lora in loras]
    if any(dora) and not all(dora):
        raise SettingsError(f"{path}: DoRA adapters can be used together only with DoRA adapters over the same weights")
    rank = max(lora.lora_a.shape[-1] for lora in loras if lora is not None)
    parts = [_parts(lora, one, rank) for lora in loras]
    arrays = {name: jnp.stack([part[name] for part in parts], int(one.stacked)) for name in parts[0]}
    return dataclasses.replace(one, scale=1.0, dropout=0.0, adapters=len(loras), **arrays)


def _parts(lora: Lora | None, like: Lora, rank: int) -> dict:
    """The arrays with ranks filled up and the scale in b; zeros for none."""
    if lora is None:
        return {name: jnp.zeros_like(part) for name, part in _parts(like, like, rank).items()}
    a, b = lora.lora_a, lora.lora_b
    more = [(0, 0)] * (a.ndim - 2)
    a = jnp.pad(a, [*more, (0, 0), (0, rank - a.shape[-1])])
    b = jnp.pad(lora.scale * b, [*more, (0, rank - b.shape[-2]), (0, 0)])
    parts = {"lora_a": a, "lora_b": b}
    return parts if lora.lora_magnitude is None else parts | {"lora_magnitude": lora.lora_magnitude}
