"""Looks at the first real batch before a run begins: does training do what its settings say?

What goes wrong in training is silent: documents that see each other in a packed row, a prompt that is learnt, a loss
that was never added, frozen weights that move. Each check can fail, and a failed one stops the run. All of them ask
one program (`probe.py`), which goes the way of a step: any mesh, all processes, the objective and its gradient.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import tree
from jaxllm.data.batch import TokenBatch
from jaxllm.errors import TrainingError
from jaxllm.model.build import Model, Params
from jaxllm.train.probe import Answer, Plain, balance_coef, make_ask
from jaxllm.train.probe_rows import ProbeRows, shares_capacity
from jaxllm.train.rows import Objective

NEXT = "this is a fault of the model or of a change made to it, not of the data; train.self_check=false trains anyway"
#: Learning rate from which on every optimizer that divides by the size of the gradient moves a float32 weight.
MOVES = 1e-6


class SelfCheck:
    """All checks of a run: `before` its first step and `after` it. Both raise TrainingError for what is not so."""

    def __init__(
        self,
        model: Model,
        objective: Objective,
        plain: Plain,
        *,
        trainable: str = "**",
        lr: float = 0.0,
        pairs: bool = False,
        from_reference: bool = False,
        chat: bool = False,
    ):
        """`lr`: how far the first step moves a weight, 0 where that is not known.

        pairs: the rows hold pairs of answers. from_reference: the reference is meant to be the first weights. chat: all
        rows hold conversations.
        """
        self.model, self.trainable, self.lr = model, trainable, lr
        self.pairs, self.from_reference, self.chat = pairs, from_reference, chat
        self._ask = make_ask(model, objective, plain, trainable)
        self.exact = model.config.dtype == "float32" and model.sharding.platform == "cpu"
        self.experts = [spec.moe for spec in model.config.layer_specs if spec.moe is not None]

    def before(self, params: Params, batch: TokenBatch) -> str:
        """What was found to be so, in a line."""
        self.rows = ProbeRows(self.model, batch, pairs=self.pairs)
        self.bits = _bits_of(params)
        self._check_rows(self.rows.found)
        self.whole, part = self.ask(params, self.rows.whole), self.ask(params, self.rows.part)
        if not (math.isfinite(self.whole.sums["loss"]) and math.isfinite(self.whole.norm)):
            return "the loss or its gradient is not finite, so that nothing can be compared"
        by_experts = "balance" in part.sums and any(balance_coef(spec) or spec.z_coef for spec in self.experts)
        # Without the experts' own losses, in which all tokens of a row have a part.
        base = self.ask(params, self.rows.part, router=0.0) if by_experts else part
        found = [self._check_reach(params, base)]
        if by_experts:
            found.append(self._check_experts(part, base))
        return "; ".join([*found, self._check_loss(params, part), self._check_all_learn(params)])

    def ask(self, params: Params, batch: TokenBatch, **weights) -> Answer:
        return self._ask(params, self.rows.probe(batch, **weights))

    def _check_rows(self, rows: TokenBatch) -> None:
        """The rows themselves: labels, positions, masks."""
        segments, learnt, positions = rows.segments_BT, rows.mask_BT > 0, rows.positions_BT
        same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        begins = (np.diff(segments, axis=1, prepend=0) != 0) & (segments > 0)
        wrong = {
            "belongs to no document and is learnt": learnt & (segments == 0),
            "has another label than the token after it": (
                same & learnt[:, :-1] & (rows.targets_BT[:, :-1] != rows.tokens_BT[:, 1:])
            ),
            "is not at the position before that of the token after it": same & (np.diff(positions, axis=1) != 1),
            "begins a document and is not at position 0": begins & (positions != 0),
        }
        for what, where in wrong.items():
            if where.any():
                row, at = map(int, np.argwhere(where)[0])
                raise TrainingError(f"self-check: the token at row {row}, place {at} of the first batch {what}; {NEXT}")
        if self.chat and learnt[segments > 0].all():
            raise TrainingError(f"self-check: every token of the conversations is learnt, prompts too; {NEXT}")

    def _check_reach(self, params: Params, base: Answer) -> str:
        """What the loss and the gradient of a kept target depend on: the tokens before it in its document alone."""
        rows, outside = self.rows, self.rows.outside()
        unmasked = rows.part.mask_BT == 0
        nowhere = np.zeros_like(unmasked)
        changes = {"a masked label": (nowhere, unmasked)} | {name: (x, nowhere) for name, x in outside.items()}
        everything = np.logical_or.reduce([nowhere, *outside.values()]), unmasked
        if self._differs(base, self._without_router(params, rows.changed(*everything))):
            for name, change in (changes | {"what lies outside": everything}).items():
                if self._differs(base, self._without_router(params, rows.changed(*change))):
                    raise TrainingError(f"self-check: {name} reaches a document: its loss or gradient changes; {NEXT}")
        self._check_token(params, base)
        if self.model.config.positions in ("learned", "sinusoidal") and not shares_capacity(self.model):
            self._check_positions(params, base)
        what = "pairs of answers" if self.pairs else "conversations" if self.chat else "documents"
        if shares_capacity(self.model):
            return f"{what} of a row share the experts' capacity (capacity_factor), so they are not independent"
        return f"{what} of a row see nothing of each other and nothing of what follows"

    def _without_router(self, params: Params, batch: TokenBatch) -> Answer:
        return self.ask(params, batch, router=0.0)

    def _differs(self, base: Answer, other: Answer) -> bool:
        """The loss bit for bit but for experts, whose rows are sorted anew; sums of a gradient may be in any order."""
        close = 2e-2 if self.experts and not self.exact else 1e-3
        return self._apart(base, other, "loss") or not base.apart(other) <= close

    def _apart(self, base: Answer, other: Answer, name: str) -> bool:
        a, b = base.sums[name], other.sums[name]
        return not abs(a - b) <= (1e-5 * abs(a) if self.experts else 0.0)

    def _check_token(self, params: Params, base: Answer) -> None:
        """Another token at a kept target changes its loss; of a pair, that of the one answer alone."""
        rows = self.rows
        place = np.zeros_like(rows.kept)
        place[0, rows.at] = True
        other = self._without_router(params, rows.changed(place))
        if not self._differs(base, other):
            why = "the reference moves with the policy, or nothing is learnt; " if self.pairs else ""
            raise TrainingError(f"self-check: another token at place {rows.at} changes nothing there; {why}{NEXT}")
        moved = {name: self.pairs and self._apart(base, other, f"reward_{name}") for name in ("chosen", "rejected")}
        if moved["rejected"] and not moved["chosen"]:
            raise TrainingError(f"self-check: the chosen and the rejected answer are swapped; {NEXT}")
        if moved["rejected"]:
            raise TrainingError(f"self-check: a token of the chosen answer reaches the rejected one; {NEXT}")

    def _check_positions(self, params: Params, base: Answer) -> None:
        """A document elsewhere in its row is the same, but for rounding."""
        a, b = base.sums["loss"], self._without_router(params, self.rows.moved()).sums["loss"]
        if not abs(a - b) <= (1e-4 if self.exact else 2e-2) * abs(a):
            raise TrainingError(
                f"self-check: a document has the loss {a:.6g}, and {b:.6g} at the start of a row: positions do not "
                f"start over with each document; {NEXT}"
            )

    def _check_experts(self, part: Answer, base: Answer) -> str:
        """What the experts' own losses add, and that it reaches their routers."""
        added, wanted = part.sums["loss"] - base.sums["loss"], part.sums["router"]
        if not added > 0:
            raise TrainingError(f"self-check: the loss that balances the experts is {added:.4g}, not above 0; {NEXT}")
        if not abs(added - wanted) <= 0.02 * wanted + 1e-6 * abs(part.sums["loss"]):
            raise TrainingError(
                f"self-check: the losses of the experts add {added:.6g}, and by their settings {wanted:.6g}; {NEXT}"
            )
        for path, found in part.prints.items():
            if path.endswith("moe/router") and np.any(found[1] == base.prints[path][1]):
                raise TrainingError(f"self-check: the loss that balances the experts does not reach {path}; {NEXT}")
        return "the experts are balanced by a loss above zero"

    def _check_loss(self, params: Params, part: Answer) -> str:
        """The objective and its gradient are those of the loss as one would write it down."""
        rest = self.ask(params, self.rows.part, plain=1.0)
        given, more, ce = rest.sums["loss"], rest.sums["z"] + rest.sums["router"], rest.sums.get("ce", 0.0)
        if rest.sums["z"] and not abs(given - ce - more) <= 0.02 * more + 1e-6 * abs(given):
            raise TrainingError(
                f"self-check: {given - ce:.6g} is added to the cross-entropy, and reckoned by itself {more:.6g}: a "
                f"part of the loss is missing (train.z_loss); {NEXT}"
            )
        wanted = rest.sums["plain"] + more
        if not abs(given - wanted) <= (1e-4 if self.exact else 2e-3) * abs(wanted) + 1e-6:
            raise TrainingError(
                f"self-check: the loss of {rest.sums['count']:.0f} targets is {given:.6g}, and reckoned by itself "
                f"{wanted:.6g}: other labels, another mask, or a part is missing; {NEXT}"
            )
        left = rest.norm / max(part.norm, 1e-30)
        if not left <= (1e-3 if self.exact else 5e-2):
            raise TrainingError(
                f"self-check: the gradient is not that of the loss: {left:.1%} of it remain when that of the loss "
                f"reckoned by itself is taken off; {NEXT}"
            )
        mean = self.whole.sums["loss"] / max(self.whole.sums["count"], 1.0)
        if self.from_reference and not abs(mean - math.log(2)) <= 1e-3:
            raise TrainingError(
                f"self-check: before the first step the loss of a pair is {mean:.4f}, and where the policy is the "
                f"reference it is log 2 = {math.log(2):.4f}: the reference is not the model that the run starts from; "
                f"{NEXT}"
            )
        learnt, tokens = int((self.rows.found.mask_BT > 0).sum()), int((self.rows.found.segments_BT > 0).sum())
        return f"{learnt:,} of {tokens:,} tokens are learnt and no others; the loss is the one reckoned by itself"

    def _check_all_learn(self, params: Params) -> str:
        """Each trainable array has a gradient, in every layer."""
        rows, prints = self.rows.whole, self.whole.prints
        if not ((rows.mask_BT > 0) & (rows.positions_BT > 0)).any():
            return f"{len(prints)} arrays train"  # attention to a single token has no gradient
        still = {path: np.atleast_1d(found[0] == 0) for path, found in prints.items() if np.any(found[0] == 0)}
        still = {path: layers for path, layers in still.items() if not self._may_be_still(path)}
        zero = _zeros(params) if still else set()
        blocks = {tuple(path.split("/")[:2]) for path in zero}  # what lies before a matrix of zeros has no gradient yet
        for path, layers in still.items():
            if path in zero or tuple(path.split("/")[:2]) not in blocks:
                layer = f", period {int(np.argmax(layers))}" if len(layers) > 1 else ""
                raise TrainingError(f"self-check: {path}{layer} is to train and has no gradient; {NEXT}")
        return f"{len(prints) - len(still)} arrays have a gradient"

    def _may_be_still(self, path: str) -> bool:
        """Whether an array of the experts has no gradient by its settings."""
        one = all(spec.experts_per_token == 1 and spec.renormalize for spec in self.experts)
        return path.endswith("moe/bias") or (path.endswith(("moe/router", "moe/router_bias")) and one)

    def after(self, state: Any) -> list[str]:
        """What was found to be so after the first step, by its state."""
        if int(state.extra["skipped"]):
            return []
        learns = tree.flatten(tree.select(state.params, self.trainable))
        now, weights = _bits_of(state.params), tree.flatten(state.params)
        for path, trained in learns.items():
            same = now[path] == self.bits[path]
            if not trained and not same:
                raise TrainingError(f"self-check: {path} is frozen and has moved in the first step; {NEXT}")
            sure = trained and self.lr >= MOVES and weights[path].dtype == jnp.float32
            if sure and same and self.whole.prints[path][0].any():
                raise TrainingError(f"self-check: {path} is to train and the first step has not moved it; {NEXT}")
        frozen = len(learns) - sum(learns.values())
        found = [f"{frozen} frozen arrays are as they were after the first step"] if frozen else []
        return found + (self._check_margin(state.params) if self.pairs else [])

    def _check_margin(self, params: Params) -> list[str]:
        before, now = self.whole.sums["margin"], self.ask(params, self.rows.whole).sums["margin"]
        if before == now:
            raise TrainingError(
                f"self-check: the first step has left the margin between the answers at {now:.6f}: the reference moves "
                f"with the policy, or nothing is learnt; {NEXT}"
            )
        return ["the first step has moved the policy away from the reference"]


def _bits_of(params: Params) -> dict[str, int]:
    return {path: int(x) for path, x in tree.flatten(jax.device_get(_bit_sums(params))).items()}


@jax.jit
def _bit_sums(params: Params):
    """A number for each array that changes with any of its bits, but for rare coincidences."""

    def one(x):
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
        place = jax.lax.broadcasted_iota(jnp.uint32, (1, max(1, bits.size)), 1).reshape(bits.shape)
        return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)

    return jax.tree.map(one, params)


def _zeros(params: Params) -> set[str]:
    """The matrices that hold nothing but zeros, as adapters do at first."""
    some = jax.device_get(jax.jit(lambda params: jax.tree.map(lambda x: jnp.any(x != 0), params))(params))
    return {path for path, x in tree.flatten(some).items() if not x and tree.flatten(params)[path].ndim > 1}
