"""Writes quantised weights as compressed-tensors: see `compressed` for what each tensor is."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxllm.errors import SettingsError
from jaxllm.families.base import Family, stored_shape
from jaxllm.hf.coded import Coded
from jaxllm.hf.packing import pack, unsigned
from jaxllm.hf.places import Place, local_shapes, places, unpadded
from jaxllm.model.build import Params
from jaxllm.model.change import weights_of
from jaxllm.model.spec import ModelConfig
from jaxllm.weights.quantized import Quantized

log = logging.getLogger("jaxllm")
BITS = {"int8": 8, "int4": 4}


class Scheme(NamedTuple):
    """How one matrix is stored."""

    bits: int
    group: int | None
    """None: one scale for all inputs of an output."""
    symmetric: bool
    activations: str | None

    def describe(self, targets: list[str]) -> dict[str, Any]:
        """An entry of `config_groups`."""
        strategy = "channel" if self.group is None else "group"
        weights = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "strategy": strategy}
        rounded = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        return {
            "targets": targets,
            "weights": weights | {"group_size": self.group, "dynamic": False},
            "input_activations": rounded if self.activations else None,
            "output_activations": None,
            "format": "int-quantized" if self.activations else "pack-quantized",
        }


def quantization_config(family: Family, config: ModelConfig, params: Params) -> dict[str, Any] | None:
    """What config.json says of quantised weights; None for plain ones. Raises SettingsError for what it cannot say."""
    leaves = weights_of(params)
    shapes = {path: unpadded(path, leaf.shape, config) for path, leaf in leaves.items()}
    sizes = {w.group for w in leaves.values() if isinstance(w, Quantized) and w.group != w.form.inputs}
    schemes: dict[Scheme, list[str]] = {}
    plain = {family.top[-1].theirs[1:].removesuffix(".weight")}  # the head, also where it is the embedding
    for place in places(family, config, shapes):
        module = place.name.removesuffix(".weight")
        weight = leaves[next(iter(place.paths.values()))]
        if place.map.ours == "embed":
            if isinstance(weight, Quantized):
                log.warning("%s is written as the floats that its codes stand for: a lookup takes no others", module)
        elif isinstance(weight, Quantized):
            schemes.setdefault(_scheme(place, weight, local_shapes(place, shapes), sizes), []).append(module)
        elif len(stored_shape(place.map, local_shapes(place, shapes))) == 2:
            plain.add(module)
    if not schemes:
        return None
    plain -= {module for modules in schemes.values() for module in modules}
    formats = {scheme.describe([])["format"] for scheme in schemes}
    several, zeros = len(schemes) > 1, not all(scheme.symmetric for scheme in schemes)
    if several and zeros:
        log.warning("transformers 5 cannot load zero points where matrices are stored in several ways")
    # It expects packed zeros in the shape of unpacked ones, unless it dequantises while it loads.
    return ({"dequantize": True} if zeros and not several else {}) | {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": scheme.describe(modules if several else ["Linear"])
            for i, (scheme, modules) in enumerate(schemes.items())
        },
        "ignore": sorted(plain),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _scheme(place: Place, weight: Quantized, shapes: Mapping[str, tuple[int, ...]], sizes: set[int]) -> Scheme:
    """`sizes`: of groups that are not whole rows; where a row is one of them, it belongs to their scheme."""
    plainly = "make the weights plain first (jaxllm merge)"
    if weight.format not in BITS:
        raise SettingsError(
            f"{place.name} is stored as {weight.format}, which to=hf does not write (known: {', '.join(BITS)}); "
            f"{plainly}"
        )
    inputs, group = weight.form.inputs, weight.group
    if weight.order is not None and group != inputs:
        raise SettingsError(
            f"{place.name} is stored with its inputs reordered (ordered=true), which readers of compressed-tensors "
            f"have given up; quantise without it, or {plainly}"
        )
    rows = sum(np.prod(shape, dtype=int) for shape in shapes.values()) // inputs
    if stored_shape(place.map, shapes) != (rows, inputs):
        raise SettingsError(
            f"{place.name} is stored with inputs first or with experts in one tensor, and compressed-tensors is for "
            f"matrices of outputs by inputs; {plainly}"
        )
    whole = group == inputs and group not in sizes
    return Scheme(BITS[weight.format], None if whole else group, weight.zero is None, weight.activations)


def with_plain_table(family: Family, tensors: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The tensors with the embedding as floats."""
    embed = family.base + family.top[0].theirs
    for name, value in tensors:
        yield name, value.map() if name == embed and isinstance(value, Coded) else value


def stored_codes(name: str, coded: Coded, floats: Callable[[str, np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of one matrix. `floats`: makes them of the dtype of scales."""
    module, bits, codes = name.removesuffix(".weight"), BITS[coded.format], coded.read()
    out = {f"{module}.weight_scale": floats(f"{module}.weight_scale", codes.scale)}
    if coded.activations:
        return out | {f"{module}.weight": codes.codes}
    out[f"{module}.weight_packed"] = pack(unsigned(codes.codes, bits), bits)
    out[f"{module}.weight_shape"] = np.array(coded.shape, np.int64)
    if codes.zero is not None:
        out[f"{module}.weight_zero_point"] = pack(unsigned(codes.zero, bits).T, bits).T
    return out
