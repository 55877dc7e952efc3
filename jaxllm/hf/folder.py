"""A Hugging Face model folder: what its files say, opened and checked, before any weight is read."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from jaxllm.adapt.changes import Changes, after
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError
from jaxllm.families.base import Family
from jaxllm.families.keys import Keys
from jaxllm.families.registry import read_config
from jaxllm.hf.coded_weights import changes_of
from jaxllm.hf.quantized import dequantized
from jaxllm.hf.safetensors import Tensors, read_json
from jaxllm.hf.weights import read
from jaxllm.model.build import Model, Params, build
from jaxllm.model.spec import ModelConfig
from jaxllm.sharding import Sharding


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a model folder holds; made by `open_folder`."""

    path: Path
    raw: dict[str, Any]
    """config.json as it is."""
    family: Family
    config: ModelConfig
    keys: Keys
    """Which keys of config.json were used, and which ignored and why."""

    def tensors(self):
        """The stored tensors by the names of floats; quantised ones as what they stand for, or as codes."""
        return dequantized(Tensors(self.path), self.raw)

    @functools.cached_property
    def changes(self) -> Changes:
        """What the weights have been through: quantised, where codes are stored. Raises SettingsError, DataError."""
        if "quantization_config" not in self.raw:
            return ()
        return changes_of(build(self.config), self.family, self.tensors())

    def load(self, sharding: Sharding | None = None, *, dtype="float32", vocab_multiple=1) -> tuple[Model, Params]:
        """The model after `changes` and its weights, read straight into their shards. Raises DataError, SettingsError.

        `vocab_multiple`: pads embedding and head, for a mesh that the vocabulary does not divide over.
        """
        plain = build(dataclasses.replace(self.config, vocab_multiple=vocab_multiple), sharding)
        model = after(plain, self.changes)
        return model, read(model, self.family, self.tensors(), dtype=dtype)

    def tokenizer(self) -> Tokenizer:
        """Raises DataError where there is none, or where it has more ids than the embedding has rows."""
        tokenizer = Tokenizer.load(self.path)
        if tokenizer.vocab > self.config.vocab:
            raise DataError(
                f"{self.path}: the tokenizer has {tokenizer.vocab:,} ids and the embedding {self.config.vocab:,} rows; "
                "they are not of one model"
            )
        return tokenizer


def is_folder(path: str | Path) -> bool:
    """Whether a path is a Hugging Face model folder."""
    return "://" not in str(path) and (Path(path) / "config.json").is_file()


def open_folder(path: str | Path, *, ignore_keys: tuple[str, ...] = ()) -> Folder:
    """Reads config.json. Raises SettingsError for a key that is not understood, DataError for a damaged file."""
    path = Path(path)
    raw = read_json(path / "config.json")
    family, config, keys = read_config(raw, f"{path / 'config.json'}", ignore_keys)
    return Folder(path, raw, family, config, keys)
