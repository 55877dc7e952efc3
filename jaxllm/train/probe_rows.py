"""Short rows of real tokens for the self-check, and changes of them that must not matter. Made on the host.

Shapes: B row, T position of a short row.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.batch import TokenBatch
from jaxllm.errors import TrainingError
from jaxllm.model.build import Model
from jaxllm.train.probe import KEPT, Probe

#: Tokens of a short row, for each device that holds a part of it: two pieces of which splash attention can make blocks.
LENGTH = {"cpu": 128}
OTHERS = 256
#: Rows of a batch that are cut to short ones at most.
ROWS = 8


class ProbeRows:
    """Rows in which several documents lie. Of every other row a document is kept, up to one of its targets.

    Of preferences, both halves of a pair are. Nothing else of the rows may reach what is kept. Every process has the
    same rows, and two of them lie on each device.
    """

    def __init__(self, model: Model, batch: TokenBatch, *, pairs: bool = False):
        """`batch`: on the devices. Raises TrainingError where nothing is to be learnt."""
        self.model, self.pairs, self.found = model, pairs, _to_host(model, batch)
        length = self.found.tokens_BT.shape[1]
        self.length = length if pairs else _short(model, length)
        best = np.argsort(-_score(self.found), kind="stable")[:ROWS]
        cut = [self._cut(jax.tree.map(lambda x, i=i: x[i], self.found)) for i in best]
        cut = [one for one in cut if one[1].any()]
        if not cut:
            raise TrainingError("self-check: the first batch holds no token to learn; see jaxllm data inspect --chat")
        order = [i % len(cut) for i in range(2 * model.sharding.batch_size)]
        self.whole = jax.tree.map(lambda *xs: np.stack(xs), *[cut[i][0] for i in order])
        self.kept = np.stack([cut[i][1] for i in order])
        """bool `[B, T]`: the targets that are kept"""
        self.kept[1::2] = False
        places = np.flatnonzero(self.kept[0] & (self.whole.segments_BT[0] % 2 == 1 if pairs else True))
        self.at = int(places[-1])
        """place of the last kept target in the first row; of pairs, of the chosen answer"""

    def _cut(self, row: TokenBatch) -> tuple[TokenBatch, np.ndarray]:
        """A short row with more than one document, where there are, and which of its targets are kept."""
        segments, learnt = row.segments_BT, row.mask_BT > 0
        if self.pairs or not learnt.any():
            return row, _kept_pair(segments, learnt)
        # The document with the most to learn; not the first one of a row, where another is about as good.
        names, counts = np.unique(segments[learnt], return_counts=True)
        name = names[np.argmax(np.minimum(counts, KEPT) + (names > 1) * KEPT // 2)]
        (inside,) = np.nonzero(learnt & (segments == name))
        first = int(np.argmax(segments == name)) - self.length // 4
        if not (inside < first + self.length // 2).any():  # a long prompt: from its end on
            first = int(inside[0]) - self.length // 2
        first = max(0, min(first, len(segments) - self.length))
        row = jax.tree.map(lambda x: x[first : first + self.length].copy(), row)
        inside = inside[(inside >= first) & (inside < first + self.length)] - first
        if len(np.unique(row.segments_BT)) == 1 and len(inside) > 2:
            start = max(1, min(self.length // 4, int(inside[len(inside) // 2]) - 1))
            _split(row, start)
            inside = inside[inside >= start]
        kept = np.zeros(self.length, bool)
        kept[inside[: len(inside) // 2 + 1][-KEPT:]] = True
        return row, kept

    def probe(self, batch: TokenBatch, *, router: float = 1.0, plain: float = 0.0) -> Probe:
        """The question on the devices."""
        ones = np.ones(len(batch.tokens_BT), np.float32)
        share, shares = self.model.sharding.share
        mine = slice(share * len(ones) // shares, (share + 1) * len(ones) // shares)
        return self.model.sharding.batch(jax.tree.map(lambda x: x[mine], Probe(batch, router * ones, plain * ones)))

    @property
    def part(self) -> TokenBatch:
        """The rows with nothing to learn but the kept targets."""
        return dataclasses.replace(self.whole, mask_BT=self.whole.mask_BT * self.kept)

    def changed(self, tokens_BT: np.ndarray, targets_BT: np.ndarray | bool = False) -> TokenBatch:
        """`part` with other tokens at these places, and other targets at those."""
        batch, vocab = self.part, self.model.config.vocab

        def other(ids_BT, where_BT):
            step_BT = 1 + np.arange(ids_BT.size).reshape(ids_BT.shape) % max(1, vocab - 2)
            return np.where(where_BT, (ids_BT + step_BT) % vocab, ids_BT).astype(ids_BT.dtype)

        tokens_BT, targets_BT = other(batch.tokens_BT, tokens_BT), other(batch.targets_BT, targets_BT)
        return dataclasses.replace(batch, tokens_BT=tokens_BT, targets_BT=targets_BT)

    def outside(self) -> dict[str, np.ndarray]:
        """Places by what they are to the kept targets, which none of them may reach: `{name: [B, T]}`."""
        segments, index = self.whole.segments_BT, np.arange(self.length)
        rows_B1, reach = self.kept.any(axis=1)[:, None], self._reach()
        mine, later, far = np.zeros((3, *segments.shape), bool)
        for row in np.flatnonzero(rows_B1):
            for name in np.unique(segments[row, self.kept[row]]):
                same = segments[row] == name
                (places,) = np.nonzero(same & self.kept[row])
                mine[row] |= same
                later[row] |= same & (index > places[-1])
                far[row] |= same & (index < places[0] - reach)
        found = {"another row": ~rows_B1 & (segments > 0)}
        if not shares_capacity(self.model):
            found |= {"another document": rows_B1 & ~mine & (segments > 0), "a later token": later}
            found |= {"a token beyond the window": far, "padding": rows_B1 & (segments == 0)}
        return {name: where for name, where in found.items() if where.any()}

    def _reach(self) -> int:
        """How many tokens back the layers see, all together."""
        windows = [spec.attn.window for spec in self.model.config.layer_specs]
        return sum(window - 1 for window in windows) if all(windows) else self.length

    def moved(self) -> TokenBatch:
        """`part` with the kept documents at the start of their rows, and those before them behind: the same to see."""
        rows = zip(self.whole.segments_BT, self.kept, strict=True)
        shifts = [int(np.argmax(s == s[k][0])) if k.any() else 0 for s, k in rows]
        return jax.tree.map(lambda x: np.stack([np.roll(r, -n, 0) for r, n in zip(x, shifts, strict=True)]), self.part)


def shares_capacity(model: Model) -> bool:
    """Whether what an expert drops depends on the other documents of a row."""
    return any(spec.moe is not None and spec.moe.capacity_factor is not None for spec in model.config.layer_specs)


def _short(model: Model, length: int) -> int:
    """A row length at which attention is computed as at the whole one: halves of it that the same kernel can take."""
    ways = model.sharding.mesh.shape["context"]
    least = LENGTH.get(model.sharding.platform, OTHERS) * ways
    while length % (4 * ways) == 0 and length // 2 >= least:
        length //= 2
    return length


def _score(rows: TokenBatch):
    """Rows with something to learn first, then those of the most documents."""
    return (rows.mask_BT > 0).any(axis=1) * (1 + rows.segments_BT.max(axis=1).clip(0, 8))


def _kept_pair(segments, learnt) -> np.ndarray:
    """The first targets of both halves of the last pair of a row in which both have some."""
    kept = np.zeros(len(segments), bool)
    for chosen in range(int(segments.max()) // 2 * 2 - 1, 0, -2):
        halves = [np.flatnonzero(learnt & (segments == name)) for name in (chosen, chosen + 1)]
        if all(len(half) for half in halves):
            for half in halves:
                kept[half[: min(KEPT // 2, (len(half) + 1) // 2)]] = True
            break
    return kept


def _split(row: TokenBatch, at: int) -> None:
    """Makes two documents of one, as if another one began at `at`."""
    row.segments_BT[:at], row.segments_BT[at:] = 1, 2
    row.positions_BT[at:] -= row.positions_BT[at]
    row.mask_BT[at - 1] = 0


def _to_host(model: Model, batch: TokenBatch) -> TokenBatch:
    """All rows of a batch, or the best of them where other processes hold some."""
    if all(not isinstance(x, jax.Array) or x.is_fully_addressable for x in jax.tree.leaves(batch)):
        return jax.tree.map(np.asarray, batch)

    def best(batch):
        _, rows = jax.lax.top_k(_score(batch), min(ROWS, batch.tokens_BT.shape[0]))
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), batch)

    return jax.tree.map(np.asarray, jax.jit(best, out_shardings=model.sharding.replicated())(batch))
