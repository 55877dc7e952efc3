"""A training run from settings to run folder. Data flows one way:

files -> token stores -> rows by number -> batches -> step -> metrics, evaluations, checkpoints -> run folder
"""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax

from jaxllm import config as settings_of
from jaxllm.checkpoint import Checkpoints, Preemption, load, read_meta
from jaxllm.data.loader import Loader
from jaxllm.data.mixture import mix
from jaxllm.data.prepare import prepare
from jaxllm.data.store import digest
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import CheckpointError, SettingsError
from jaxllm.model.build import Model, Params, active_parameters, build
from jaxllm.model.spec import with_rope
from jaxllm.objectives.lm import lm
from jaxllm.optim.optimizers import make_optimizer
from jaxllm.optim.schedules import make_schedule
from jaxllm.sharding import Sharding, join_processes, make_sharding
from jaxllm.train import memory, report
from jaxllm.train.config import RunConfig, Stage
from jaxllm.train.evaluate import Evaluator
from jaxllm.train.folder import RunFolder
from jaxllm.train.metrics import flops_per_token, peak_flops, peak_memory
from jaxllm.train.progress import Show
from jaxllm.train.recorder import Recorder
from jaxllm.train.runs import write_summary
from jaxllm.train.step import TrainState, abstract_state, make_state, make_train_step
from jaxllm.train.trace import Trace
from jaxllm.train.writers import read_jsonl


@dataclasses.dataclass(frozen=True)
class Result:
    """What `train` returns: everything needed to go on in a notebook."""

    status: str
    """finished, stopped early, or preempted."""
    model: Model
    params: Params
    tokenizer: Tokenizer
    folder: Path
    summary: dict[str, Any]
    saved: bool
    """Whether the last checkpoint was saved."""
    config: RunConfig


def train(config: RunConfig, *, quiet: bool = False) -> Result:
    """Trains by the settings in their run folder, and goes on where an earlier call stopped.

    Raises UserError for what a user can mend; nothing is written over.
    """
    folder = RunFolder(config)
    join_processes(config.parallel)
    show = Show(config.train.total_steps, quiet=quiet or jax.process_index() != 0)
    try:
        if folder.resumed and folder.path.is_dir() and jax.process_index() == 0:
            folder.lock()  # a new run takes its folder when it first writes there
        return Trainer(config, folder, show).run()
    finally:
        show.close()
        folder.unlock()


