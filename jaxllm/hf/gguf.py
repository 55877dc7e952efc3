"""A GGUF file opened like a Hugging Face folder: settings, tensors by a folder's names, tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.adapt.changes import Changes
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError, SettingsError
from jaxllm.families.base import Family
from jaxllm.families.keys import Keys
from jaxllm.families.registry import read_config
from jaxllm.hf.gguf_arch import Architecture, architecture_of
from jaxllm.hf.gguf_file import File, read_gguf
from jaxllm.hf.gguf_forms import as_folder
from jaxllm.hf.gguf_tokenizer import read_tokenizer
from jaxllm.hf.weights import read
from jaxllm.model.build import Model, Params, build
from jaxllm.model.spec import ModelConfig
from jaxllm.sharding import Sharding


@dataclasses.dataclass(frozen=True)
class Gguf:
    """What a GGUF file holds; made by `open_gguf`, used like `folder.Folder`."""

    path: Path
    file: File
    architecture: Architecture
    raw: dict[str, Any]
    """The config.json that a folder of the same model would have."""
    family: Family
    config: ModelConfig
    keys: Keys
    """Which keys of the metadata were used, and which ignored and why."""
    changes: Changes = ()
    """Quantised types are read as the floats that they stand for."""

    def tensors(self):
        """The stored tensors by the names that a folder has for them, dequantised one at a time when they are read."""
        return as_folder(self.architecture.lines(self.config), self.config.layers, self.file.tensors)

    def load(self, sharding: Sharding | None = None, *, dtype="float32", vocab_multiple=1) -> tuple[Model, Params]:
        """The model and its weights, read straight into their shards; see `Folder.load`. Raises DataError."""
        model = build(dataclasses.replace(self.config, vocab_multiple=vocab_multiple), sharding)
        try:
            return model, read(model, self.family, self.tensors(), dtype=dtype)
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from None

    def tokenizer(self) -> Tokenizer:
        """Raises DataError where there is none, or where it has more ids than the embedding has rows."""
        tokenizer = read_tokenizer(self.path, self.file.metadata)
        if tokenizer.vocab > self.config.vocab:
            raise DataError(
                f"{self.path}: the tokenizer has {tokenizer.vocab:,} ids and the embedding {self.config.vocab:,} rows; "
                "they are not of one model"
            )
        return tokenizer


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF file."""
    return "://" not in str(path) and str(path).endswith(".gguf")


def open_gguf(path: str | Path, *, ignore_keys: tuple[str, ...] = ()) -> Gguf:
    """Reads the header of a file.

    Raises SettingsError for an architecture or a key that is not understood, DataError for a damaged file, MissingExtra
    without the `gguf` library.
    """
    path = Path(path)
    file = read_gguf(path)
    _check_whole(path, file.metadata)
    architecture = architecture_of(file.metadata, str(path))
    prefix = f"{architecture.name}."
    own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    own = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in own.items()}
    keys = Keys(own, f"{path}: {architecture.name}")
    raw = architecture.read(keys, file.tensors)
    keys.finish(ignore_keys)
    _, config, _ = read_config(raw, str(path))
    return Gguf(path, file, architecture, raw, architecture.family_as_stored(), config, keys)


def _check_whole(path: Path, metadata: dict[str, Any]) -> None:
    kind, parts = metadata.get("general.type", "model"), metadata.get("split.count", 1)
    if kind != "model":
        raise SettingsError(f"{path}: general.type={kind!r} is no model; open the file of the model it belongs to")
    if parts != 1:
        raise SettingsError(
            f"{path} is one of {parts} parts; join them with llama.cpp's llama-gguf-split --merge and open the result"
        )
