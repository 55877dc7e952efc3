"""Each optimizer against a float64 numpy reference, and the properties that all of them share."""

import functools
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm import tree
from jaxllm.errors import SettingsError
from jaxllm.optim.config import OptimConfig, ScheduleConfig
from jaxllm.optim.optimizers import OPTIMIZERS, make_optimizer

LR, WD = 0.1, 0.3
AXES = {
    "embed": {"table": ("vocab", "embed")},
    "layers": {
        "q": ("layers", "embed", "heads", "head"),
        "experts": ("layers", "expert", "embed", "ffw"),
        "norm": ("layers", "embed"),
        "bias": ("layers", "heads", "head"),
    },
    "frozen": ("embed", "ffw"),
}
SIZES = {"vocab": 7, "embed": 6, "layers": 2, "heads": 2, "head": 2, "expert": 3, "ffw": 5}
MATRICES = {"embed/table", "layers/q", "layers/experts"}


def is_names(x):
    return isinstance(x, tuple)


def random_tree(seed):
    """Weights or gradients of the shapes in AXES; the frozen one is None."""
    rng = np.random.default_rng(seed)

    def leaf(path, axes):
        return None if path == "frozen" else rng.normal(size=[SIZES[a] for a in axes]).astype(np.float32)

    return tree.map_with_path(leaf, AXES, is_leaf=is_names)


def config(name, **rest):
    schedule = ScheduleConfig(name="constant", warmup=0)
    return OptimConfig(**{"name": name, "lr": LR, "weight_decay": WD, "clip": None, "schedule": schedule, **rest})


def run(tx, weights, gradients):
    """The weights after each gradient, compiled."""
    state, step, out = tx.init(weights), jax.jit(tx.update), []
    for gradient in gradients:
        updates, state = step(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
        out.append(weights)
    return out


def as_matrices(path, x):
    """One layer's (and one expert's) weight at a time, as (inputs, outputs), in float64."""
    x = np.asarray(x, np.float64)
    if path == "embed/table":
        return [x]
    if path == "layers/experts":
        return list(x.reshape(-1, SIZES["embed"], SIZES["ffw"]))
    return [layer.reshape(SIZES["embed"], -1) if path == "layers/q" else layer for layer in x]


def adam(b1, b2, eps):
    def direction(path, gradients):
        m = v = 0.0
        for t, g in enumerate(gradients, 1):
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            yield m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)

    return direction


def lion(b1, b2):
    def direction(path, gradients):
        m = 0.0
        for g in gradients:
            yield np.sign(b1 * m + (1 - b1) * g)
            m = b2 * m + (1 - b2) * g

    return direction


def sgd(momentum):
    def direction(path, gradients):
        m = 0.0
        for g in gradients:
            m = momentum * m + g
            yield m

    return direction


def adafactor(momentum, eps=1e-30):
    def direction(path, gradients):
        m = row = column = full = 0.0
        for t, g in enumerate(gradients, 1):
            b = 1 - t**-0.8
            square = g**2 + eps
            row, column = b * row + (1 - b) * square.mean(-1), b * column + (1 - b) * square.mean(0)
            full = b * full + (1 - b) * square
            v = np.outer(row, column) / row.mean() if g.ndim == 2 and min(g.shape) >= 128 else full
            u = g / np.sqrt(v)
            u = u / max(1.0, np.sqrt((u**2).mean()))
            m = momentum * m + (1 - momentum) * u
            yield m

    return direction


def muon(momentum, b1, b2, eps):
    def direction(path, gradients):
        if path not in ("layers/q", "layers/experts"):
            yield from adam(b1, b2, eps)(path, gradients)
            return
        m = 0.0
        for t, g in enumerate(gradients, 1):
            m = momentum * m + (1 - momentum) * g
            x = momentum * m / (1 - momentum ** (t + 1)) + (1 - momentum) * g / (1 - momentum**t)
            yield newton_schulz(x) * 0.2 * np.sqrt(max(x.shape))

    return direction


