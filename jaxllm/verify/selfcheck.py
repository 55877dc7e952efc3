"""Row 15: the self-check before the first step finds nothing where nothing is wrong, and each fault planted for it.

Every objective passes on a small model in this process. Then a fault is put into the running code, or into what it is
given, and the check has to stop the run and to name it.
"""

import contextlib
import dataclasses
import functools
import re
import types
from collections.abc import Callable, Iterator

from jaxllm.errors import TrainingError
from jaxllm.verify.lab import Found, Lab

VOCAB, ROWS, LENGTH = 61, 4, 32


def planted(lab: Lab) -> Found:
    """On by default for every objective; each without a fault, and every fault."""
    failures = [f"runs of {name} do not look at their first batch by default" for name in _off_by_default()]
    for name in PASSES:
        if error := _stopped(name, contextlib.nullcontext()):
            failures.append(f"{name}, without a fault: {error}")
    for number, (what, objective, plant, said) in enumerate(FAULTS):
        if number == 6:
            _forget()  # programs of planted faults are of no more use
        error = _stopped(objective, plant())
        if error is None or not re.search(said, error):
            failures.append(f"{what} ({objective}): {error or 'not noticed'}")
    _forget()
    caught = len(FAULTS) - sum(text.startswith(tuple(f"{what} (" for what, *_ in FAULTS)) for text in failures)
    figure = f"{len(PASSES)} kinds of runs looked at without a fault, {caught} of {len(FAULTS)} planted faults caught"
    return Found(len(PASSES) + len(FAULTS), tuple(failures), figure)


#: What makes a run of text one of another objective.
SETTINGS = {
    "text": [],
    "conversations": ["data.sources.0.format=chat"],
    "preferences": ["data.sources.0.format=pairs", "data.eval_sources=[]", "dpo.beta=0.5", "train.init=absent"],
    "teachers": ["distill.teacher=absent"],
}


def _off_by_default() -> list[str]:
    """The objectives whose runs leave the self-check out unasked."""
    from jaxllm.train.load import load_run

    return [name for name, overrides in SETTINGS.items() if not load_run("demo", overrides)[0].self_check]


def _forget() -> None:
    import jax

    jax.clear_caches()


def _stopped(objective: str, plant) -> str | None:
    """What the self-check says when it stops a run of this objective, whose first step moves every trainable weight."""
    with plant as change:
        run = Run(objective)
        if change:
            change(run)
        try:
            run.check.before(run.params, run.batch)
            run.check.after(types.SimpleNamespace(params=run.step(run.params), extra={"skipped": 0}))
            run.teacher.check(run.batch) if run.teacher else None
        except TrainingError as error:
            return str(error)
    return None


class Run:
    """A small model, a batch and the self-check, as the training loop puts them together."""

    def __init__(self, objective: str):
        from jaxllm.train.selfcheck import SelfCheck

        self.model, loss, plain, options = OBJECTIVES[objective]()
        self.params, self.batch, self.teacher = _weights(self.model), _batch(objective == "preferences"), None
        self.trainable = options.setdefault("trainable", "!embed")
        if objective == "preferences":
            self.batch = _with_reference(self.model, self.params, self.batch)
        if objective == "teacher":
            self.teacher, self.batch = _taught(self.model, self.params, self.batch)
        self.check = SelfCheck(self.model, loss, plain, lr=1e-3, **options)

    def step(self, params):
        """Weights after a step, as it should be."""
        from jaxllm import tree

        return tree.map_with_path(lambda path, x: x + 0.01 if tree.matches(self.trainable, path) else x, params)


def _model(moe: dict | None = None, attn: dict | None = None, **more):
    import jax

    from jaxllm.config import parse
    from jaxllm.model.build import build
    from jaxllm.model.spec import ModelConfig
    from jaxllm.sharding import ParallelConfig, make_sharding

    layer = {"attn": {"heads": 2, "kv_heads": 1} | (attn or {})}
    layer |= {"moe": {"experts": 4, "ffw": 16} | moe} if moe is not None else {"mlp": {"ffw": 24}}
    raw = {"vocab": VOCAB, "embed": 16, "layers": 1, "pattern": [layer], "context": LENGTH}
    return build(parse(ModelConfig, raw | more), make_sharding(ParallelConfig(), jax.devices("cpu")[:1]))