class Trainer:
    """One run: its parts, made once, and the way through its stages."""

    def __init__(self, config: RunConfig, folder: RunFolder, show: Show):
        self.config, self.folder, self.show = config, folder, show
        self.sharding = make_sharding(config.parallel)
        self.stages = config.train.resolved_stages
        for stage in self.stages:
            check_batch(stage, config.train.accumulate, self.sharding)
        self.model = self.model_of(self.stages[0])
        self.tx = make_optimizer(config.optim, config.train.total_steps, self.model.axes)
        self.options = dict(trainable=config.train.trainable, ema=config.train.ema is not None)
        self.abstract = abstract_state(self.model, self.tx, **self.options)
        memory.check_state(self.abstract)
        self.tokenizer = folder.open_tokenizer(show.say)
        self.stores = prepare(config.data, self.tokenizer, say=show.say)
        self.fingerprint = digest(sorted((name, store.fingerprint) for name, store in self.stores.items()))
        self.total, self.active = active_parameters(config.model, self.model.abstract)
        peak = peak_flops(jax.devices()[0].device_kind)
        schedule = make_schedule(config.optim, config.train.total_steps)
        self.recorder = Recorder(config, schedule, show, peak and peak * self.sharding.mesh.size)
        self.trace = Trace(config.log.profile_steps, folder.path / "profile", show.say)
        self.status, self.opened = "finished", False

    def run(self) -> Result:
        """All stages, from the step that was saved last."""
        with Checkpoints(self.folder.checkpoints, self.config.checkpoint) as self.checkpoints:
            with Preemption() as self.preemption, self.trace:
                started, state = time.monotonic(), self.start()
                for index, stage in enumerate(self.stages):
                    if self.status == "finished" and int(state.step) < self.first_step(index) + stage.steps:
                        state = self.run_stage(state, index)
                self.recorder.close()
                self.checkpoints.wait()
            return self.finish(state, time.monotonic() - started)

    def start(self) -> TrainState:
        """The saved state, or a new one; nothing is written yet."""
        restored = self.checkpoints.restore(self.abstract) if self.folder.resumed else None
        if restored is not None:
            self.check_meta(restored.meta)
            self.model = self.model_of(self.stages[restored.meta["position"]["stage"]])
            if self.recorder.resume(restored.meta["best"], restored.meta["since_best"]):
                self.status = "stopped early"
            self.show.say(f"resumed {self.folder.path} at step {restored.step}")
            return restored.state
        if self.folder.resumed:
            self.show.say(f"{self.folder.path} has no checkpoint yet: starting at step 0")
        self.checkpoints.check_space(self.abstract)
        key = jax.random.key(self.config.train.seed)
        return make_state(self.model, self.tx, key, params=self.first_weights(), **self.options)

    def first_weights(self) -> Params | None:
        """Those of `train.init`. Raises CheckpointError when they know another tokenizer."""
        init = self.config.train.init
        if init is None:
            return None
        _, meta = read_meta(init)
        if meta["tokenizer"] != self.tokenizer.hash:
            raise CheckpointError(
                f"train.init={init} was trained with another tokenizer (hash {meta['tokenizer'][:12]}, here "
                f"{self.tokenizer.hash[:12]}); set data.tokenizer to the folder tokenizer/ of that run"
            )
        return load(init, self.model.abstract).state

    def open(self, state: TrainState) -> None:
        """Writes into the run folder for the first time: all that a user can get wrong has been found by now."""
        if self.opened or jax.process_index() != 0:
            return
        if not (self.folder.resumed and self.folder.settings.exists()):
            self.folder.write_start(self.tokenizer)
        self.recorder.open(self.folder.path, int(state.step) if self.folder.resumed else None)
        self.opened = True

    def run_stage(self, state: TrainState, index: int) -> TrainState:
        """Trains to the end of a stage, or to where the run is to stop."""
        stage = self.stages[index]
        self.model = self.model_of(stage)
        end, tokens = self.first_step(index) + stage.steps, stage.batch * stage.seq_len
        with contextlib.closing(self.loader(index, done=int(state.step) - self.first_step(index))) as loader:
            batch = self.model.sharding.batch(next(loader))
            step_fn = self.compile(state, batch)
            evaluator, flops = self.evaluator(stage), self.flops_per_token(stage)
            self.open(state)
            self.show.say(self.headline(stage))
            self.recorder.meter.skip()
            for step in range(int(state.step) + 1, end + 1):
                self.trace.before(step)
                state, metrics = step_fn(state, batch)
                if step < end:
                    batch = self.model.sharding.batch(next(loader))  # made while the step runs
                self.recorder.push(
                    step, metrics, tokens=tokens, flops=flops * tokens, tokens_in_all=self.tokens_at(step)
                )
                self.trace.after(step, metrics)
                self.after(step, state, evaluator)
                if self.status != "finished":
                    break
        return state

    def compile(self, state: TrainState, batch):
        """The training step of the current stage. Raises ResourceError when it needs too much memory."""
        step_fn = make_train_step(
            self.model,
            lambda *args: lm(*args, z_loss=self.config.train.z_loss),
            self.tx,
            trainable=self.config.train.trainable,
            accumulate=self.config.train.accumulate,
            ema=self.config.train.ema,
        )
        compiled = step_fn.lower(state, batch).compile()
        memory.check_step(compiled)
        return compiled

    def after(self, step: int, state: TrainState, evaluator: Evaluator | None) -> None:
        """What may follow a step: an evaluation, a checkpoint, the end.

        A preempted run has seconds left and leaves out an evaluation that falls on this very step; the last step
        is finished in any case.
        """
        config, last, loss = self.config.train, step == self.config.train.total_steps, None
        if not last and self.preemption.reached(step):
            self.status = "preempted"
        elif evaluator and (last or step % config.eval_every == 0):
            self.recorder.flush()
            found = evaluator(state.params, rows=config.eval_rows)
            loss = found["heldout_loss"]  # on the same rows each time, so that the best one is the best
            if self.recorder.evaluated(step, self.tokens_at(step), found) and not last:
                self.status = "stopped early"
            if last and config.eval_rows is not None:
                self.recorder.heldout(step, self.tokens_at(step), evaluator(state.params))
        if last or self.status != "finished" or step % self.config.checkpoint.every == 0:
            self.recorder.flush()
            self.checkpoints.save(step, state, self.meta(step), loss=loss)
            self.recorder.meter.skip()

    def model_of(self, stage: Stage) -> Model:
        """The model of a stage: the same weights, perhaps another RoPE and a longer context."""
        config = dataclasses.replace(self.config.model, context=max(self.config.model.context, stage.seq_len))
        if stage.rope is not None:
            config = with_rope(config, **settings_of.to_dict(stage.rope))
        return build(config, self.sharding, self.config.kernels)

    def loader(self, index: int, done: int) -> Loader:
        """The rows of a stage from the exact one where it was left after `done` of its steps."""
        stage, data = self.stages[index], self.config.data
        weights = stage.weights or data.weights
        stores = {name: store for name, store in self.stores.items() if weights.get(name)}
        stream = mix(stores, weights, stage.seq_len, seed=data.seed + index, pack=data.pack, shuffle=data.shuffle)
        for name, rows in zip(stream.names, stream.sources, strict=True):
            documents, tokens = rows.cut
            if documents:
                self.show.say(f"{name}: {documents} documents are longer than {stage.seq_len}; {tokens} tokens unused")
        where = dict(process=jax.process_index(), processes=jax.process_count())
        return Loader(stream, stage.batch, start=done * stage.batch, prefetch=data.prefetch, **where)

    def evaluator(self, stage: Stage) -> Evaluator | None:
        stores = {name: self.stores[name] for name in self.config.data.eval_names}
        rows = stage.batch // self.config.train.accumulate
        return Evaluator(self.model, stores, seq_len=stage.seq_len, batch=rows) if stores else None

    def meta(self, step: int) -> dict[str, Any]:
        """What a checkpoint says beside its arrays."""
        stage = next(i for i in range(len(self.stages)) if step <= self.first_step(i) + self.stages[i].steps)
        row = (step - self.first_step(stage)) * self.stages[stage].batch
        return {
            "settings": settings_of.to_dict(self.config),
            "model": settings_of.to_dict(self.model.config),
            "position": {"stage": stage, "row": row},
            "tokenizer": self.tokenizer.hash,
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
                f"{self.fingerprint[:12]}, theirs {meta['data'][:12]}); restore the files, "
                "or start a new run with train.init set to this one"
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
        layers = [(spec.attn.heads, config.head_dim(spec.attn), spec.attn.window) for spec in config.layer_specs]
        return flops_per_token(self.active, layers, stage.seq_len)

    def headline(self, stage: Stage) -> str:
        mesh = " x ".join(f"{axis} {n}" for axis, n in self.sharding.mesh.shape.items() if n > 1) or "1 device"
        split = f" in {self.config.train.accumulate} microbatches" if self.config.train.accumulate > 1 else ""
        return (
            f"{self.total:,} parameters ({self.active:,} in matrix products), {jax.devices()[0].device_kind}, {mesh}\n"
            f"{stage.name}: {stage.steps} steps of {stage.batch} rows x {stage.seq_len} = "
            f"{stage.batch * stage.seq_len:,} tokens{split}"
        )

    def finish(self, state: TrainState, seconds: float) -> Result:
        """Summary, loss curve and run card."""
        step, speed = int(state.step), self.recorder.meter.mean()
        summary = {"params": self.total, "steps": step, "tokens": self.tokens_at(step), "seconds": round(seconds, 1)}
        summary |= speed | {"skipped": int(state.extra["skipped"])}
        path = self.folder.path
        if jax.process_index() == 0:
            rows = read_jsonl(self.folder.metrics)
            shown = ("loss", "heldout_loss", "perplexity", "bits_per_byte")
            summary |= {key: value for row in rows for key, value in row.items() if key in shown}
            write_summary(path, self.status, **summary)
            if rows:
                report.plot_loss(rows, path / "loss.png", path.name)
            (path / "card.md").write_text(self.card(summary, speed), encoding="utf-8")
        saved = self.checkpoints.failed is None
        return Result(self.status, self.model, state.params, self.tokenizer, path, summary, saved, self.config)

    def card(self, summary: dict[str, Any], speed: dict[str, float]) -> str:
        flops, length = self.flops_per_token(self.stages[-1]), self.stages[-1].seq_len
        sizes = {name: f"{s.documents:,} documents, {s.tokens:,} tokens" for name, s in self.stores.items()}
        return report.run_card(
            name=self.folder.path.name,
            settings=settings_of.changed(self.config),
            git=report.git_state(Path.cwd(), Path(__file__).parent),
            data={"fingerprint": self.fingerprint} | sizes,
            devices=f"{self.sharding.mesh.size} x {jax.devices()[0].device_kind} ({jax.default_backend()})",
            parameters={"total": self.total, "active": self.active},
            flops={"per_token": flops, "active": self.active, "length": length},
            speed=speed,
            memory=peak_memory(),
            final=summary,
        )


def check_batch(stage: Stage, accumulate: int, sharding: Sharding) -> None:
    """Raises SettingsError when a microbatch does not divide over the devices that split the rows."""
    rows, ways = stage.batch // accumulate, sharding.batch_size
    if ways % jax.process_count():
        raise SettingsError(
            f"{jax.process_count()} processes read rows of their own, but the mesh splits rows {ways} ways "
            f"(data x fsdp x expert); make parallel.data or parallel.fsdp a multiple of {jax.process_count()}"
        )
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