def newton_schulz(x):
    """Jordan et al. 2024: five quintic steps from the matrix over its Frobenius norm."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


REFERENCES = {
    "adamw": ({}, adam(0.9, 0.95, 1e-8)),
    "lion": ({}, lion(0.9, 0.99)),
    "sgd": ({"momentum": 0.8}, sgd(0.8)),
    "adafactor": ({"momentum": 0.5}, adafactor(0.5)),
    "muon": ({}, muon(0.95, 0.9, 0.95, 1e-8)),
}


def reference(direction, path, weight, gradients):
    """The weight after each step: w -= lr * (direction + decay * w), decay on matrices only."""
    slices = list(zip(*(as_matrices(path, g) for g in gradients), strict=True))
    out = []
    for w, gs in zip(as_matrices(path, weight), slices, strict=True):
        for u in direction(path, gs):
            w = w - LR * (u + (WD * w if path in MATRICES else 0.0))
        out.append(w)
    return np.reshape(out, np.shape(weight))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_steps_equal_the_reference(name):
    settings, direction = REFERENCES[name]
    weights, gradients = random_tree(0), [random_tree(seed) for seed in (1, 2, 3)]
    got = run(make_optimizer(config(name, **settings), 10, AXES), weights, gradients)[-1]
    assert got["frozen"] is None
    flat = [tree.flatten(g) for g in gradients]
    for path, weight in tree.flatten(weights).items():
        want = reference(direction, path, weight, [g[path] for g in flat])
        np.testing.assert_allclose(tree.flatten(got)[path], want, rtol=2e-4, atol=2e-5, err_msg=path)


def test_adafactor_factors_each_layer_of_a_stacked_weight():
    rng, shape = np.random.default_rng(0), (2, 128, 2, 65)
    axes = {"q": ("layers", "embed", "heads", "head")}
    gradients = [{"q": rng.normal(size=shape).astype(np.float32) * [[[[1]]], [[[9]]]]} for _ in range(3)]
    tx = make_optimizer(config("adafactor", weight_decay=0.0), 10, axes)
    assert tree.count(tx.init(gradients[0])) < 2 * 2 * (128 + 130)
    got = run(tx, {"q": np.zeros(shape, np.float32)}, gradients)[-1]["q"]
    for layer in range(2):
        steps = adafactor(0.0)("q", [g["q"][layer].reshape(128, 130).astype(np.float64) for g in gradients])
        np.testing.assert_allclose(got[layer].reshape(128, 130), -LR * sum(steps), rtol=1e-4, atol=1e-6)


def test_muon_update_is_near_orthogonal_with_the_rms_of_adam():
    weights, gradient = random_tree(0), random_tree(1)
    tx = make_optimizer(config("muon", weight_decay=0.0), 10, AXES)
    moved = jax.tree.map(lambda a, b: (a - b) / LR, weights, run(tx, weights, [gradient])[0])
    for path in ("layers/q", "layers/experts"):
        for g, u in zip(*(as_matrices(path, tree.flatten(t)[path]) for t in (gradient, moved)), strict=True):
            scale = 0.2 * np.sqrt(max(u.shape))
            left, _, right = np.linalg.svd(g, full_matrices=False)
            assert np.sum(u * (left @ right)) > 0.9 * np.linalg.norm(u) * np.linalg.norm(left @ right)
            assert 0.3 * scale < np.linalg.norm(u, 2) < 1.3 * scale


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_moves_matrices_only(name):
    weights, gradient = random_tree(0), random_tree(1)
    with_decay, without = (
        run(make_optimizer(config(name, weight_decay=decay), 10, AXES), weights, [gradient])[0] for decay in (WD, 0.0)
    )
    shrunk = jax.tree.map(lambda a, b: b - a, with_decay, without)
    for path, difference in tree.flatten(shrunk).items():
        want = LR * WD * tree.flatten(weights)[path] if path in MATRICES else 0.0
        np.testing.assert_allclose(difference, want + np.zeros_like(difference), atol=1e-6, err_msg=path)


def test_clipping_by_the_global_norm_of_all_weights():
    weights, gradient = random_tree(0), random_tree(1)
    norm = float(optax.tree.norm(gradient))
    for clip in (norm / 4, norm * 4):
        tx = make_optimizer(config("sgd", momentum=0.0, weight_decay=0.0, clip=clip), 10, AXES)
        moved = jax.tree.map(lambda a, b: a - b, weights, run(tx, weights, [gradient])[0])
        want = jax.tree.map(lambda g, clip=clip: LR * g * min(1.0, clip / norm), gradient)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), moved, want)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loss_falls_on_a_quadratic(name):
    target, steps = random_tree(4), 60
    tx = make_optimizer(config(name, lr=0.02, weight_decay=0.0, clip=1.0, schedule=ScheduleConfig()), steps, AXES)

    def loss(weights):
        return sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (weights, target)), strict=True))

    def step(carry, _):
        weights, state = carry
        value, gradient = jax.value_and_grad(loss)(weights)
        updates, state = tx.update(gradient, state, weights)
        return (optax.apply_updates(weights, updates), state), value

    weights = jax.tree.map(jnp.asarray, random_tree(0))
    values = jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), length=steps)[1])(weights)
    assert values[-1] < 0.8 * values[0] and np.all(np.diff(values) < 0), values


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_a_tree_of_arrays_that_keeps_its_shapes(name):
    weights = random_tree(0)
    tx = make_optimizer(config(name), 10, AXES)
    state = jax.eval_shape(tx.init, weights)
    _, after = jax.eval_shape(tx.update, weights, state, weights)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))
    assert jax.tree.structure(state) == jax.tree.structure(after)
    assert jax.tree.leaves(state) == jax.tree.leaves(after)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices, virtual ones will do")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_four_devices_equal_one_and_moments_stay_with_their_weights(name):
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = {"embed": "fsdp", "heads": "tensor"}

    names = tree.flatten(AXES, is_leaf=is_names)

    def place(path, x):
        """A moment's path ends in the path of its weight."""
        axes = next((axes for p, axes in names.items() if path.endswith(p) and len(axes) == x.ndim), ())
        spec = jax.sharding.PartitionSpec(*(rules.get(axis) for axis in axes))
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    tx, weights, gradients = make_optimizer(config(name), 10, AXES), random_tree(0), [random_tree(1), random_tree(2)]
    want = run(tx, weights, gradients)[-1]
    weights, *gradients = (tree.map_with_path(place, t) for t in (weights, *gradients))
    state, step = tree.map_with_path(place, tx.init(weights)), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = step(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), weights, want)
    moments = [x for path, x in tree.flatten(state).items() if path.endswith("layers/q")]
    assert all(x.sharding.spec[:3] == (None, "fsdp", "tensor") for x in moments) and (moments or name == "adafactor")