def _weights(model):
    """Weights with nothing at its neutral start, drawn without a program for it."""
    import jax
    import numpy as np

    random = np.random.default_rng(0)

    def draw(leaf):
        return jax.device_put((0.3 * random.standard_normal(leaf.shape)).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(draw, model.abstract)


def _batch(pairs: bool):
    """Packed rows of three or four documents and some padding; the first third of each is a prompt."""
    import jax
    import numpy as np

    from jaxllm.data.batch import TokenBatch

    random, T = np.random.default_rng(1), LENGTH
    ids = random.integers(0, VOCAB, (ROWS, T + 1)).astype(np.int32)
    tokens, targets = ids[:, :-1].copy(), ids[:, 1:].copy()
    mask, (positions, segments) = np.zeros((ROWS, T), np.float32), np.zeros((2, ROWS, T), np.int32)
    for row in range(ROWS):
        cuts = [0, 7, 14, 22, 29] if pairs else [0, 9 + row, 20 + row, 30]
        for number, (first, stop) in enumerate(zip(cuts, cuts[1:], strict=False), 1):
            segments[row, first:stop], positions[row, first:stop] = number, np.arange(stop - first)
            mask[row, first + (stop - first) // 3 : stop - 1] = 1
    return jax.device_put(TokenBatch(tokens, targets, mask, positions, segments))


def _with_reference(model, params, batch):
    import jax

    from jaxllm.objectives.logprobs import token_logprobs

    found = jax.jit(functools.partial(token_logprobs, model))(params, batch)
    return dataclasses.replace(batch, reference_BT=found)


def _taught(model, params, batch):
    """A teacher that is the model itself, and the batch with what it says."""
    import jax

    from jaxllm.objectives.distill import DistillConfig, teach
    from jaxllm.train.teacher import Teacher

    teacher = Teacher.__new__(Teacher)
    teacher.vocab = VOCAB
    step = jax.jit(functools.partial(teach, model, config=DistillConfig(teacher="none", top_k=8), vocab=VOCAB))
    teacher._step = lambda batch: step(jax.tree.map(lambda x: 1.5 * x, params), batch)
    ids, logprobs = teacher._step(batch)
    return teacher, dataclasses.replace(batch, top_ids_BTN=ids, top_logprobs_BTN=logprobs)


def _text(**more):
    from jaxllm.objectives.lm import lm
    from jaxllm.train import plain

    return _model(**more), functools.partial(lm, z_loss=1e-3), functools.partial(plain.text, z_loss=1e-3), {}


def _preferences():
    from jaxllm.objectives.dpo import DpoConfig, dpo
    from jaxllm.train import plain

    loss = functools.partial(dpo, config=DpoConfig(beta=0.5))
    options = {"pairs": True, "from_reference": True}
    return _model(), loss, functools.partial(plain.preference, beta=0.5, smoothing=0.0), options


def _teacher():
    from jaxllm.objectives.distill import DistillConfig, distill
    from jaxllm.train import plain

    loss = functools.partial(distill, config=DistillConfig(teacher="none", top_k=8, temperature=2.0))
    return _model(), loss, functools.partial(plain.teacher, weight=0.5, temperature=2.0), {}


def _rounded():
    """Weights that train as floats and are used rounded (quantisation-aware training)."""
    from jaxllm.adapt.changes import Change, after
    from jaxllm.adapt.quantize import QuantizeConfig
    from jaxllm.config import parse

    model, *rest = _text()
    qat = parse(QuantizeConfig, {"rules": [{"pattern": "layers/**", "format": "int8"}]})
    return after(model, (Change(qat=qat),)), *rest


OBJECTIVES: dict[str, Callable] = {
    "text": _text,
    "conversations": lambda: (*_text()[:3], {"chat": True}),
    "experts": lambda: _text(moe={"z_coef": 1e-3}),
    "learned positions": lambda: _text(attn={"rope": None}, positions="learned"),
    "a window": lambda: _text(attn={"window": 3}),
    "preferences": _preferences,
    "teacher": _teacher,
    "rounded weights": _rounded,
}

#: Of which of them a run without a fault is looked at.
PASSES = tuple(OBJECTIVES)


@contextlib.contextmanager
def replaced(where: str, name: str, make: Callable) -> Iterator[None]:
    """Within the block `name` of a module or class, `module` or `module:Class`, is `make(what it was)`."""
    import importlib

    module, _, inner = where.partition(":")
    owner = importlib.import_module(module)
    owner = getattr(owner, inner) if inner else owner
    whole = getattr(owner, name)
    setattr(owner, name, make(whole))
    try:
        yield
    finally:
        setattr(owner, name, whole)


def _attention(change: Callable):
    """Attention by the reference kernel, with another form or other places."""
    from jaxllm.kernels.reference import reference

    def make(_):
        return lambda q, k, v, form, where, heads, **how: reference(q, k, v, *change(form, where), heads)

    return replaced("jaxllm.model.attention", "attention", make)


def _sees_later_tokens():
    return _attention(lambda form, where: (form, where._replace(k_positions_BS=0 * where.k_positions_BS)))


def _sees_other_documents():
    # Positions of the row, as in code that knows no segments.
    def change(form, where):
        import jax.numpy as jnp

        index_BT = jnp.broadcast_to(jnp.arange(where.q_positions_BT.shape[1]), where.q_positions_BT.shape)
        return form, where._replace(
            q_positions_BT=index_BT, k_positions_BS=index_BT, q_segments_BT=None, k_segments_BS=None
        )

    return _attention(change)


def _sees_its_pair():
    def change(form, where):
        import jax.numpy as jnp

        index_BT = jnp.broadcast_to(jnp.arange(where.q_positions_BT.shape[1]), where.q_positions_BT.shape)
        pair_BT = (where.q_segments_BT + 1) // 2
        return form, where._replace(
            q_positions_BT=index_BT, k_positions_BS=index_BT, q_segments_BT=pair_BT, k_segments_BS=pair_BT
        )

    return _attention(change)


def _has_no_window():
    return _attention(lambda form, where: (dataclasses.replace(form, window=None), where))


def _positions_of_the_row():
    def make(whole):
        def apply(self, params, tokens_BT, *, positions_BT=None, **more):
            return whole(self, params, tokens_BT, positions_BT=None, **more)

        return apply

    return replaced("jaxllm.model.build:Model", "apply", make)


def _stops_the_gradient(path: str):
    def make(whole):
        def apply(self, params, tokens_BT, **more):
            import jax

            from jaxllm import tree

            stopped = tree.map_with_path(lambda p, x: jax.lax.stop_gradient(x) if p == path else x, params)
            return whole(self, stopped, tokens_BT, **more)

        return apply

    return replaced("jaxllm.model.build:Model", "apply", make)


def _learns_prompts():
    def make(whole):
        return lambda model, head, hidden, targets, mask, *z: whole(model, head, hidden, targets, 0 * mask + 1, *z)

    return replaced("jaxllm.objectives.lm", "cross_entropy", make)


def _learns_prompts_by_the_gradient_alone():
    """A gradient written by hand that has forgotten the mask; the loss is right."""

    def make(whole):
        def losses(logits, targets, mask, z_loss):
            return *whole(logits, targets, mask, z_loss)[:2], whole(logits, targets, 0 * mask + 1, z_loss)[2]

        return losses

    return replaced("jaxllm.objectives.lm", "_losses", make)


def _labels_of_the_token_itself():
    def make(whole):
        import jax.numpy as jnp

        return lambda model, head, hidden, targets, *more: whole(model, head, hidden, jnp.roll(targets, 1, 1), *more)

    return replaced("jaxllm.objectives.lm", "cross_entropy", make)


def _no_balance():
    return replaced("jaxllm.objectives.lm", "router_losses", lambda whole: lambda *args: (0.0, whole(*args)[1]))


def _no_z_loss():
    def make(whole):
        return lambda model, head, hidden, targets, mask, z_loss=0.0: whole(model, head, hidden, targets, mask)

    return replaced("jaxllm.objectives.lm", "cross_entropy", make)


def _balance_without_gradient():
    def make(whole):
        def losses(aux, mask_BT):
            import jax

            return whole(jax.lax.stop_gradient(aux), mask_BT)

        return losses

    return replaced("jaxllm.objectives.lm", "router_losses", make)


def _swapped():
    return replaced("jaxllm.objectives.dpo", "by_pair", lambda whole: lambda *args: whole(*args)[::-1])


@contextlib.contextmanager
def _given(change: Callable):
    """A fault in what the check is given."""
    yield change


def _step_that(moves: Callable[[str, object], object]):
    def change(run):
        from jaxllm import tree

        right = run.step
        run.step = lambda params: tree.map_with_path(
            lambda path, new, old: moves(path, new, old), right(params), params
        )

    return _given(change)


def _other_batch(**arrays):
    """`name=f(array)` of the batch."""

    def change(run):
        import jax

        new = {name: jax.numpy.asarray(f(getattr(run.batch, name))) for name, f in arrays.items()}
        run.batch = dataclasses.replace(run.batch, **new)

    return _given(change)


def _teacher_of_the_next_token():
    def change(run):
        import jax.numpy as jnp

        right = run.teacher._step
        run.teacher._step = lambda batch: tuple(jnp.roll(x, 1, axis=1) for x in right(batch))
        ids, logprobs = run.teacher._step(run.batch)
        run.batch = dataclasses.replace(run.batch, top_ids_BTN=ids, top_logprobs_BTN=logprobs)

    return _given(change)


def _rolled(x):
    import jax.numpy as jnp

    return jnp.roll(x, 1, axis=1)


#: What is planted, in a run of which objective, and what the error has to say.
FAULTS: tuple[tuple[str, str, Callable, str], ...] = (
    ("a mask that lets later tokens through", "text", _sees_later_tokens, "a later token reaches a document"),
    ("a mask that lets other documents through", "text", _sees_other_documents, "another document reaches"),
    ("a window that is ignored", "a window", _has_no_window, "a token beyond the window reaches"),
    ("positions that run on", "learned positions", _positions_of_the_row, "positions do not start over"),
    (
        "positions that run on in the rows",
        "text",
        lambda: _other_batch(positions_BT=lambda x: x + (x >= 0) * 3),
        "begins a document and is not at position 0",
    ),
    ("prompts that are learnt", "conversations", _learns_prompts, "a masked label reaches a document"),
    (
        "rows without prompts",
        "conversations",
        lambda: _other_batch(mask_BT=lambda x: 0 * x + 1, segments_BT=lambda x: x.clip(1)),
        "every token of the conversations is learnt|is not at the position before",
    ),
    (
        "a gradient that forgets the mask",
        "conversations",
        _learns_prompts_by_the_gradient_alone,
        "reaches a document: its loss or gradient changes",
    ),
    ("labels off by one in the rows", "text", lambda: _other_batch(targets_BT=_rolled), "has another label than"),
    ("labels off by one in the loss", "text", _labels_of_the_token_itself, "a masked label reaches|other labels"),
    ("a loss that balances experts, missing", "experts", _no_balance, "the loss that balances the experts is 0"),
    ("a loss that balances experts, without gradient", "experts", _balance_without_gradient, "does not reach"),
    ("a z-loss, missing", "text", _no_z_loss, r"a part of the loss is missing \(train.z_loss\)"),
    (
        "a weight without a gradient",
        "text",
        lambda: _stops_the_gradient("layers/0/attn/q"),
        "layers/0/attn/q is to train and has no gradient",
    ),
    (
        "a weight that does not move",
        "text",
        lambda: _step_that(lambda path, new, old: old if path == "layers/0/attn/o" else new),
        "layers/0/attn/o is to train and the first step has not moved it",
    ),
    (
        "a frozen weight that moves in one bit",
        "text",
        lambda: _step_that(lambda path, new, old: old.at[3, 2].multiply(1 + 2**-22) if path == "embed" else new),
        "embed is frozen and has moved",
    ),
    ("answers swapped", "preferences", _swapped, "the chosen and the rejected answer are swapped"),
    (
        "a pair whose answers see each other",
        "preferences",
        _sees_its_pair,
        "a later token reaches|reaches the rejected one",
    ),
    (
        "another reference",
        "preferences",
        lambda: _other_batch(reference_BT=lambda x: x + 0.1 * (x < x.mean())),
        "the reference is not the model",
    ),
    ("a teacher who speaks of the next token", "teacher", _teacher_of_the_next_token, "is not of its tokens"),
)
