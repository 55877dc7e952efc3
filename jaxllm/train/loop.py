"""A training run from settings to run folder. Data flows one way:

files -> token stores -> rows by number -> batches -> step -> metrics, evaluations, checkpoints -> run folder
"""

import contextlib
import time
from typing import Any

import jax

from jaxllm import config as settings_of
from jaxllm import tree
from jaxllm.adapt.changes import after, trainable
from jaxllm.checkpoint import Checkpoints, Preemption, Restored
from jaxllm.checkpoint.models import changes_of, meta_of
from jaxllm.checkpoint.reader import peek, steps_in
from jaxllm.checkpoint.together import check_same, first_says
from jaxllm.data.loader import Loader
from jaxllm.data.prepare import prepare
from jaxllm.data.sources import TURNS
from jaxllm.data.store import digest
from jaxllm.errors import CheckpointError, SettingsError
from jaxllm.model.build import Model, active_parameters, build
from jaxllm.model.spec import Kernels, ModelConfig
from jaxllm.optim.optimizers import make_optimizer
from jaxllm.optim.schedules import first_rate, make_schedule
from jaxllm.sharding import Sharding, join_processes, make_sharding
from jaxllm.train import memory, report
from jaxllm.train.config import RunConfig, Stage, shared
from jaxllm.train.evaluate import Evaluator, loss_of
from jaxllm.train.finish import Result, finish
from jaxllm.train.folder import RunFolder
from jaxllm.train.init import Origin, check_trainable, first_weights, origin_of
from jaxllm.train.lifeline import Lifeline
from jaxllm.train.method import Text
from jaxllm.train.metrics import flops_per_token, peak_flops
from jaxllm.train.preferences import Preferences
from jaxllm.train.progress import Show
from jaxllm.train.recorder import Recorder, TrainingStopped
from jaxllm.train.selfcheck import SelfCheck
from jaxllm.train.skips import documents_text
from jaxllm.train.step import TrainState, abstract_state, make_state, make_train_step
from jaxllm.train.streams import make_streams, renewed
from jaxllm.train.teacher import Distillation
from jaxllm.train.trace import Trace


def train(config: RunConfig, *, quiet: bool = False) -> Result:
    """Trains by the settings in their run folder, and goes on where an earlier call stopped.

    Raises UserError for what a user can mend; nothing is written over.
    """
    join_processes(config.parallel)  # before anything starts jax, as reading a checkpoint does
    with Lifeline():
        folder = RunFolder(config)
        show = Show(config.train.total_steps, quiet=quiet or jax.process_index() != 0)
        try:
            if folder.resumed:  # a new run takes its folder when it first writes there
                first_says(lambda: folder.lock() if folder.path.is_dir() else None)
            with memory.explained(config):
                return Trainer(config, folder, show).run()
        finally:
            show.close()
            folder.unlock()


