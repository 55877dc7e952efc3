"""What the verbs of the command line do, as functions for a notebook: `load`, `train`, `generate`, `evaluate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxllm.data.sources import Source
from jaxllm.errors import SettingsError
from jaxllm.evals.run import run_task
from jaxllm.evals.tasks import prompts, read_task
from jaxllm.generate.decode import power_of_two
from jaxllm.generate.text import Prompt, TextGeneration, TextStream, beam_text, generate_text, stream_text
from jaxllm.loaded import Loaded, export, gather, load, load_adapter, save, save_adapter, stores_of  # noqa: F401
from jaxllm.model.build import check_tokens
from jaxllm.smaller import compare, prune, quantize  # noqa: F401
from jaxllm.train import loop
from jaxllm.train.config import RunConfig
from jaxllm.train.evaluate import Evaluator
from jaxllm.train.load import load_run


def train(config: RunConfig | dict | str | Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> loop.Result:
    """Trains by a RunConfig, a dict, or the path of a YAML file with `section.key=value` overrides.

    The run folder is `config.out`; a run that was stopped there goes on. Raises UserError.
    """
    if not isinstance(config, RunConfig):
        config, _ = load_run(config, overrides)
    return loop.train(config, quiet=quiet)


def generate(
    loaded: Loaded, prompts: Prompt | Sequence[Prompt], *, max_tokens: int | Sequence[int] = 128, **options
) -> list[TextGeneration]:
    """Continues each prompt (text, or token ids), by sampling or, where `beams` is given, by beam search.

    Options of sampling: temperature (0 is greedy), top_k, top_p, min_p, typical_p, seed, repetition_penalty,
    frequency_penalty, presence_penalty, logit_bias, top_logprobs (see `generate.tokens.stream`), stop (strings).
    Options of beam search: beams, length_penalty. Of both: n (several results for a prompt), min_tokens, stop_ids,
    banned_ids, adapters (of a model that `gather` made: the adapter of each prompt, -1 for none).
    Raises SettingsError for what is out of range or would be ignored.
    """
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    make = beam_text if "beams" in options else generate_text
    texts = (loaded.tokenizer, [prompts] if one else prompts)
    return make(loaded.model, loaded.decoding, *texts, max_tokens=max_tokens, **options)


def stream(loaded: Loaded, prompt: Prompt, *, max_tokens: int = 128, **options) -> TextStream:
    """The continuation of one prompt in pieces of whole characters, as they are made; options of sampling."""
    return stream_text(loaded.model, loaded.decoding, loaded.tokenizer, prompt, max_tokens=max_tokens, **options)


def evaluate(
    loaded: Loaded,
    data: str | Source | Sequence[str | Source],
    *,
    seq_len: int | None = None,
    batch: int | None = None,
    progress=None,
) -> dict[str, Any]:
    """Perplexity and bits per byte of text: a path, several, a Source, or several, each also by itself (`KEY/NAME`).

    `seq_len`: tokens in a row, which is what a prediction can see; default: those of the longest document, at most the
    model's context. `batch`: rows at a time; default: up to 8 that hold 8,192 tokens.
    Raises DataError for files that cannot be read, SettingsError for rows longer than learned positions.
    """
    stores, ways = stores_of(loaded, data), loaded.model.sharding.batch_size
    longest = max(int(store.lengths.max()) for store in stores.values())
    seq_len = min(loaded.model.config.context, power_of_two(longest, 64)) if seq_len is None else seq_len
    check_tokens(loaded.model.config, (), seq_len)
    batch = max(1, min(8, 8192 // max(seq_len, 1))) if batch is None else batch
    evaluator = Evaluator(loaded.model, stores, seq_len=seq_len, batch=-(-batch // ways) * ways)
    found = evaluator(loaded.params, progress=progress)
    for key, of in (("documents", "documents"), ("tokens", "tokens"), ("bytes", "text_bytes")):
        sizes = {name: getattr(store, of) for name, store in stores.items()}
        found |= {key: sum(sizes.values())}
        found |= {f"{key}/{name}": size for name, size in sizes.items()} if len(sizes) > 1 else {}
    return found


def evaluate_tasks(
    loaded: Loaded,
    files: str | Path | Sequence[str | Path],
    *,
    shots: int = 0,
    shots_from: str | Path | None = None,
    seed: int | None = None,
    batch: int = 8,
) -> dict[str, dict[str, Any]]:
    """`{file: metrics}` of task files: multiple choice, cloze and exact match (`evals.tasks`, `evals.run.run_task`).

    Args:
      shots: examples before each question, the first ones of `shots_from` or else of the file itself, but never the
        question's own.
      seed: shuffles the examples first; default: as they stand in the file.
      batch: rows at a time.

    Raises DataError with file and line for what is wrong with an item, or does not fit into the model's context.
    """
    if shots < 0 or (not shots and (shots_from is not None or seed is not None)):
        raise SettingsError(f"shots={shots}: must not be negative, and without shots shots_from and seed are ignored")
    tasks = [read_task(file) for file in ([files] if isinstance(files, str | Path) else files)]
    pool = None if shots_from is None else read_task(shots_from)
    asked = [(task, prompts(task, shots, pool, seed)) for task in tasks]
    return {task.path: {"shots": shots} | run_task(loaded, task, texts, batch=batch) for task, texts in asked}
