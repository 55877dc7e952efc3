"""Writes a model as a Hugging Face folder that transformers, vLLM and llama.cpp's converter load unchanged."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import ResourceError, SettingsError
from jaxllm.families.export import config_json
from jaxllm.hf.coded import Coded
from jaxllm.hf.compressed_export import quantization_config, stored_codes, with_plain_table
from jaxllm.hf.safetensors import INDEX, SINGLE
from jaxllm.hf.weights import write
from jaxllm.model.build import Params
from jaxllm.model.spec import ModelConfig

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
SHARD = 2 << 30  # bytes of a file; the host holds one at a time


def export_hf(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    dtype: str = "float32",
    family: str | None = None,
    shard: int = SHARD,
) -> str:
    """Writes config.json, weights, tokenizer and generation_config.json into the new folder `out`; gives the family.

    `dtype`: of floats; int8 and int4 weights keep their codes, as compressed-tensors. `family`: the one to write as;
    default: the first one that computes what the model does.
    Raises SettingsError where none does, for weights of another kind, or where `out` exists; ResourceError for a disk
    that cannot take it.
    """
    out = Path(out)
    if dtype not in DTYPES:
        raise SettingsError(f"dtype={dtype!r}: known are {', '.join(DTYPES)}")
    if out.exists():
        raise SettingsError(f"{out} exists, and nothing is written over; choose another --out")
    chosen, raw = config_json(config, family)
    if (codes := quantization_config(chosen, config, params)) is not None:
        raw = raw | {"quantization_config": codes}
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        tensors = with_plain_table(chosen, write(chosen, config, params))
        write_shards(partial, cast(tensors, dtype), shard)
        write_json(partial / "config.json", raw | {"torch_dtype": dtype} | token_ids(tokenizer))
        write_json(partial / "generation_config.json", token_ids(tokenizer))
        tokenizer.to_hf(partial)
        os.rename(partial, out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ResourceError(f"{out} cannot be written ({error.strerror or error}); choose another --out") from None
    return chosen.name


def cast(tensors: Iterable[tuple[str, np.ndarray | Coded]], dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors in a dtype, and those of codes. Raises SettingsError for a number that it cannot hold."""

    def floats(name: str, value: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # said below, with the name
            small = np.ascontiguousarray(value, DTYPES[dtype])
        if not np.isfinite(small.astype(np.float32)).all() and np.isfinite(value.astype(np.float32)).all():
            raise SettingsError(f"{name} holds numbers beyond the range of {dtype}; export in float32 or bfloat16")
        return small

    for name, value in tensors:
        if not isinstance(value, Coded):
            yield name, floats(name, value)
        else:
            yield from stored_codes(name, value, floats).items()


def token_ids(tokenizer: Tokenizer) -> dict:
    """The ids that transformers reads from config.json and generation_config.json."""
    stop = list(tokenizer.stop_ids)
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": stop[0] if len(stop) == 1 else stop or None}
    return ids | {"pad_token_id": tokenizer.pad}


def write_shards(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard: int) -> None:
    """One file, or several of about `shard` bytes with an index."""
    files: list[dict[str, int]] = []
    for held in _shards(tensors, shard):
        safetensors.numpy.save_file(held, folder / f"{len(files)}.part", metadata={"format": "pt"})
        (folder / f"{len(files)}.part").chmod(0o644)  # the library lets nobody else read it
        files.append({name: value.nbytes for name, value in held.items()})
    if len(files) == 1:
        (folder / "0.part").rename(folder / SINGLE)
        return
    where = {}
    for i, names in enumerate(files):
        name = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{i}.part").rename(folder / name)
        where |= dict.fromkeys(names, name)
    total = sum(sum(names.values()) for names in files)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _shards(tensors: Iterable[tuple[str, np.ndarray]], shard: int) -> Iterator[dict[str, np.ndarray]]:
    held, size = {}, 0
    for name, value in tensors:
        if held and size + value.nbytes > shard:
            yield held
            held, size = {}, 0
        held[name] = np.ascontiguousarray(value)  # the library writes a transposed view as if it were not one
        size += value.nbytes
    yield held


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
