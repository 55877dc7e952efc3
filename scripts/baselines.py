"""What a language model must beat on the same held-out text: n-grams over the same tokens, gzip and xz.

    python scripts/baselines.py runs/demo

prints bits per byte of each for the data that a run was trained and evaluated on.
"""

import gzip
import lzma
import math
import sys
from pathlib import Path

import numpy as np

from jaxllm.config import parse, read_yaml
from jaxllm.data.config import DataConfig
from jaxllm.data.prepare import prepare
from jaxllm.data.store import TokenStore
from jaxllm.data.tokenizer import Tokenizer

XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 27}]


def stores_of(run: Path) -> tuple[TokenStore, TokenStore, Tokenizer]:
    """`(training, held-out, tokenizer)` of a run with one source of each."""
    data = parse(DataConfig, read_yaml(run / "settings.yaml")["data"])
    tokenizer = Tokenizer.load(run / "tokenizer")
    stores = prepare(data, tokenizer, say=lambda text: print(text, file=sys.stderr))
    return stores[data.sources[0].name], stores[data.eval_names[0]], tokenizer


def text_of(store: TokenStore, tokenizer: Tokenizer) -> bytes:
    """The documents one after another, as UTF-8 bytes."""
    pieces = tokenizer.bytes_of
    return b"".join(pieces[i] for d in range(store.documents) for i in store.doc(d))


def ngram_bits_per_byte(train: TokenStore, heldout: TokenStore, order: int) -> float:
    """Interpolated Witten-Bell n-gram over tokens, counted on all the training text (Bell et al. 1990, section 7).

    P(w | h) = (c(h w) + t(h) P(w | shorter h)) / (c(h) + t(h)), t(h) = distinct tokens seen after h; below the
    unigram lies the uniform distribution. Histories do not cross the start of a document.
    """
    assert train.vocab <= 1 << 12 and order <= 5, "n-grams are packed into 60 bits"
    probability = np.full(int((heldout.lengths - 1).sum()), 1 / train.vocab)
    for n in range(1, order + 1):
        grams, contexts = ngrams(train, n)
        keys, counts = np.unique(grams, return_counts=True)
        followed, kinds = np.unique(keys >> 12, return_counts=True)
        seen, totals = np.unique(contexts, return_counts=True)
        assert np.array_equal(followed, seen)
        asked, asked_contexts = ngrams(heldout, n)
        count, total = lookup(keys, counts, asked), lookup(seen, totals, asked_contexts)
        kind = lookup(followed, kinds, asked_contexts)
        known = total > 0
        mixed = (count + kind * probability) / np.maximum(total + kind, 1)
        probability = np.where(known, mixed, probability)
    return float(-np.log2(probability).sum() / heldout.text_bytes)


def ngrams(store: TokenStore, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Packed n-grams and their histories, one for each token but a document's first; short histories are padded."""
    grams = []
    for d in range(store.documents):
        ids = store.doc(d).astype(np.int64) + 0
        padded = np.concatenate([np.zeros(n, np.int64), ids])
        packed = np.zeros(len(ids) - 1, np.int64)
        for back in range(n - 1, -1, -1):
            packed = (packed << 12) | padded[n + 1 - back : n + len(ids) - back]
        grams.append(packed)
    grams = np.concatenate(grams)
    return grams, grams >> 12


def lookup(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The value of each asked key, 0 where it is not there."""
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)


def compressors(train: bytes, heldout: bytes) -> dict[str, float]:
    """Bits per byte of the held-out text by general-purpose compressors."""

    def xz(data):
        return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=XZ))

    size = len(heldout)
    return {
        "gzip -9": 8 * len(gzip.compress(heldout, 9)) / size,
        "xz -9": 8 * xz(heldout) / size,
        "xz -9 primed with the training text": 8 * (xz(train + heldout) - xz(train)) / size,
    }


def baselines(run: Path) -> dict[str, float]:
    """All of them for the data of a run."""
    train, heldout, tokenizer = stores_of(run)
    found = {f"{n}-gram over the same tokens": ngram_bits_per_byte(train, heldout, n) for n in (1, 2, 3, 4)}
    return found | compressors(text_of(train, tokenizer), text_of(heldout, tokenizer))


if __name__ == "__main__":
    for name, bits in baselines(Path(sys.argv[1])).items():
        assert math.isfinite(bits)
        print(f"{name:<40} {bits:.4f} bits per byte")
