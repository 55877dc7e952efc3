"""The tokenizer of a run: the one that its settings name, or one trained on its sources, once for the same text."""

from collections.abc import Callable
from pathlib import Path

import sentencepiece

from jaxllm.config import to_dict
from jaxllm.data.chat import DEFAULT_TEMPLATE, MARKERS
from jaxllm.data.config import DataConfig
from jaxllm.data.entries import Entry, entries_of
from jaxllm.data.prepare import train_tokenizer
from jaxllm.data.readers import require
from jaxllm.data.sentencepiece_train import TRAINER
from jaxllm.data.shards import digest
from jaxllm.data.sources import Source, files, patterns
from jaxllm.data.store import VERSION, read_meta, write_meta
from jaxllm.data.tokenizer import Tokenizer

#: All that a trained tokenizer depends on beside text and settings.
TRAINING = [VERSION, TRAINER, MARKERS, DEFAULT_TEMPLATE, sentencepiece.__version__]


def open_tokenizer(config: DataConfig, say: Callable[[str], None] = print) -> Tokenizer:
    """`data.tokenizer`, or one trained on what the sources give to train on, held-out documents left out.

    A trained one stays in `data.cache`, beside the token stores, and is found there while the text is the same. `say`
    gets a line before one is trained. Raises DataError for files that cannot be read, SettingsError where they allow
    fewer than `data.vocab` pieces, MissingExtra.
    """
    paths = {source.name: _readable(source) for source in config.sources + config.eval_sources}
    if config.tokenizer is not None:
        return Tokenizer.load(config.tokenizer)
    folder = Path(config.cache).expanduser() / f"tokenizer-{digest([TRAINING, _settings(config)])[:16]}"
    old = read_meta(folder)
    found = entries_of([path for source in config.sources for path in paths[source.name]], old, folder)
    tokenizer = _kept(folder, old, found)
    if tokenizer is None:
        tokenizer = train_tokenizer(config.sources, config.vocab, heldout=config.heldout, say=say)
        tokenizer.save(folder)
    meta = {"tokenizer": tokenizer.hash, "files": [entry.row for entry in found], "shards": []}
    if old != {"version": VERSION, **meta}:
        write_meta(folder, meta)
    return tokenizer


def _kept(folder: Path, old: dict | None, found: list[Entry]) -> Tokenizer | None:
    """The tokenizer that was trained on these files, unless another process has just put its own there."""
    if old is None or [(row[0], row[3]) for row in old["files"]] != [(entry.path, entry.hash) for entry in found]:
        return None
    tokenizer = Tokenizer.load(folder)
    return tokenizer if tokenizer.hash == old["tokenizer"] else None


def _readable(source: Source) -> list[str]:
    paths = files(source)
    for path in paths:
        require(source, path)
    return paths


def _settings(config: DataConfig) -> list:
    """The settings that the text to train on depends on."""
    sources = [to_dict(source) | {"path": patterns(source), "weight": None} for source in config.sources]
    return [config.vocab, config.heldout, sources]
