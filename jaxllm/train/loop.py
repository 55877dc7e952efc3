"""A training run from settings to run folder. Data flows one way:

files -> token stores -> rows by number -> batches -> step -> metrics, evaluations, checkpoints -> run folder
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax

from jaxllm import config as settings_of
from jaxllm.checkpoint import Checkpoints, Preemption, load
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


def train(config: RunConfig, *, quiet: bool = False) -> Result:
    """Trains by the settings in their run folder, and goes on where an earlier call stopped.

    Raises UserError for what a user can mend; nothing is written over.
    """
    show = Show(config.train.total_steps, quiet=quiet)
    try:
        return Trainer(config, show).run()
    finally:
        show.close()


class Trainer:
    """One run: its parts, made once, and the way through its stages."""

    def __init__(self, config: RunConfig, show: Show):
        self.config, self.show = config, show
        self.folder = RunFolder(config)
        join_processes(config.parallel)
        self.sharding = make_sharding(config.parallel)
        self.stages = config.train.resolved_stages
        for stage in self.stages:
            check_batch(stage, config.train.accumulate, self.sharding)
        self.tokenizer = self.folder.open_tokenizer(show.say)
        self.stores = prepare(config.data, self.tokenizer, say=show.say)
        self.fingerprint = digest(sorted((name, store.fingerprint) for name, store in self.stores.items()))
        self.model = self.model_of(self.stages[0])
        self.tx = make_optimizer(config.optim, config.train.total_steps, self.model.axes)
        self.total, self.active = active_parameters(config.model, self.model.abstract)
        peak = peak_flops(jax.devices()[0].device_kind)
        schedule = make_schedule(config.optim, config.train.total_steps)
        self.recorder = Recorder(config, schedule, show, peak and peak * self.sharding.mesh.size)
        self.status = "finished"

    def run(self) -> Result:
        """All stages, from the step that was saved last."""
        with Checkpoints(self.folder.checkpoints, self.config.checkpoint) as self.checkpoints:
            with Preemption() as self.preemption:
                started, state = time.monotonic(), self.start()
                self.recorder.open(self.folder.path, int(state.step) if self.folder.resumed else None)
                for index, stage in enumerate(self.stages):
                    if self.status == "finished" and int(state.step) < self.first_step(index) + stage.steps:
                        state = self.run_stage(state, index)
                self.recorder.close()
            self.checkpoints.wait()
            return self.finish(state, time.monotonic() - started)

    def start(self) -> TrainState:
        """The saved state, or a new one. All that can be wrong is found here, before anything is written."""
        options = dict(trainable=self.config.train.trainable, ema=self.config.train.ema is not None)
        abstract = abstract_state(self.model, self.tx, **options)
        memory.check_state(abstract)
        restored = self.checkpoints.restore(abstract) if self.folder.resumed else None
        if restored is not None:
            self.check_meta(restored.meta)
            self.recorder.best, self.recorder.since_best = restored.meta["best"], restored.meta["since_best"]
            self.show.say(f"resumed {self.folder.path} at step {restored.step}")
            return restored.state
        self.checkpoints.check_space(abstract)
        init = self.config.train.init
        params = load(init, self.model.abstract).state if init is not None else None
        state = make_state(self.model, self.tx, jax.random.key(self.config.train.seed), params=params, **options)
        self.folder.write_start(self.tokenizer)
        return state

    def run_stage(self, state: TrainState, index: int) -> TrainState:
        """Trains to the end of a stage, or to where the run is to stop."""
        stage, config = self.stages[index], self.config.train
        end = self.first_step(index) + stage.steps
        model = self.model = self.model_of(stage)
        loader = self.loader(index, done=int(state.step) - self.first_step(index))
        batch = model.sharding.batch(next(loader))
        step_fn = make_train_step(
            model,
            lambda *args: lm(*args, z_loss=config.z_loss),
            self.tx,
            trainable=config.trainable,
            accumulate=config.accumulate,
            ema=config.ema,
        )
        step_fn = step_fn.lower(state, batch).compile()
        memory.check_step(step_fn)
        evaluator, flops = self.evaluator(model, stage), self.flops_per_token(stage)
        tokens = stage.batch * stage.seq_len
        self.show.say(self.headline(stage))
        self.recorder.meter.skip()
        for step in range(int(state.step) + 1, end + 1):
            self.profile(step)
            state, metrics = step_fn(state, batch)
            if step < end:
                batch = model.sharding.batch(next(loader))  # made while the step runs
            self.recorder.push(step, metrics, tokens=tokens, flops=flops * tokens, tokens_in_all=self.tokens_at(step))
            if self.preemption.reached(step):
                self.status = "preempted"
            last = step == config.total_steps
            loss = None
            if evaluator and self.status == "finished" and (last or step % config.eval_every == 0):
                self.recorder.flush()
                found = evaluator(state.params, rows=None if last else config.eval_rows)
                loss = found["heldout_loss"]
                if self.recorder.evaluated(step, self.tokens_at(step), found) and not last:
                    self.status = "stopped early"
            if last or self.status != "finished" or step % self.config.checkpoint.every == 0:
                self.recorder.flush()
                self.checkpoints.save(step, state, self.meta(step), loss=loss)
                self.recorder.meter.skip()
            if self.status != "finished":
                break
        loader.close()
        return state

    def model_of(self, stage: Stage) -> Model:
        """The model of a stage: the same weights, perhaps another RoPE."""
        config = self.config.model
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

    def evaluator(self, model: Model, stage: Stage) -> Evaluator | None:
        stores = {name: self.stores[name] for name in self.config.data.eval_names}
        rows = stage.batch // self.config.train.accumulate
        return Evaluator(model, stores, seq_len=stage.seq_len, batch=rows) if stores else None

    def meta(self, step: int) -> dict[str, Any]:
        """What a checkpoint says beside its arrays."""
        stage = next(i for i in range(len(self.stages)) if step <= self.first_step(i) + self.stages[i].steps)
        row = (step - self.first_step(stage)) * self.stages[stage].batch
        return {
            "settings": settings_of.to_dict(self.config),
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

    def profile(self, step: int) -> None:
        """Starts and stops the profiler trace around the chosen steps."""
        chosen = self.config.log.profile_steps
        if chosen and step == chosen[0]:
            jax.profiler.start_trace(str(self.folder.path / "profile"))
        if chosen and step == chosen[1] + 1:
            jax.profiler.stop_trace()
            self.show.say(f"profiler trace of steps {self.config.log.profile} in {self.folder.path / 'profile'}")

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
        return Result(self.status, self.model, state.params, self.tokenizer, path, summary, saved)

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
