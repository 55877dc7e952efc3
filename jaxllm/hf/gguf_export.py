"""Writes a model as a GGUF file that llama.cpp loads, tensor by tensor."""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import diff, to_dict
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import ResourceError, SettingsError
from jaxllm.families.base import stored_shape
from jaxllm.families.export import config_json, essence
from jaxllm.families.keys import Keys
from jaxllm.families.registry import FAMILIES, read_config
from jaxllm.hf.coded import Coded
from jaxllm.hf.gguf_arch import ARCHITECTURES, Architecture, Raw
from jaxllm.hf.gguf_blocks import Blocks, check_blocks, to_blocks
from jaxllm.hf.gguf_file import library
from jaxllm.hf.gguf_forms import Line
from jaxllm.hf.gguf_rope import canonical, factor_tensors
from jaxllm.hf.gguf_tokenizer import write_tokenizer
from jaxllm.hf.places import Place, local_shapes, places, unpadded
from jaxllm.hf.weights import write
from jaxllm.model.build import Params
from jaxllm.model.change import weights_of
from jaxllm.model.spec import ModelConfig
from jaxllm.weights.quantized import Quantized

#: dtype: (type of the matrices, llama.cpp's number for such a file).
DTYPES = {"f32": ("F32", 0), "f16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2)}
#: What numbers of these types can hold: scales are in half precision.
LARGEST = {"F16": 65504, "Q8_0": 65504 * 127, "Q4_0": 65504 * 8}
#: Matrices that llama.cpp wants in float32: they are small, and decide much.
PRECISE = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight")


def export_gguf(
    config: ModelConfig, params: Params, tokenizer: Tokenizer, out: str | Path, *, dtype: str = "f32"
) -> str:
    """Writes the new file `out`; gives the name of its architecture.

    `dtype`: f32, f16, bf16, q8_0 or q4_0 for matrices (the last two: f16 where rows do not divide by 32); vectors are
    f32. Matrices of codes keep them (`gguf_blocks`). Raises SettingsError for a model that no architecture of llama.cpp
    computes, codes that it has no type for, or where `out` exists; ResourceError for a disk that cannot take it;
    MissingExtra without the `gguf` library.
    """
    gguf, out = library(), Path(out)
    if dtype not in DTYPES:
        raise SettingsError(f"dtype={dtype!r}: known are {', '.join(DTYPES)}")
    if out.exists():
        raise SettingsError(f"{out} exists, and nothing is written over; choose another --out")
    architecture, raw, metadata = architecture_for(config)
    coded = check_blocks(weights_of(params))
    described = write_tokenizer(tokenizer, config.vocab)
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_file_type(dict(DTYPES.values())[min(coded)] if coded else DTYPES[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata.items():
        _add(writer, f"{architecture.name}.{key}", value)
    for key, value in described.items():
        _add(writer, key, value)
    kinds = {}
    for name, value in planned(architecture, config, params, raw):
        kinds[name] = _kind(gguf, name, value, DTYPES[dtype][0])
        block, size = gguf.GGML_QUANT_SIZES[kinds[name]]
        nbytes = math.prod(value.shape) // block * size
        writer.add_tensor_info(name, value.shape, np.dtype(np.float32), nbytes, kinds[name])
    _write(writer, out, stored(architecture, config, params, raw), lambda name, x: _cast(gguf, name, x, kinds[name]))
    return architecture.name


def _write(writer, out: Path, tensors: Iterator[tuple[str, np.ndarray]], cast: Callable) -> None:
    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, value in tensors:
            writer.write_tensor_data(cast(name, value))
        writer.close()
        partial.rename(out)
    except OSError as error:
        raise ResourceError(f"{out} cannot be written ({error.strerror or error}); choose another --out") from None
    finally:
        partial.unlink(missing_ok=True)


def _add(writer, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def architecture_for(config: ModelConfig) -> tuple[Architecture, Raw, Raw]:
    """`(architecture, config.json, metadata)` of the first architecture that computes what a model does.

    What is written is read back and compared, so nothing can get lost on the way. Raises SettingsError with the
    settings that have no counterpart, in the architecture that comes nearest.
    """
    config = canonical(config)
    wanted, home, best = _by_layer(config), _family(config), None
    for candidate in ARCHITECTURES:
        try:
            raw = FAMILIES[candidate.family].write(config)
            metadata = candidate.write(raw)
            found = _by_layer(canonical(_read_back(candidate, metadata, config, raw)))
        except (ValueError, TypeError, AttributeError, KeyError):
            continue  # it cannot even say the shape of this model
        changes = {key: pair for key, pair in diff(found, wanted).items() if not _equal(*pair)}
        if not changes:
            return candidate, raw, metadata
        far = candidate.family != home, len(changes)
        if best is None or far < best[0]:
            best = far, candidate.name, changes
    if best is None:
        raise SettingsError("llama.cpp has no architecture with this shape of model; export it with --to hf")
    raise SettingsError(
        f"no architecture of llama.cpp computes what this model does. In the nearest, {best[1]}, these settings have "
        f"no counterpart: {_listed(best[2])}. Export it with --to hf"
    )


def _by_layer(config: ModelConfig) -> dict[str, Any]:
    """The settings that say what is computed, with those of each layer by its number."""
    config = essence(config)
    plain = {key: value for key, value in to_dict(config).items() if key not in ("prefix", "pattern")}
    return plain | {"layer": [to_dict(spec) for spec in config.layer_specs]}


def _family(config: ModelConfig) -> str | None:
    try:
        return config_json(config)[0].name
    except SettingsError:
        return None


def _listed(changes: dict[str, tuple]) -> str:
    """The first few, and of those that many layers share, the first layer's."""
    unique = {re.sub(r"^layer\.\d+", "", key): key for key in reversed(changes)}
    keys = [key for key in changes if key in unique.values()][:4]
    return "; ".join(f"{key}={changes[key][1]!r} (there {changes[key][0]!r})" for key in keys)


def _equal(a, b) -> bool:
    """Whether two settings are the same in float32, in which a GGUF file keeps them."""
    try:
        return np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32)) and a is not None
    except (TypeError, ValueError):
        return False


class _Held:
    def __init__(self, name: str, value: np.ndarray):
        self.name, self.value, self.shape = name, value, value.shape

    def map(self) -> np.ndarray:
        return self.value


def _read_back(architecture: Architecture, metadata: Raw, config: ModelConfig, raw: Raw) -> ModelConfig:
    spec = config.layer_specs[0]
    present = {
        "output.weight": not config.tied,
        "blk.0.attn_q.bias": spec.attn.qkv_bias,
        "blk.0.ffn_up.bias": spec.mlp is not None and spec.mlp.bias,
    }
    tensors = {name: None for name, there in present.items() if there}
    tensors |= {f"blk.{i}.attn_output.weight": None for i in range(config.layers)}
    tensors |= {name: _Held(name, value) for name, value in factor_tensors(raw).items()}
    keys = Keys(dict(metadata))
    found = architecture.read(keys, tensors)
    keys.finish()
    return read_config(found)[1]


def planned(architecture: Architecture, config: ModelConfig, params: Params, raw: Raw):
    """`(name, zeros or blocks)` of each tensor of the file, in the order of `stored` and of its size."""
    weights = weights_of(params)
    shapes = {path: unpadded(path, leaf.shape, config) for path, leaf in weights.items()}

    def empty(place: Place) -> np.ndarray | Blocks:
        weight = weights[next(iter(place.paths.values()))]
        local = local_shapes(place, shapes)
        if not isinstance(weight, Quantized):
            return np.broadcast_to(np.float32(0), stored_shape(place.map, local))
        outputs = sum(map(math.prod, local.values())) // weight.form.inputs
        return Blocks.planned(weight.format, outputs, weight.form.inputs)

    tensors = ((place.name, empty(place)) for place in places(FAMILIES[architecture.family], config, shapes))
    return _as_stored(architecture, config, tensors, raw)


def stored(architecture: Architecture, config: ModelConfig, params: Params, raw: Raw):
    """`(name, values)` of each tensor of the file, one at a time on the host."""
    tensors = write(FAMILIES[architecture.family], config, params)
    blocks = ((name, to_blocks(name, x) if isinstance(x, Coded) else x) for name, x in tensors)
    return _as_stored(architecture, config, blocks, raw)


def _as_stored(architecture: Architecture, config: ModelConfig, tensors, raw: Raw) -> Iterator[tuple[str, np.ndarray]]:
    target = _targets(architecture, config)
    for (line, i), group in itertools.groupby(tensors, lambda item: target(item[0])):
        values = [value for _, value in group]
        if isinstance(values[0], Blocks):
            yield _stored_blocks(line, values, i)
            continue
        whole = np.stack(values) if "{e}" in line.theirs else values[0]
        for name, value in zip(line.names, line.form.stored(whole), strict=True):
            yield name.format(i=i), value
    yield from factor_tensors(raw).items()


def _stored_blocks(line: Line, values: list[Blocks], layer: str) -> tuple[str, Blocks]:
    """Blocks by the name of the file. Raises SettingsError for a tensor in which not only rows change their places."""
    if line.form.rows is None or len(line.names) > 1 or len({value.kind for value in values}) > 1:
        raise SettingsError(f"{line.theirs} cannot keep its codes in GGUF; make the weights plain first (jaxllm merge)")
    rows = [line.form.rows(value.data) for value in values]
    return line.names[0].format(i=layer), Blocks(values[0].kind, np.stack(rows) if "{e}" in line.theirs else rows[0])


def _targets(architecture: Architecture, config: ModelConfig) -> Callable[[str], tuple[Line, str]]:
    """From a folder's name to its line and layer; all experts of a layer have one."""
    family = FAMILIES[architecture.family]
    lines = {line.theirs: line for line in architecture.lines(config)}
    prefix = family.base + family.prefix
    layer = re.compile(re.escape(prefix).replace(re.escape("{i}"), r"(\d+)"))

    def target(name: str) -> tuple[Line, str]:
        found = layer.match(name)
        if not found:
            return lines[name], ""
        rest = re.sub(r"\.experts\.\d+\.", ".experts.{e}.", name[found.end() :])
        return lines[prefix + rest], found[1]

    return target


def _kind(gguf, name: str, value: np.ndarray | Blocks, wanted: str):
    kinds, shape = gguf.GGMLQuantizationType, value.shape
    if isinstance(value, Blocks):
        return kinds[value.kind]
    if len(shape) == 1 or not name.endswith(".weight") or name.endswith(PRECISE):
        return kinds.F32
    return kinds.F16 if wanted in ("Q8_0", "Q4_0") and shape[-1] % 32 else kinds[wanted]


def _cast(gguf, name: str, value: np.ndarray | Blocks, kind) -> np.ndarray:
    if isinstance(value, Blocks):
        return value.data
    value = np.ascontiguousarray(value, np.float32)
    largest = np.abs(value).max(initial=0)
    if kind.name in LARGEST and not largest < LARGEST[kind.name]:
        raise SettingsError(f"{name} holds {largest}, which is beyond the range of {kind.name}; export in bf16 or f32")
    return gguf.quantize(value, kind)
