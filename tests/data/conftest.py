"""A small tokenizer, and stores made from lists of strings."""

import importlib
import json

import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from jaxllm.data.config import DataConfig
from jaxllm.data.prepare import prepare
from jaxllm.data.sources import Source
from jaxllm.data.tokenizer import Tokenizer

TEXTS = [
    f"def f{i}(self, x):\n    return self.value + {i}\n\n\tif x:  # the {i} quick brown foxes jump over lazy dogs\n"
    f"    for wizard in vexed(judges, many=True):\n        print(wizard, and_more=None)\n"
    for i in range(200)
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab=400)


@pytest.fixture
def make_store(tmp_path, tokenizer):
    """`make_store(texts, name)`: a token store with one document for each text."""

    def make(texts, name="notes"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        config = DataConfig(sources=(Source(name=name, path=str(path)),), cache=str(tmp_path / "cache"))
        return prepare(config, tokenizer, say=lambda line: None)[name]

    return make


@pytest.fixture
def make_chats(tmp_path, tokenizer):
    """`make_chats(records, template=...)`: a token store with one conversation for each record."""

    def make(records, template=None, name="chats"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        source = Source(name=name, path=str(path), format="chat")
        config = DataConfig(sources=(source,), cache=str(tmp_path / "cache"))
        chosen = tokenizer if template is None else tokenizer.with_template(template)
        return prepare(config, chosen, say=lambda line: None)[name]

    return make


class Bucket(DirFileSystem):
    """A local folder in the place of Google's cloud storage."""

    protocol = ("gs", "gcs")
    root = None

    def __init__(self, **_):
        super().__init__(path=self.root, fs=LocalFileSystem())

    def _join(self, path):
        return super()._join(path.removeprefix("gs://") if isinstance(path, str) else path)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder that `gs://bucket` means."""
    monkeypatch.setattr(Bucket, "root", str(tmp_path))
    monkeypatch.setattr(Bucket, "cachable", False)
    monkeypatch.setitem(importlib.import_module("fsspec.registry")._registry, "gcs", Bucket)
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    (tmp_path / "bucket").mkdir()
    yield tmp_path / "bucket"
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
