"""Greedy agreement: how often two models would say the same next token.

Shapes: B batch, T position, D embed, V vocab, C chunks of the sequence, J positions of a chunk.
"""

import jax
import jax.numpy as jnp

from jaxllm.data.loader import Loader
from jaxllm.data.pack import Rows
from jaxllm.data.store import TokenStore
from jaxllm.model.build import Model, Params
from jaxllm.objectives.lm import CHUNK_LOGITS

#: Positions times rows in a chunk of logits, at least: fewer read a large head from memory anew for a few rows.
ROWS = 128


def greedy_agreement(
    first: Model, params: Params, second: Model, others: Params, store: TokenStore, *, seq_len: int, batch: int
) -> tuple[float, float]:
    """`(positions at which both models have the same likeliest next token, all positions)` of a text.

    Positions without a next token in their document are left out. `batch`: rows, which the mesh splits evenly.
    """
    rows = Rows(store, seq_len, shuffle=False)

    @jax.jit
    def count(params, others, batch):
        same_BT = likeliest(first, params, batch) == likeliest(second, others, batch)
        return jnp.sum(same_BT * batch.mask_BT), jnp.sum(batch.mask_BT)

    same = whole = 0.0
    for part in Loader(rows, batch, stop=rows.per_epoch, prefetch=1):
        found = jax.device_get(count(params, others, first.sharding.batch(part)))
        same, whole = same + float(found[0]), whole + float(found[1])
    return same, whole


def likeliest(model: Model, params: Params, batch) -> jax.Array:
    """`[B, T]`: the id with the largest logit, the first of equal ones; logits exist a chunk of positions at a time."""
    where = dict(positions_BT=batch.positions_BT, segments_BT=batch.segments_BT)
    hidden_BTD, head = model.apply(params, batch.tokens_BT, **where)[0], model.head(params)
    B, T, D = hidden_BTD.shape
    most = max(ROWS // B, CHUNK_LOGITS // (B * model.config.padded_vocab), 1)
    J = max(n for n in range(1, min(most, T) + 1) if T % n == 0)
    parts_CBJD = jnp.moveaxis(hidden_BTD.reshape(B, T // J, J, D), 1, 0)
    found_CBJ = jax.lax.map(lambda hidden_BJD: jnp.argmax(model.unembed(head, hidden_BJD), axis=-1), parts_CBJD)
    return jnp.moveaxis(found_CBJ, 0, 1).reshape(B, T)
