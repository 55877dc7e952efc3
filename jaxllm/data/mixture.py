"""Several sources by weight: which source row r comes from, as a pure function of the seed."""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from jaxllm.data.pack import Row, Rows
from jaxllm.data.shards import digest
from jaxllm.data.store import TokenStore
from jaxllm.data.truncate import Truncate
from jaxllm.errors import SettingsError, nearest

#: Rows in a block. Each block holds every source by its exact share, rounded to rows, in an order of its own.
BLOCK = 1024

#: The rows of a source, and the one of them that comes next.
Place = tuple[Rows, int]


class Mixture:
    """Endless rows from several sources; each source goes through its own epochs.

    Weights are shares of the rows, so of the tokens. They are rounded to a 1024th (`counts`), and every prefix of
    the stream is off by less than a block's shuffle: a few dozen rows.
    """

    def __init__(
        self,
        sources: Mapping[str, Rows],
        weights: Mapping[str, float],
        *,
        seed: int = 0,
        starts: Mapping[str, int] | None = None,
    ):
        """`starts`: the row at which each source begins, where not 0.

        Raises SettingsError for an unknown name, no weight above 0, or one below a 1024th of all.
        """
        for name in weights:
            if name not in sources:
                raise SettingsError(f"weights.{name}: no such source{nearest(name, sources)}")
        self.names = tuple(name for name in sources if weights.get(name, 0) > 0)
        if not self.names:
            raise SettingsError(f"weights of {', '.join(sources)}: at least one must be above 0")
        self.sources = tuple(sources[name] for name in self.names)
        if len({rows.length for rows in self.sources}) > 1:
            raise SettingsError(f"sources have rows of different lengths: {[rows.length for rows in self.sources]}")
        self.length, self.seed = self.sources[0].length, seed
        self.counts = _counts({name: weights[name] for name in self.names})
        self.starts = [(starts or {}).get(name, 0) for name in self.names]
        self._block = lru_cache(maxsize=8)(self._make_block)

    @property
    def fingerprint(self) -> str:
        """Hash of all that a row depends on; a run may only go on with the one it was started with."""
        return digest([[r.fingerprint for r in self.sources], self.names, self.counts.tolist(), self.starts, self.seed])

    def locate(self, r: int) -> tuple[int, int]:
        """`(source, row in that source)` of row r."""
        block, k = divmod(r, BLOCK)
        sources, ranks = self._block(block)
        source = int(sources[k])
        return source, self.starts[source] + block * int(self.counts[source]) + int(ranks[k])

    def reached(self, r: int) -> dict[str, Place]:
        """Where each source stands at row r of the stream."""
        block, k = divmod(r, BLOCK)
        read = block * self.counts + np.bincount(self._block(block)[0][:k], minlength=len(self.counts))
        places = zip(self.sources, np.add(self.starts, read).tolist(), strict=True)
        return dict(zip(self.names, places, strict=True))

    def row(self, r: int) -> Row:
        """Row r of the stream."""
        source, k = self.locate(r)
        return self.sources[source].row(k)

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each row of a block, and its rank among that source's rows of the block."""
        order = np.random.default_rng([self.seed, block, 2]).permutation(BLOCK)
        ordered = np.repeat(np.arange(len(self.counts)), self.counts)[order]
        ranks = np.empty(BLOCK, np.int64)
        for source, count in enumerate(self.counts):
            ranks[ordered == source] = np.arange(count)
        return ordered, ranks


def _counts(weights: dict[str, float]) -> np.ndarray:
    """Rows of each source in a block, by largest remainder."""
    share = np.array(list(weights.values()), np.float64)
    share *= BLOCK / share.sum()
    counts = np.floor(share).astype(np.int64)
    counts[np.argsort(counts - share, kind="stable")[: BLOCK - counts.sum()]] += 1
    if not counts.all():
        name = list(weights)[int(np.argmin(counts))]
        raise SettingsError(
            f"weight {weights[name]} of the source {name} is below 1/{BLOCK} of all weights ({sum(weights.values())}); "
            "raise it, or leave the source out with weight 0"
        )
    return counts


def mix(
    stores: Mapping[str, TokenStore],
    weights: Mapping[str, float],
    length: int,
    *,
    seed: int = 0,
    pack: bool = True,
    shuffle: bool = True,
    truncate: Truncate = "right",
    reached: Mapping[str, Place] | None = None,
) -> Mixture:
    """The rows of token stores, `length` pairs each, mixed by weight: what a stage of training reads.

    `reached`: where earlier stages have left the sources that they read; each goes on there (see `Rows.go_on`).
    """
    options = dict(seed=seed, pack=pack, shuffle=shuffle, truncate=truncate)
    rows = {name: Rows(store, length, **options) for name, store in stores.items()}
    starts = {name: rows[name].go_on(*place) for name, place in (reached or {}).items()}
    return Mixture(rows, weights, seed=seed, starts=starts)
