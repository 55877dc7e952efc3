"""Distillation: a student learns the distribution of a teacher (Hinton et al. 2015, arXiv 1503.02531).

The teacher's most likely tokens come with the batch; all others are one event, so that the divergence is that of two
proper distributions, and the full one where all tokens are given.

Shapes: B batch, T position, D embed, V vocab, N tokens given, J positions of a chunk.
"""

import jax
import jax.numpy as jnp

from jaxllm.config import settings
from jaxllm.data.batch import TokenBatch
from jaxllm.model.build import Model, Params
from jaxllm.objectives.lm import router_losses
from jaxllm.objectives.logprobs import by_position, logprob
from jaxllm.weights.bind import bind


@settings
class AnswersConfig:
    """How a teacher answers the prompts of sources with `format: prompts`."""

    max_tokens: int = 256
    """Of one answer; a prompt whose answer does not end by then is left out."""
    temperature: float = 1.0
    """Of sampling; 0 takes the likeliest token each time."""
    seed: int = 0
    """Of sampling."""

    def __post_init__(self):
        if self.max_tokens < 1 or self.temperature < 0:
            raise ValueError(f"max_tokens={self.max_tokens}, temperature={self.temperature}: at least 1, at least 0")


@settings
class DistillConfig:
    """Distillation from a teacher with the same vocabulary."""

    teacher: str
    """Run, model folder or .gguf file."""
    weight: float = 0.5
    """Of the divergence from the teacher; the cross-entropy of the text has the rest."""
    temperature: float = 1.0
    """Of both distributions in the divergence, which is then multiplied by its square."""
    top_k: int = 64
    """The teacher's most likely tokens that are compared one by one; the others count as one."""
    cache: str | None = None
    """Folder that keeps what the teacher says of each row, for other runs on the same rows; null keeps nothing."""
    answers: AnswersConfig = AnswersConfig()
    """How the teacher answers prompts."""

    def __post_init__(self):
        if not 0 < self.weight <= 1 or self.temperature <= 0 or self.top_k < 1:
            raise ValueError(
                f"weight={self.weight}, temperature={self.temperature}, top_k={self.top_k}: must lie in (0, 1], be "
                "above 0, and at least 1"
            )


def distill(model: Model, params: Params, batch: TokenBatch, key=None, *, config: DistillConfig):
    """`(loss_sum, count, metrics)` over the targets that the mask chooses; metrics are sums over them.

    loss = (1 - w) ce + w t^2 KL(teacher_t || student_t), section 2, with w weight and t temperature.
    """
    params = bind(params, key=model.sharding.own_key(key))
    where = dict(positions_BT=batch.positions_BT, segments_BT=batch.segments_BT)
    hidden_BTD, _, aux = model.apply(params, batch.tokens_BT, **where, key=key)
    mask_BT = batch.mask_BT.astype(jnp.float32)

    def of_chunk(logits_BJV, targets_BJ, ids_BJN, logprobs_BJN):
        return -logprob(logits_BJV, targets_BJ), divergence(logits_BJV, ids_BJN, logprobs_BJN, config.temperature)

    given = batch.targets_BT, batch.top_ids_BTN, batch.top_logprobs_BTN
    by_token = by_position(model, of_chunk, model.head(params), hidden_BTD, *given)
    ce, kl = (jnp.sum(x_BT * mask_BT) for x_BT in by_token)
    loss = (1 - config.weight) * ce + config.weight * config.temperature**2 * kl
    more, metrics = router_losses(aux, mask_BT)
    return loss + more, jnp.sum(mask_BT), {"ce": ce, "kl": kl} | metrics


def divergence(logits_BJV, ids_BJN, logprobs_BJN, temperature: float) -> jax.Array:
    """`KL(teacher || student)` at each position, over N tokens and the event of any other; nats."""
    student_BJV = jax.nn.log_softmax(logits_BJV / temperature)
    student_BJN = jnp.take_along_axis(student_BJV, ids_BJN, axis=-1)
    p_BJN = jnp.exp(logprobs_BJN)
    top_BJ = jnp.sum(p_BJN * (logprobs_BJN - student_BJN), axis=-1)
    rest_p = jnp.maximum(1 - jnp.sum(p_BJN, axis=-1), 0)
    rest_q = jnp.maximum(1 - jnp.sum(jnp.exp(student_BJN), axis=-1), 1e-7)
    return top_BJ + jnp.where(rest_p > 1e-6, rest_p * (jnp.log(jnp.maximum(rest_p, 1e-7)) - jnp.log(rest_q)), 0.0)


def teach(
    model: Model, params: Params, batch: TokenBatch, *, config: DistillConfig, vocab: int
) -> tuple[jax.Array, jax.Array]:
    """`(top_ids_BTN, top_logprobs_BTN)`: what a teacher says of each position, int32 and float32.

    `vocab`: the student's; what the teacher has beyond it (rows that no token uses) counts for nothing.
    """
    where = dict(positions_BT=batch.positions_BT, segments_BT=batch.segments_BT)
    hidden_BTD, _, _ = model.apply(params, batch.tokens_BT, **where)
    count = min(config.top_k, vocab)

    def of_chunk(logits_BJV):
        logits_BJV = jnp.where(jnp.arange(logits_BJV.shape[-1]) < vocab, logits_BJV, -1e30)
        logprobs_BJN, ids_BJN = jax.lax.top_k(jax.nn.log_softmax(logits_BJV / config.temperature), count)
        return ids_BJN, logprobs_BJN

    return by_position(model, of_chunk, model.head(params), hidden_BTD)
