"""Two models on the same text, in one pass: the loss of each, and how often they would say the same next token.

Shapes: B batch, T position, D embed, V vocab, C chunks of the sequence, J positions of a chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.batch import TokenBatch
from jaxllm.data.loader import Loader
from jaxllm.data.pack import Rows
from jaxllm.data.store import TokenStore
from jaxllm.errors import DataError
from jaxllm.model.build import Model, Params
from jaxllm.objectives.lm import CHUNK_LOGITS

#: Positions times rows in a chunk of logits, at least: fewer read a large head from memory anew for a few rows.
ROWS = 128


class Sums(NamedTuple):
    """Over all tokens of a text that are predicted."""

    nats: tuple[float, float]
    """Cross-entropy of the first model and of the second one."""
    same: float
    """Positions at which both have the same likeliest next token."""
    tokens: float


def compare(
    first: Model, params: Params, second: Model, others: Params, store: TokenStore, *, seq_len: int, batch: int
) -> Sums:
    """Both models on packed rows of `seq_len` tokens, `batch` rows at a time, which the mesh splits evenly.

    Raises DataError where the text has nothing to predict.
    """
    rows = Rows(store, seq_len, shuffle=False)
    if not rows.per_epoch:
        raise DataError(f"{store.name}: no document has a second token, so there is nothing to predict")

    @jax.jit
    def sums(params, others, batch):
        (old_BT, at_BT), (new_BT, there_BT) = _scores(first, params, batch), _scores(second, others, batch)
        mask_BT = batch.mask_BT
        return [jnp.sum(x_BT * mask_BT) for x_BT in (old_BT, new_BT, at_BT == there_BT, jnp.ones_like(mask_BT))]

    total = np.zeros(4)
    for part in Loader(rows, batch, stop=rows.per_epoch, prefetch=1):
        total += np.array(jax.device_get(sums(params, others, first.sharding.batch(part))), np.float64)
    return Sums((total[0], total[1]), total[2], total[3])


def _scores(model: Model, params: Params, batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
    """`(nats_BT, likeliest_BT)`, the first of equal ones; logits exist a chunk of positions at a time."""
    where = dict(positions_BT=batch.positions_BT, segments_BT=batch.segments_BT)
    hidden_BTD, head = model.apply(params, batch.tokens_BT, **where)[0], model.head(params)
    B, T, _ = hidden_BTD.shape
    most = max(ROWS // B, CHUNK_LOGITS // (B * model.config.padded_vocab), 1)
    J = max(n for n in range(1, min(most, T) + 1) if T % n == 0)

    def chunk(part):
        hidden_BJD, targets_BJ = part
        logits_BJV = model.unembed(head, hidden_BJD)
        hit_BJV = jnp.arange(logits_BJV.shape[-1]) == targets_BJ[..., None]
        chosen_BJ = jnp.sum(jnp.where(hit_BJV, logits_BJV, 0), axis=-1)
        return jax.nn.logsumexp(logits_BJV, axis=-1) - chosen_BJ, jnp.argmax(logits_BJV, axis=-1)

    parts = tuple(jnp.moveaxis(x.reshape(B, T // J, J, *x.shape[2:]), 1, 0) for x in (hidden_BTD, batch.targets_BT))
    return tuple(jnp.moveaxis(x_CBJ, 0, 1).reshape(B, T) for x_CBJ in jax.lax.map(chunk, parts))
