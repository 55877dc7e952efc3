"""Settings of the data: which text, by which tokenizer, how it becomes rows."""

import os

from pydantic import Field

from jaxllm.config import settings
from jaxllm.data.sources import TURNS, Source
from jaxllm.data.truncate import Truncate


@settings
class DataConfig:
    """Text in, rows out. What changes by stage (weights, sequence length) belongs to the stage."""

    sources: tuple[Source, ...]
    """text to train on"""
    eval_sources: tuple[Source, ...] = ()
    """text for held-out evaluation, never trained on"""
    heldout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """instead of eval_sources: the share of each source's documents to hold out, by a hash of the text; at least one"""
    tokenizer: str | None = None
    """folder or .model file of the tokenizer; null trains one on the sources"""
    vocab: int = Field(default=4096, ge=300)
    """pieces of a tokenizer trained here"""
    pack: bool = True
    """several documents in a row, attention within each; conversations stay whole; false: one row is one document"""
    truncate: Truncate = "right"
    """a conversation (or unpacked document) longer than a row: right cuts its end, left its start; drop; error"""
    shuffle: bool = True
    """documents and rows in a new random order each epoch; false: as they stand in the files"""
    seed: int = Field(default=0, ge=0)
    """of the order of documents, rows and sources"""
    cache: str = "~/.cache/jaxllm"
    """local folder of the token stores"""
    workers: int = Field(default=0, ge=0)
    """threads that tokenise; 0: one a core"""
    prefetch: int = Field(default=2, ge=0)
    """batches made ahead by a thread; 0: made when asked for"""

    def __post_init__(self):
        names = [*(source.name for source in self.sources), *self.eval_names]
        if not self.sources:
            raise ValueError("sources: name at least one")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"sources: the name {twice[0]} stands twice; every source needs its own")
        if self.heldout and self.eval_sources:
            raise ValueError(f"heldout={self.heldout} would be ignored beside eval_sources; set one of the two")
        if self.tokenizer is not None and self.vocab != 4096:
            raise ValueError(f"vocab={self.vocab} would be ignored: the tokenizer {self.tokenizer} has its own")
        if self.truncate != "right" and self.pack and all(source.format not in TURNS for source in self.sources):
            raise ValueError(f"truncate={self.truncate} would be ignored: packed text is cut nowhere; only chat is")
        if "://" in self.cache:
            raise ValueError(f"cache={self.cache}: must be a local folder, since token stores are memory-mapped")

    @property
    def eval_names(self) -> tuple[str, ...]:
        """Names of the stores to evaluate on, among those that `prepare` gives."""
        if self.heldout:
            return tuple(f"{source.name}-heldout" for source in self.sources)
        return tuple(source.name for source in self.eval_sources)

    @property
    def weights(self) -> dict[str, float]:
        """`{source name: weight}` of the sources to train on, for `mix`."""
        return {source.name: source.weight for source in self.sources}

    @property
    def threads(self) -> int:
        """Threads that tokenise."""
        return self.workers or os.cpu_count() or 1
