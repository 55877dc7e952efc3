"""Between matrices of codes as they are stored and our quantised weights, and what that says of a model.

Shapes: O outputs, I inputs, G groups.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxllm.adapt.changes import Change, Changes
from jaxllm.adapt.quantize import QuantizeConfig, QuantizeRule
from jaxllm.errors import DataError, SettingsError
from jaxllm.families.base import Family
from jaxllm.hf.coded import Coded, Codes, join, lines_for, split
from jaxllm.hf.factors import Lines
from jaxllm.hf.places import Place, based, places, rope_dims, stored_forms, unpadded
from jaxllm.model.build import Model
from jaxllm.weights.form import Form
from jaxllm.weights.formats import get_format
from jaxllm.weights.quantized import Quantized


def changes_of(model: Model, family: Family, tensors: Mapping[str, Any]) -> Changes:
    """What makes a plain model one whose weights are of the types that a folder stores; nothing for plain floats.

    Raises SettingsError for layers of one stack that are stored in different ways, DataError for a wrong shape.
    """
    if not any(isinstance(tensor, Coded) for tensor in tensors.values()):
        return ()
    shapes = {path: unpadded(path, shape, model.config) for path, (_, shape) in model.weights.items()}
    known, found = stored_forms(model), {}
    for place in places(based(family, tensors), model.config, shapes):
        if place.name not in tensors:
            continue  # who reads it will say so
        coded = tensors[place.name]
        for path in place.paths.values():
            found.setdefault(path, []).append((place, coded if isinstance(coded, Coded) else None))
    rules: dict[QuantizeRule, list[str]] = {}
    for path, stored in found.items():
        if any(coded is not None for _, coded in stored):
            rules.setdefault(_rule(path, stored, known, rope_dims(model.config)), []).append(path)
    rounded = {c.activations for stored in found.values() for _, c in stored if c is not None}
    if len(rounded) > 1:
        raise SettingsError("only some of the matrices have activations in int8; here all of them have, or none")
    chosen = tuple(dataclasses.replace(rule, pattern=",".join(paths)) for rule, paths in rules.items())
    return (Change(quantize=QuantizeConfig(rules=chosen, activations=rounded.pop())),)


def _rule(path: str, stored: list[tuple[Place, Coded | None]], known: Mapping[str, Form], rope: int) -> QuantizeRule:
    """The rule of one weight, whose layers and experts are these."""
    for place, coded in stored:
        if coded is not None:
            fitting(place, coded, known, rope)
    kinds = {(c.format, c.groups) if c is not None else ("float", 0): place.name for place, c in stored}
    if len(kinds) > 1:
        named = "; ".join(f"{name}: {kind}, {groups} groups" for (kind, groups), name in kinds.items())
        raise SettingsError(
            f"{path} is one stack here, and its parts are stored in different ways ({named}); use the model's weights "
            "in bfloat16"
        )
    codes = [coded for _, coded in stored]
    kind, groups = codes[0].format, codes[0].groups
    whole = groups == 1 and get_format(kind).group is None
    ordered = any(coded.ordered for coded in codes)
    return QuantizeRule(
        format=kind,
        group=None if whole else codes[0].inputs // groups,
        symmetric=all(coded.symmetric for coded in codes),
        method="gptq" if ordered else "nearest",
        ordered=ordered,
    )


def fitting(place: Place, coded: Coded, known: Mapping[str, Form], rope: int) -> Lines:
    """How its sides become ours. Raises DataError where it is not of the shape that the model's settings give it."""
    lines = lines_for(place, known, rope)
    (_, inputs), (outputs, _) = lines.shapes(1)
    if coded.shape != (outputs, inputs):
        raise DataError(
            f"tensors of {place.name} make {coded.outputs} x {coded.inputs} codes, and config.json makes it "
            f"{outputs} x {inputs}; the two are not of one model"
        )
    return lines


def read_coded(place: Place, coded: Coded, model: Model, abstract: Mapping[str, Any]) -> dict[str, Quantized]:
    """`{the map's own path: weight}` of one stored matrix, with arrays in host memory."""
    known, rope = stored_forms(model), rope_dims(model.config)
    for whole in place.paths.values():
        if not isinstance(abstract[whole], Quantized):
            raise SettingsError(
                f"{place.name} is stored in {coded.format}, and {whole} is wanted in floats; make it plain first "
                "(jaxllm merge)"
            )
    pieces = split(fitting(place, coded, known, rope), coded.read())
    return {path: _weight(codes, abstract[place.paths[path]]) for path, codes in pieces.items()}


def _weight(codes: Codes, like: Quantized) -> Quantized:
    """`like` says which arrays there are; what these codes lack is what changes nothing."""
    zero, order = like.zero, like.order
    if zero is not None:
        zero = np.zeros_like(codes.scale) if codes.zero is None else codes.zero
    if order is not None:
        order = np.arange(codes.codes.shape[1], dtype=np.int32) if codes.order is None else codes.order
    packed = np.asarray(get_format(like.format).pack(np.ascontiguousarray(codes.codes)))
    return dataclasses.replace(like, codes=packed, scale=codes.scale, zero=zero, order=order)


def to_coded(place: Place, ours: Mapping[str, Quantized], config) -> Coded:
    """The stored matrix that holds weights (by the map's own paths), in host memory. Raises SettingsError."""
    first = next(iter(ours.values()))
    if len({(w.format, w.activations) for w in ours.values()}) > 1:
        raise SettingsError(f"{place.name} holds {', '.join(ours)}, which are quantised in different ways")
    forms = {path: _stored_form(path, w.form, config) for path, w in ours.items()}
    lines = lines_for(place, {place.paths[path]: form for path, form in forms.items()}, rope_dims(config))
    codes = join(lines, {path: _codes(w, place.index, forms[path].outputs) for path, w in ours.items()}, place.name)
    how = dict(symmetric=codes.zero is None, ordered=codes.order is not None, activations=first.activations)
    return Coded(place.name, first.format, *codes.codes.shape, codes.scale.shape[1], lambda: codes, **how)


def _stored_form(path: str, form: Form, config) -> Form:
    """Without the rows that pad a vocabulary; those tables have their outputs first."""
    return dataclasses.replace(form, shape=unpadded(path, form.shape, config))


def _codes(weight: Quantized, index: tuple[int, ...], outputs: int) -> Codes:
    weight = dataclasses.replace(weight, scale=weight.scales())
    one = jax.device_get(jax.tree.map(lambda x: x[index] if index else x, weight))
    codes = np.asarray(get_format(weight.format).unpack(one.codes))[:outputs]
    zero, order = None if one.zero is None else one.zero[:outputs], one.order
    if order is not None and one.scale.shape[-1] == 1:  # no group to keep together
        codes, order = codes[:, np.argsort(order)], None
    return Codes(codes, one.scale[:outputs], zero, order)
