"""Each device computes the loss of its own rows: what is summed over devices is said here and not left to the compiler.

Objectives give sums, so that the sum over devices is the loss of the batch, and the gradient of a weight the sum of
what each device's rows give. Only the tensor axis is the compiler's.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxllm import tree
from jaxllm.model.build import Model, Params
from jaxllm.sharding import names_of

Objective = Callable[[Model, Params, Any, jax.Array | None], tuple[jax.Array, jax.Array, dict[str, Any]]]


def sums(model: Model, objective: Objective, params: Params, batch, key) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """What the objective gives for a batch whose rows are spread over the mesh."""
    if not model.sharding.by_row:
        return objective(model, params, batch, key)
    local = model.local

    def on_a_device(params, batch, key):
        return jax.lax.psum(objective(local, params, _balanced(local, batch), key), model.sharding.by_row)

    return _mapped(model, on_a_device, params, batch, PartitionSpec())(params, batch, key)


def outputs(model: Model, f: Callable[[Model, Params, Any], Any], params: Params, batch, accumulate: int = 1) -> Any:
    """What `f(model, params, batch)` says of each position, `[B, T, ...]`: split as rows are, in their own order.

    Each device computes on its own parts of the rows, in `accumulate` microbatches one after another, and holds no more
    of their hidden states and logits. There `f` sees the positions in the order of `Sharding.order`; what it says of
    one must not depend on where that lies in an array. `batch`: any tree of arrays `[B]` or `[B, T, ...]`.
    """

    def of_rows(model, params, batch):
        if accumulate == 1:
            return f(model, params, batch)
        found = jax.lax.map(lambda i: f(model, params, _microbatch(batch, accumulate, i)), jax.numpy.arange(accumulate))
        return jax.tree.map(lambda x: jax.numpy.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), found)

    if not model.sharding.by_row:
        return of_rows(model, params, batch)
    local = model.local

    def on_a_device(params, batch, _):
        return jax.tree.map(lambda x: _in_order(local, x), of_rows(local, params, _balanced(local, batch)))

    return _mapped(model, on_a_device, params, batch, model.sharding.rows_spec(2))(params, batch, None)


def gradients(model: Model, objective: Objective, chosen: Params, frozen: Params, batch, key, accumulate: int):
    """`((loss, (count, metrics)), gradient by the chosen weights)`, sums over a batch in `accumulate` microbatches.

    The gradient of each weight lies where the weight lies.
    """

    def of_rows(model, chosen, frozen, batch, key):
        def loss_of(chosen, batch, key):
            loss, count, metrics = objective(model, tree.combine(chosen, frozen), batch, key)
            return loss, (count, metrics)

        return _accumulated(jax.value_and_grad(loss_of, has_aux=True), chosen, batch, key, accumulate)

    by_row = model.sharding.by_row
    if not by_row:
        return of_rows(model, chosen, frozen, batch, key)
    kept = {path: names_of(leaf.sharding.spec) for path, leaf in tree.flatten(model.abstract).items()}

    def on_a_device(weights, batch, key):
        found, grads = of_rows(model.local, *weights, _balanced(model.local, batch), key)
        # A weight that devices share came back as its own part, summed over them: the derivative of its gather.
        left = {path: tuple(axis for axis in by_row if axis not in axes) for path, axes in kept.items()}
        grads = tree.map_with_path(lambda path, g: jax.lax.psum(g, left[path]) if left[path] else g, grads)
        return jax.lax.psum(found, by_row), grads

    out = PartitionSpec(), _specs(model, chosen)
    return _mapped(model, on_a_device, (chosen, frozen), batch, out)((chosen, frozen), batch, key)


def _balanced(model: Model, batch):
    """The batch with the tokens of each row in the order in which devices share them (`Sharding.order`)."""
    sharding = model.sharding
    if not sharding.across("context"):
        return batch
    return jax.tree.map(lambda x: sharding.part(sharding.gather(x, "context", 1)) if x.ndim > 1 else x, batch)


def _in_order(model: Model, x_BT: jax.Array) -> jax.Array:
    """The reverse of `_balanced` for what a device has made of its part: each piece travels once, no row is whole."""
    sharding, n = model.sharding, model.sharding.mesh.shape["context"]
    if not sharding.across("context") or x_BT.shape[1] % 2:  # one piece each, see `Sharding.order`
        return x_BT
    early, late = jax.numpy.split(x_BT, 2, axis=1)
    # Of n = 4 devices the second holds pieces 1 and 6 of 0 to 7 and is to hold 2 and 3: one even and one odd, as all.
    odd = sharding.piece % 2 == 1
    pieces = jax.numpy.where(odd, late, early), jax.numpy.where(odd, early, late)
    holder = [*range(n), *reversed(range(n))]
    moves = [[(holder[2 * device + k], device) for device in range(n)] for k in (0, 1)]
    moved = [jax.lax.ppermute(x, "context", to) for x, to in zip(pieces, moves, strict=True)]
    return jax.numpy.concatenate(moved, axis=1)


def _mapped(model: Model, f, weights, batch, out):
    """`f(weights, batch, key)` on each device's own parts; `weights` is one tree of weights or a tuple of them."""
    of_weights = tuple(_specs(model, w) for w in weights) if isinstance(weights, tuple) else _specs(model, weights)
    return jax.shard_map(
        f,
        mesh=model.sharding.mesh,
        in_specs=(of_weights, jax.tree.map(lambda x: model.sharding.rows_spec(x.ndim), batch), PartitionSpec()),
        out_specs=out,
        axis_names=set(model.local.sharding.manual),
        check_vma=False,
    )


def _specs(model: Model, weights):
    """The parts of each array, over the axes that are not the compiler's."""
    manual = model.local.sharding.manual
    kept = {
        path: PartitionSpec(*(tuple(a for a in names_of([part]) if a in manual) for part in leaf.sharding.spec))
        for path, leaf in tree.flatten(model.abstract).items()
    }
    return tree.map_with_path(lambda path, _: kept[path], weights)


def _accumulated(grad, chosen, batch, key, accumulate: int):
    """Value, auxiliary sums and gradient over all microbatches; each has its own key."""
    if accumulate == 1:
        return grad(chosen, batch, key)

    def of(i):
        return grad(chosen, _microbatch(batch, accumulate, i), jax.random.fold_in(key, i))

    zero = jax.tree.map(jax.numpy.zeros_like, jax.eval_shape(of, 0))

    def body(total, i):
        return jax.tree.map(jax.numpy.add, total, of(i)), None

    return jax.lax.scan(body, zero, jax.numpy.arange(accumulate))[0]


def _microbatch(batch, accumulate: int, i):
    """Rows i, i + A, ...: the same ones whether rows are split over devices or not."""
    return jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:])[:, i], batch)