class Trainer:
    """One run: its parts, made once, and the way through its stages."""

    def __init__(self, config: RunConfig, folder: RunFolder, show: Show):
        self.config, self.folder, self.show = config, folder, show
        check_same({"set of settings": shared(config)})
        self.sharding = make_sharding(config.parallel)
        self.stages = config.train.resolved_stages
        check_kernels(config.kernels, config.model, self.sharding)
        for stage in self.stages:
            check_batch(stage, config.train.accumulate, self.sharding)
            rows = stage.batch // config.train.accumulate // self.sharding.batch_size
            memory.check_rows(config.model, rows * stage.seq_len // self.sharding.mesh.shape["context"])
        self.origin = self.find_origin()
        self.model = self.model_of(self.stages[0])
        self.trainable = trainable(config.train.trainable, self.origin.changes)
        check_trainable(self.model, self.trainable)
        self.tx = make_optimizer(config.optim, config.train.total_steps, self.model.axes)
        spikes = config.train.skip_spikes is not None
        self.options = dict(trainable=self.trainable, ema=config.train.ema is not None, skip_spikes=spikes)
        self.abstract = abstract_state(self.model, self.tx, **self.options)
        memory.check_state(self.abstract, self.trainable)
        self.tokenizer = folder.open_tokenizer(show.say)
        self.method = (Preferences if config.dpo else Distillation if config.distill else Text)(self)
        self.data = self.method.data()
        self.stores = prepare(self.data, self.tokenizer, say=show.say)
        self.fingerprint = digest(sorted((name, store.fingerprint) for name, store in self.stores.items()))
        check_same({"tokenizer": self.tokenizer.hash, "text": self.fingerprint})
        self.streams = make_streams(self.data, self.stages, self.stores)
        self.total, self.active = active_parameters(config.model, self.plain_model(self.stages[0]).abstract)
        peak = peak_flops(jax.devices()[0].device_kind)
        schedule = make_schedule(config.optim, config.train.total_steps)
        self.recorder = Recorder(config, schedule, show, peak and peak * self.sharding.mesh.size)
        self.trace = Trace(config.profile.first_and_last, folder.path / "profile", show.say)
        self.status, self.opened = "finished", False

    def run(self) -> Result:
        """All stages, from the step that was saved last. Raises TrainingStopped when the run cannot go on."""
        saves = Checkpoints(self.folder.checkpoints, self.config.checkpoint, on_saved=self.folder.saved)
        with saves as self.checkpoints:
            stops = Preemption(idle=True, exit_code=self.config.checkpoint.preempted_exit_code)
            with stops as self.preemption, self.trace:
                started, state = time.monotonic(), self.start()
                for index, stage in enumerate(self.stages):
                    if self.status == "finished" and int(state.step) < self.first_step(index) + stage.steps:
                        state = self.run_stage(state, index)
                self.checkpoints.wait()
            result = finish(self, state, time.monotonic() - started)
        if self.status == "diverged":
            read = documents_text(self.config.train, self.streams, self.recorder.problem_at)
            raise TrainingStopped(f"{self.recorder.problem}. {read}")
        return result

    def find_origin(self) -> Origin:
        """Where the weights come from; a run that has begun knows it from its own checkpoints."""
        if self.folder.resumed and steps_in(self.folder.checkpoints):
            meta = first_says(lambda: peek(self.folder.checkpoints))
            return Origin(None, meta.get("family"), changes_of(meta, str(self.folder.path)), ())
        return origin_of(self.config.train.init, self.config.changes)

    def start(self) -> TrainState:
        """The saved state, or a new one; nothing is written yet."""
        restored = self.checkpoints.restore(self.abstract) if self.folder.resumed else None
        if restored is not None:
            return self.go_on(restored)
        if self.folder.resumed:
            first_says(self.folder.refuse_to_start_over)
            self.show.say(f"{self.folder.path} has no checkpoint yet: starting at step 0")
        self.checkpoints.check_space(self.abstract)
        for one in self.origin.before:
            self.show.say(f"{self.origin.init} comes with a change of its weights, which stays: {one}")
        key, params = jax.random.key(self.config.train.seed), None
        if self.config.train.init is not None or self.origin.changes:
            params = first_weights(self.origin, self.plain_model(self.stages[0]), self.tokenizer, key)
        self.method.prepare(params)
        return make_state(self.model, self.tx, key, params=params, **self.options)

    def go_on(self, restored: Restored) -> TrainState:
        """The restored state; an evaluation that its step was saved before is made up for."""
        state, meta, step = restored
        self.check_meta(meta)
        self.method.resume()
        stage = self.stages[meta["position"]["stage"]]
        self.model = self.model_of(stage)
        if self.recorder.resume(meta["best"], meta["since_best"]):
            self.status = "stopped early"
        self.show.say(f"resumed {self.folder.path} at step {step}")
        self.show.begin(step)
        if meta.get("unevaluated") and (evaluator := self.evaluator(stage)):
            self.open(state)
            self.evaluate(step, state, evaluator)
        return state

    def open(self, state: TrainState) -> None:
        """Writes into the run folder for the first time: all that a user can get wrong has been found by now."""
        if not self.opened:
            first_says(lambda: self._open(int(state.step)))
            self.opened = True

    def _open(self, step: int) -> None:
        if not (self.folder.resumed and self.folder.settings.exists()):
            self.folder.write_start(self.tokenizer)
        if step == 0:
            self.method.write()
        self.recorder.open(self.folder.path, step if self.folder.resumed else None)

    def run_stage(self, state: TrainState, index: int) -> TrainState:
        """Trains to the end of a stage, or to where the run is to stop."""
        stage = self.stages[index]
        self.model = self.model_of(stage)
        end, tokens = self.first_step(index) + stage.steps, stage.batch * stage.seq_len
        with contextlib.closing(self.loader(index, done=int(state.step) - self.first_step(index))) as loader:
            self.method.begin(index, stage)
            batch = self.next_batch(loader)
            step_fn = self.compile(state, batch)
            evaluator, flops = self.evaluator(stage), self.flops_per_token(stage)
            self.open(state)
            self.show.say(self.headline(index))
            checks = self.check(state, batch) if self.config.self_check and int(state.step) == 0 else []
            self.recorder.meter.skip()
            for step in range(int(state.step) + 1, end + 1):
                self.trace.before(step)
                self.preemption.begin()
                with memory.within_step():
                    state, metrics = step_fn(state, batch)
                while checks:
                    self.say_checked(checks.pop().after(state))
                if step < end:
                    batch = self.next_batch(loader)  # made while the step runs
                self.recorder.push(
                    step, metrics, tokens=tokens, flops=flops * tokens, tokens_in_all=self.tokens_at(step)
                )
                self.trace.after(step, metrics)
                self.after(step, state, evaluator)
                if self.status != "finished":
                    break
        return state

    def check(self, state: TrainState, batch) -> list[SelfCheck]:
        """Looks at the first batch, in all processes at once; gives what is to be checked after the step.

        Raises TrainingError.
        """
        optim, dpo = self.config.optim, self.config.dpo
        checks = SelfCheck(
            self.model,
            self.method.objective,
            self.method.plain(),
            trainable=self.trainable,
            lr=first_rate(optim, self.config.train.total_steps),
            pairs=dpo is not None,
            from_reference=dpo is not None and dpo.reference is None,
            chat=all(source.format in TURNS for source in self.data.sources),
        )
        with self.show.waiting("self-check: compiling what looks at the first batch ..."):
            found = [checks.before(state.params, batch), *self.method.check(batch)]
        self.say_checked(found)
        return [checks]

    def next_batch(self, loader: Loader):
        """The next rows on the devices."""
        row = loader.position
        return self.method.complete(self.model.sharding.batch(next(loader)), row)

    def say_checked(self, found: list[str]) -> None:
        for line in found:
            self.show.say(f"self-check: {line}")

    def compile(self, state: TrainState, batch):
        """The training step of the current stage. Raises ResourceError when it needs too much memory."""
        step_fn = make_train_step(
            self.model,
            self.method.objective,
            self.tx,
            trainable=self.trainable,
            accumulate=self.config.train.accumulate,
            ema=self.config.train.ema,
            skip_spikes=self.config.train.skip_spikes,
            abstract=self.abstract,
        )
        with memory.within_step(), self.show.waiting("compiling the step: minutes for a large model ..."):
            compiled = step_fn.lower(state, batch).compile()
        memory.check_step(compiled)
        return compiled

    def after(self, step: int, state: TrainState, evaluator: Evaluator | None) -> None:
        """What may follow a step: a checkpoint, an evaluation, the end.

        The save comes first, so that nothing is lost where the evaluation fails; it is written while that one runs,
        and its loss is noted afterwards. With `keep_best` every evaluated step is saved, since the best one may be
        any of them. A preempted run has seconds left: an evaluation that falls on this very step waits for the next
        start. The last step is finished in any case.
        """
        last = step == self.config.train.total_steps
        evaluates = evaluator is not None and (last or step % self.config.train.eval_every == 0)
        saves = last or step % self.config.checkpoint.every == 0 or (evaluates and self.config.checkpoint.keep_best)
        if saves or evaluates:
            self.recorder.flush()
        if self.recorder.problem:
            self.status = "diverged"
        elif not last and self.preemption.reached(step):
            self.status = "preempted"
        if saves or self.status != "finished":
            self.save(step, state, unevaluated=evaluates)
        if evaluates and self.status == "finished":
            self.evaluate(step, state, evaluator)

    def save(self, step: int, state: TrainState, *, unevaluated: bool) -> None:
        self.recorder.flush()
        self.checkpoints.save(step, state, self.meta(step) | {"unevaluated": unevaluated})
        self.recorder.meter.skip()

    def evaluate(self, step: int, state: TrainState, evaluator: Evaluator) -> None:
        """The held-out loss of a step, on the same rows each time, so that the best one is the best."""
        last, rows = step == self.config.train.total_steps, self.config.train.eval_rows
        found = evaluator(state.params, rows=rows)
        if self.recorder.evaluated(step, self.tokens_at(step), found) and not last:
            self.status = "stopped early"
            self.save(step, state, unevaluated=False)
        if (last or self.status != "finished") and evaluator.samples(rows):
            self.recorder.heldout(step, self.tokens_at(step), evaluator(state.params))
        self.checkpoints.amend(step, self.meta(step), loss=loss_of(found))

    def plain_model(self, stage: Stage) -> Model:
        """The model of a stage with arrays for all weights."""
        return build(stage.model(self.config.model), self.sharding, self.config.kernels)

    def model_of(self, stage: Stage) -> Model:
        return after(self.plain_model(stage), self.origin.changes)

    def loader(self, index: int, done: int) -> Loader:
        """The rows of a stage from the exact one where it was left after `done` of its steps."""
        stage, stream = self.stages[index], self.streams[index]
        for name, rows in zip(stream.names, stream.sources, strict=True):
            if rows.news:
                self.show.say(f"{name}: {rows.news}")
        share, shares = self.sharding.share
        where = dict(start=done * stage.batch, process=share, processes=shares)
        return Loader(stream, stage.batch, prefetch=self.data.prefetch, **where)

    def evaluator(self, stage: Stage) -> Evaluator | None:
        stores = {name: self.stores[name] for name in self.config.data.eval_names}
        options = dict(seq_len=stage.seq_len, batch=self.rows_of(stage), truncate=self.config.data.truncate)
        return self.method.evaluator(self.model, stores, **options) if stores else None

    def rows_of(self, stage: Stage) -> int:
        """Rows of a microbatch."""
        return stage.batch // self.config.train.accumulate

    def meta(self, step: int) -> dict[str, Any]:
        """What a checkpoint says beside its arrays."""
        stage = next(i for i in range(len(self.stages)) if step <= self.first_step(i) + self.stages[i].steps)
        return {
            "settings": settings_of.to_dict(self.config),
            **meta_of(self.model, self.origin.changes, self.tokenizer, self.origin.family),
            "position": {"stage": stage, "row": (step - self.first_step(stage)) * self.stages[stage].batch},
            "data": self.fingerprint,
            "best": self.recorder.best,
            "since_best": self.recorder.since_best,
            "versions": report.versions(),
        }

    def check_meta(self, meta: dict[str, Any]) -> None:
        """A run goes on only with the tokenizer and the data it had. Raises CheckpointError."""
        if meta["tokenizer"] != self.tokenizer.hash:
            raise CheckpointError(
                f"{self.folder.tokenizer_dir} is not the tokenizer of this run's checkpoints "
                f"(hash {self.tokenizer.hash[:12]}, theirs {meta['tokenizer'][:12]}); put theirs back"
            )
        if meta["data"] != self.fingerprint:
            raise CheckpointError(
                f"the data of {self.folder.path} has changed since its checkpoints (fingerprint "
                f"{self.fingerprint[:12]}, theirs {meta['data'][:12]}); restore the files "
                "(and the teacher, where it answered prompts), or start a new run with train.init set to this one"
            )

    def first_step(self, index: int) -> int:
        """Steps of the run before a stage."""
        return sum(stage.steps for stage in self.stages[:index])

    def tokens_at(self, step: int) -> int:
        """Tokens read after this many steps."""
        done = 0
        for stage in self.stages:
            here = min(step, stage.steps)
            done, step = done + here * stage.batch * stage.seq_len, step - here
        return done

    def flops_per_token(self, stage: Stage) -> float:
        config = self.config.model
        layers = [(s.attn.heads, config.attention_dim(s.attn), s.attn.window) for s in config.layer_specs]
        return flops_per_token(self.active, layers, stage.seq_len)

    def headline(self, index: int) -> str:
        stage = self.stages[index]
        mesh = " x ".join(f"{axis} {n}" for axis, n in self.sharding.mesh.shape.items() if n > 1) or "1 device"
        new = renewed(self.streams, index)
        split = f" in {self.config.train.accumulate} microbatches" if self.config.train.accumulate > 1 else ""
        chosen, _ = tree.partition(self.model.abstract, tree.select(self.model.abstract, self.trainable))
        part = f", {tree.count(chosen):,} trained" if self.origin.changes else ""
        return (
            f"{self.total:,} parameters ({self.active:,} in matrix products{part}), {jax.devices()[0].device_kind}, "
            f"{mesh}\n"
            f"{stage.name}: {stage.steps} steps of {stage.batch} rows x {stage.seq_len} = "
            f"{stage.batch * stage.seq_len:,} tokens{split}"
            + f"; rows of another length, so from a new epoch of {', '.join(new)}" * bool(new)
            + f"; the model's context becomes {stage.seq_len}" * (stage.seq_len > self.config.model.context)
        )


def check_batch(stage: Stage, accumulate: int, sharding: Sharding) -> None:
    """Raises SettingsError when a microbatch does not divide over the devices that split the rows."""
    rows, ways = stage.batch // accumulate, sharding.batch_size
    if rows % ways:
        below = max(ways, rows // ways * ways) * accumulate
        raise SettingsError(
            f"{rows} rows in a microbatch (batch {stage.batch} / accumulate {accumulate}) do not divide over {ways} "
            f"devices (data x fsdp x expert); try train.batch={below} or {below + ways * accumulate}"
        )
    if stage.seq_len % sharding.mesh.shape["context"]:
        raise SettingsError(
            f"train.seq_len={stage.seq_len} does not divide over parallel.context={sharding.mesh.shape['context']}"
        )


def check_kernels(kernels: Kernels, model: ModelConfig, sharding: Sharding) -> None:
    """Raises SettingsError for a ring of keys and values where no devices share a row, and for experts on loan where
    no devices share experts, or each takes as many rows as the others."""
    if kernels.context == "ring" and sharding.mesh.shape["context"] == 1:
        raise SettingsError(
            "kernels.context=ring, but parallel.context=1 leaves rows whole; set parallel.context=2 or more, or "
            "kernels.context=gather"
        )
    if kernels.experts != "lend":
        return
    if sharding.mesh.shape["expert"] == 1:
        raise SettingsError(
            "kernels.experts=lend, but with parallel.expert=1 every device has all experts; set parallel.expert=2 or "
            "more, or kernels.experts=wait"
        )
    if not model.dropless:
        raise SettingsError(
            "kernels.experts=lend, but no layer of the model has experts without a capacity_factor, and with one all "
            "compute as many rows; set kernels.experts=wait"
        )
