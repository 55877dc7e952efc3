"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290).

A pair is two segments of a packed row, the chosen answer and then the rejected one: segments 1 and 2, 3 and 4, ...;
they do not see each other. The reference's log-probabilities come with the batch, computed once before training.

Shapes: B batch, T position, P pairs of a row (most of them empty).
"""

import jax
import jax.numpy as jnp

from jaxllm.config import settings
from jaxllm.data.batch import TokenBatch
from jaxllm.model.build import Model, Params
from jaxllm.objectives.logprobs import token_logprobs


@settings
class DpoConfig:
    """Direct preference optimisation."""

    beta: float = 0.1
    """How strongly the model is held to the reference: the scale of a log-ratio in the reward."""
    label_smoothing: float = 0.0
    """Share of pairs taken to be labelled the wrong way round (conservative DPO)."""
    reference: str | None = None
    """A run or model whose weights are the reference; null takes those that the run starts from."""

    def __post_init__(self):
        if self.beta <= 0 or not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"beta={self.beta}, label_smoothing={self.label_smoothing}: must be above 0, and in [0, 0.5)"
            )


def dpo(model: Model, params: Params, batch: TokenBatch, key=None, *, config: DpoConfig):
    """`(loss_sum, count, metrics)` over the pairs of the batch; every metric is a sum over them.

    With r = log p - log p_reference of an answer (equation 7; label smoothing s as in conservative DPO, Mitchell 2023):
    loss = -(1 - s) log sigmoid(beta (r_chosen - r_rejected)) - s log sigmoid(-beta (r_chosen - r_rejected)).
    """
    logprobs_BT = token_logprobs(model, params, batch, key)
    ratio_BT = (logprobs_BT - batch.reference_BT) * (batch.mask_BT > 0)
    length = model.sharding.row_length(ratio_BT.shape[1])
    sums = tuple(by_pair(x_BT, batch.segments_BT, length) for x_BT in (config.beta * ratio_BT, batch.mask_BT))
    # Where devices hold parts of the same rows, a pair is whole on each of them and counts on the first.
    (chosen_BP, rejected_BP), (_, rejected_tokens_BP) = model.sharding.row_total(sums)
    there_BP = (rejected_tokens_BP > 0) & model.sharding.first_part
    margin_BP = chosen_BP - rejected_BP
    smooth = config.label_smoothing
    loss_BP = -(1 - smooth) * jax.nn.log_sigmoid(margin_BP) - smooth * jax.nn.log_sigmoid(-margin_BP)

    def total(x_BP):
        return jnp.sum(jnp.where(there_BP, x_BP, 0.0))

    metrics = {
        "accuracy": total((margin_BP > 0).astype(jnp.float32)),
        "margin": total(margin_BP),
        "reward_chosen": total(chosen_BP),
        "reward_rejected": total(rejected_BP),
    }
    return total(loss_BP), jnp.sum(there_BP.astype(jnp.float32)), metrics


def by_pair(x_BT: jax.Array, segments_BT: jax.Array, length: int | None = None) -> tuple[jax.Array, jax.Array]:
    """`(chosen_BP, rejected_BP)`: sums over the odd segments and over the even ones.

    length: of whole rows, of which x may be a part; so many segments there can be.
    """
    B, T = x_BT.shape
    pairs = (length or T) // 2
    sums_BS = jnp.zeros((B, 2 * pairs + 2), x_BT.dtype).at[jnp.arange(B)[:, None], segments_BT].add(x_BT)
    return sums_BS[:, 1 : 2 * pairs : 2], sums_BS[:, 2 : 2 * pairs + 1 : 2]
