"""The end of a run: its result, summary, loss curve and card."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

import jax

from jaxllm import config as settings_of
from jaxllm import tree
from jaxllm.checkpoint.together import first_says
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.model.build import Model, Params
from jaxllm.train import report
from jaxllm.train.config import RunConfig
from jaxllm.train.evaluate import LOSS, SAMPLE
from jaxllm.train.metrics import peak_memory
from jaxllm.train.runs import read_run, write_summary
from jaxllm.train.step import TrainState
from jaxllm.train.writers import read_jsonl

if typing.TYPE_CHECKING:
    from jaxllm.train.loop import Trainer

#: What the summary takes over from the metrics, the newest of each.
SHOWN = (
    "loss",
    *(name + of for of in ("", SAMPLE) for name in (LOSS, "perplexity", "bits_per_byte")),
    *(f"heldout_{name}{of}" for of in ("", SAMPLE) for name in ("accuracy", "margin")),
)


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


def finish(run: "Trainer", state: TrainState, seconds: float) -> Result:
    """Writes summary, loss curve and run card; those of a run that was over before stay as they are."""
    step, path, speed = int(state.step), run.folder.path, run.recorder.meter.mean()
    summary = {"params": run.total, "steps": step, "tokens": run.tokens_at(step), "seconds": round(seconds, 1)}
    if run.origin.changes:
        summary["trained"] = tree.count(tree.partition(state.params, tree.select(state.params, run.trainable))[0])
    summary |= speed | {"skipped": int(state.extra["skipped"])}
    before = first_says(lambda: read_run(path).summary if run.folder.summary.exists() else {})
    if not run.opened and (before.get("status"), before.get("steps")) == (run.status, step):
        summary = before
    else:
        run.open(state)
        run.recorder.close()
        if jax.process_index() == 0:
            rows = read_jsonl(run.folder.metrics)
            summary |= {key: value for row in rows for key, value in row.items() if key in SHOWN}
            write_summary(path, run.status, **summary)
            if any(key in row for row in rows for key in SHOWN):
                report.plot_loss(rows, path / "loss.png", path.name)
            (path / "card.md").write_text(_card(run, summary, speed), encoding="utf-8")
    saved = run.checkpoints.failed is None
    return Result(run.status, run.model, state.params, run.tokenizer, path, summary, saved, run.config)


def _card(run: "Trainer", summary: dict[str, Any], speed: dict[str, float]) -> str:
    flops, length = run.flops_per_token(run.stages[-1]), run.stages[-1].seq_len
    sizes = {name: f"{s.documents:,} documents, {s.tokens:,} tokens" for name, s in run.stores.items()}
    return report.run_card(
        name=run.folder.path.name,
        settings=settings_of.changed(run.config),
        git=report.git_state(Path.cwd(), Path(__file__).parent),
        data={"fingerprint": run.fingerprint} | sizes,
        devices=f"{run.sharding.mesh.size} x {jax.devices()[0].device_kind} ({jax.default_backend()})",
        parameters={"total": run.total, "active": run.active},
        flops={"per_token": flops, "active": run.active, "length": length},
        speed=speed,
        memory=peak_memory(),
        final=summary,
    )