def test_the_learning_rate_follows_the_schedule():
    weights, gradient = random_tree(0), random_tree(1)
    schedule = ScheduleConfig(name="linear", warmup=1)
    tx = make_optimizer(config("sgd", momentum=0.0, weight_decay=0.0, schedule=schedule), 3, AXES)
    path = [weights, *run(tx, weights, [gradient] * 3)]
    moved = [(b["layers"]["q"] - a["layers"]["q"]) / gradient["layers"]["q"] for a, b in pairwise(path)]
    np.testing.assert_allclose([-m.mean() for m in moved], [LR / 2, LR, LR / 2], rtol=1e-4)


def test_an_optimizer_from_outside(tmp_path, monkeypatch):
    source = "import optax\ndef signed(config, axes):\n    return optax.scale(config.momentum * len(axes))\n"
    (tmp_path / "outside_optimizer.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    tx = make_optimizer(config("outside_optimizer:signed", momentum=0.5, weight_decay=0.0), 10, AXES)
    updates, _ = tx.update(random_tree(1), tx.init(random_tree(0)), random_tree(0))
    want = -LR * 0.5 * 6 * random_tree(1)["layers"]["norm"]
    np.testing.assert_allclose(updates["layers"]["norm"], want, rtol=1e-5)


@pytest.mark.parametrize("name", ["no_such_module:NAME", "math:no_such_name"])
def test_an_outside_name_that_is_not_there(name):
    with pytest.raises(SettingsError, match=f"optim.name={name}.*package.module:NAME"):
        make_optimizer(config(name), 10, AXES)
