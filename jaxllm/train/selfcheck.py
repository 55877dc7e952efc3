"""Looks at the first real batch before a fine-tuning run begins: does training do what its settings say?

What goes wrong in fine-tuning is silent: conversations that see each other in a packed row, a prompt that is learnt,
frozen weights that move, experts that nothing balances. Each check can fail, and a failed one stops the run.

Shapes: B batch, T position, D embed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import tree
from jaxllm.data.batch import TokenBatch
from jaxllm.errors import TrainingError
from jaxllm.model.build import Model, Params
from jaxllm.objectives.lm import cross_entropy

NEXT = "this is a fault of the model or of a change made to it, not of the data; train.self_check=false trains anyway"


def check_first_batch(model: Model, params: Params, batch: TokenBatch) -> list[str]:
    """What was found to be so, a line each; two forward passes. Raises TrainingError for what is not."""
    changed, row, start, stop = _perturbed(batch)
    forward = jax.jit(lambda params, tokens_BT: _forward(model, params, tokens_BT, batch))
    (hidden, aux), (other, _) = forward(params, batch.tokens_BT), forward(params, changed)
    difference_BT = np.asarray(jnp.max(jnp.abs(hidden - other), axis=-1))
    same_BT = (difference_BT <= _rounding(model, hidden)) | (np.asarray(batch.segments_BT) == 0)
    found = _check_segments(model, same_BT, row, start, stop, np.asarray(batch.segments_BT))
    found.append(_check_mask(model, params, hidden, batch))
    return found + _check_router(model, aux)


def _forward(model: Model, params, tokens_BT, batch: TokenBatch):
    where = dict(positions_BT=batch.positions_BT, segments_BT=batch.segments_BT)
    hidden_BTD, _, aux = model.apply(params, tokens_BT, **where)
    return hidden_BTD, {name: value for name, value in aux.items() if name == "loss_B"}


def _rounding(model: Model, hidden_BTD) -> float:
    """What two equal outputs may differ by: nothing, or with experts, whose rows are sorted anew, a rounding error."""
    has_experts = any(spec.moe is not None for spec in model.config.layer_specs)
    return 1e-5 * float(jnp.max(jnp.abs(hidden_BTD))) if has_experts else 0.0


def _perturbed(batch: TokenBatch):
    """`(tokens_BT, row, start, stop)`: one token changed, in the middle of the first segment of the fullest row."""
    tokens, segments = np.array(batch.tokens_BT), np.asarray(batch.segments_BT)
    row = int(np.argmax(segments.max(axis=1)))
    (places,) = np.nonzero(segments[row] == 1)
    at = int(places[len(places) // 2])
    tokens[row, at] = tokens[row, at] + 1 if tokens[row, at] == 0 else tokens[row, at] - 1
    where = batch.tokens_BT.sharding if isinstance(batch.tokens_BT, jax.Array) else None
    return jax.device_put(tokens, where), row, at, int(places[-1]) + 1


def _check_segments(model: Model, same_BT, row: int, at: int, stop: int, segments_BT) -> list[str]:
    """What a changed token may reach: itself and what follows in its own conversation."""
    if same_BT[row, at]:
        raise TrainingError(f"self-check: another token at row {row}, position {at} changes nothing there; {NEXT}")
    if any(spec.moe is not None and spec.moe.capacity_factor is not None for spec in model.config.layer_specs):
        return ["conversations of a row share the experts' capacity (capacity_factor), so they are not independent"]
    reached = ~same_BT
    reached[row, at:stop] = False
    if reached.any():
        there = [int(i) for i in np.argwhere(reached)[0]]
        other = "an earlier token" if there[0] == row and segments_BT[row, there[1]] == 1 else "another conversation"
        raise TrainingError(
            f"self-check: a token changed at row {row}, position {at} reaches {other} at row {there[0]}, position "
            f"{there[1]}; {NEXT}"
        )
    return [f"conversations see nothing of each other: {int(segments_BT.max())} in a row, a token of one changed"]


def _check_mask(model: Model, params, hidden_BTD, batch: TokenBatch) -> str:
    """The gradient by the outputs is zero wherever nothing is to be learnt, and nowhere else."""

    def loss(hidden_BTD, head):
        mask_BT = batch.mask_BT.astype(jnp.float32)
        return cross_entropy(model, head, hidden_BTD, batch.targets_BT, mask_BT)[0]

    moved = jax.jit(lambda hidden, head: jnp.any(jax.grad(loss)(hidden, head) != 0, axis=-1))
    moved_BT = np.asarray(moved(hidden_BTD, model.head(params)))
    learnt_BT = np.asarray(batch.mask_BT) > 0
    if not learnt_BT.any():
        raise TrainingError("self-check: the first batch holds no token to learn; see jaxllm data inspect --chat")
    if (wrong := np.argwhere(moved_BT & ~learnt_BT)).size:
        row, at = map(int, wrong[0])
        raise TrainingError(f"self-check: the masked token at row {row}, position {at} has a gradient; {NEXT}")
    if not (moved_BT & learnt_BT).any():
        raise TrainingError(f"self-check: no token of the first batch has a gradient; {NEXT}")
    tokens = int((np.asarray(batch.segments_BT) > 0).sum())
    return f"{learnt_BT.sum():,} of {tokens:,} tokens are learnt; the others have no gradient"


def _check_router(model: Model, aux: dict[str, Any]) -> list[str]:
    specs = [spec.moe for spec in model.config.layer_specs if spec.moe is not None]
    if not any(spec.balance in ("sequence", "batch") and spec.balance_coef != 0 for spec in specs):
        return []
    if not float(jnp.sum(aux["loss_B"])) > 0:
        raise TrainingError(f"self-check: the loss that balances the experts is zero; {NEXT}")
    return ["the experts are balanced by a loss above zero"]


class Frozen:
    """Whether the weights that are not to train stay as they are, bit for bit: sums of their bits before and after."""

    def __init__(self, params: Params, trainable: str):
        self.mask, self.names = tree.select(params, trainable), list(tree.flatten(params))
        self.before = self._sums(params)

    def check(self, params: Params) -> list[str]:
        """Raises TrainingError where one has moved."""
        frozen = [not chosen for chosen in jax.tree.leaves(self.mask)]
        same = [bool(a == b) for a, b in zip(self.before, self._sums(params), strict=True)]
        if moved := [name for name, f, equal in zip(self.names, frozen, same, strict=True) if f and not equal]:
            raise TrainingError(f"self-check: {moved[0]} is frozen and has moved in the first step; {NEXT}")
        return [f"{sum(frozen)} frozen arrays are as they were after the first step"] if any(frozen) else []

    def _sums(self, params: Params) -> list[np.ndarray]:
        return [np.asarray(x) for x in jax.tree.leaves(_bit_sums(params))]


@jax.jit
def _bit_sums(params: Params):
    """A number for each array that changes with any of its bits, but for rare coincidences."""

    def one(x):
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
        place = jax.lax.broadcasted_iota(jnp.uint32, (1, max(1, bits.size)), 1).reshape(bits.shape)
        return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)

    return jax.tree.map(one, params)
