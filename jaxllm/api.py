"""What the verbs of the command line do, as functions for a notebook: `load`, `train`, `generate`, `evaluate`."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from jaxllm import checkpoint, tree
from jaxllm import config as settings_of
from jaxllm.data.config import DataConfig
from jaxllm.data.prepare import prepare_source
from jaxllm.data.sources import Source
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import CheckpointError
from jaxllm.generate.text import TextGeneration, generate_text, stream_text
from jaxllm.model.build import Model, Params, build, check_tokens
from jaxllm.model.spec import ModelConfig
from jaxllm.sharding import ParallelConfig, Sharding, make_sharding
from jaxllm.train import loop
from jaxllm.train.config import RunConfig, load_run
from jaxllm.train.evaluate import Evaluator

log = logging.getLogger("jaxllm")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained model in hand: `jax.grad` through `model.apply`, change `params`, anything."""

    model: Model
    params: Params
    tokenizer: Tokenizer
    step: int
    """Training steps behind the weights."""


def load(path: str | Path, *, step: int | None = None, parallel: ParallelConfig | None = None, ema=False) -> Loaded:
    """The model of a run folder, a folder of checkpoints, or one step; the newest whole step unless one is named.

    A damaged newest step is said in a line, and the one before is taken.

    `parallel`: mesh to load onto, of any size (default: all devices, `fsdp=-1`). `ema`: the averaged weights.
    Raises CheckpointError when there is none, when it is damaged, or when its tokenizer is not the one beside it.
    """
    newest, meta = checkpoint.read_meta(path, step)
    sharding = make_sharding(parallel)
    model = _model(path, meta, sharding)
    restored = checkpoint.load(path, model.abstract, step=step)
    if restored.step != newest:  # it was damaged; the one before may belong to another stage
        model, meta = _model(path, restored.meta, sharding), restored.meta
    params = _averaged(path, restored, model.abstract) if ema else restored.state
    tokenizer = Tokenizer.load(_beside(path) / "tokenizer")
    if tokenizer.hash != meta["tokenizer"]:
        raise CheckpointError(
            f"the tokenizer in {_beside(path)} is not the one of the checkpoint (hash {tokenizer.hash[:12]}, the "
            f"checkpoint's {meta['tokenizer'][:12]}); put that one back"
        )
    return Loaded(model, params, tokenizer, restored.step)


def _averaged(path, restored: checkpoint.Restored, abstract: Params) -> Params:
    """The averaged weights; those that were not trained have no average and are as they were."""
    chosen, _ = tree.partition(abstract, tree.select(abstract, restored.meta["settings"]["train"]["trainable"]))
    averages = checkpoint.load(path, chosen, step=restored.step, part="extra/ema").state
    return tree.combine(averages, restored.state)


def _model(path, meta: dict, sharding: Sharding) -> Model:
    return build(settings_of.parse(ModelConfig, meta["model"], f"settings saved in {path}"), sharding)


def _beside(path: str | Path) -> epath.Path:
    """The folder that holds the tokenizer of a checkpoint path: that of the steps, or the run folder around it."""
    folder, _ = checkpoint.locate(path)
    return folder if (folder / "tokenizer").is_dir() else folder.parent


def train(config: RunConfig | dict | str | Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> loop.Result:
    """Trains by a RunConfig, a dict, or the path of a YAML file with `section.key=value` overrides.

    The run folder is `config.out`; a run that was stopped there goes on. Raises UserError.
    """
    if not isinstance(config, RunConfig):
        config, _ = load_run(config, overrides)
    return loop.train(config, quiet=quiet)


def generate(loaded: Loaded, prompts: str | Sequence[str], *, max_tokens: int = 128, **options) -> list[TextGeneration]:
    """Continues each prompt. Options: temperature (0 is greedy), top_k, top_p, min_p, seed, stop_ids."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    return generate_text(loaded.model, loaded.params, loaded.tokenizer, prompts, max_tokens=max_tokens, **options)


def stream(loaded: Loaded, prompt: str, *, max_tokens: int = 128, **options) -> Iterator[str]:
    """The continuation of one prompt in pieces of whole characters, as they are made; options as for `generate`."""
    return stream_text(loaded.model, loaded.params, loaded.tokenizer, prompt, max_tokens=max_tokens, **options)


def evaluate(
    loaded: Loaded, data: str | Sequence[str] | Source, *, seq_len: int | None = None, batch: int = 8, progress=None
) -> dict[str, Any]:
    """Perplexity and bits per byte of text: a path, several, or a Source.

    `seq_len`: tokens in a row, which is what a prediction can see; default: the model's context.
    Raises DataError for files that cannot be read, SettingsError for rows longer than learned positions.
    """
    seq_len = seq_len or loaded.model.config.context
    check_tokens(loaded.model.config, (), seq_len)
    if not isinstance(data, Source):
        data = Source(name="eval", path=data if isinstance(data, str) else tuple(data))
    where = Path(DataConfig(sources=(data,)).cache)
    store = prepare_source(data, loaded.tokenizer, where, say=log.info)
    ways = loaded.model.sharding.batch_size
    evaluator = Evaluator(loaded.model, {data.name: store}, seq_len=seq_len, batch=-(-batch // ways) * ways)
    found = evaluator(loaded.params, progress=progress)
    return found | {"documents": store.documents, "tokens": store.tokens, "bytes": store.text_bytes}
