"""`jaxllm parity`: does the model that we loaded compute what the published one does?

A published folder goes two ways that share no code but the errors: through the reader and the model of this package
in float32, and through the float64 reference from config.json and tensors. Where transformers is installed, it is a
third. T positions, V vocab.
"""

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import DataError, SettingsError, UserError, nearest
from jaxllm.families.keys import Keys
from jaxllm.families.registry import read_config
from jaxllm.hf.folder import Folder as OurFolder
from jaxllm.hf.open import open_published
from jaxllm.hf.quantized import dequantized
from jaxllm.hf.weights import read
from jaxllm.model.build import Model, Params, build
from jaxllm.parity import compare
from jaxllm.parity.folder import Folder
from jaxllm.parity.reference import forward
from jaxllm.parity.tensors import random_model
from jaxllm.parity.tiny import VARIANTS

#: Read by the model when no --text is given: prose, code, numbers and names of several scripts.
TEXT = """A model folder holds settings, weights and a tokenizer. Whoever opens it should get the function that was
published, to the last position. def area(radius): return 3.14159 * radius ** 2  # for i in range(10): print(i, area(i))
In 1969 it took eight days: 384,400 km out, as many back. Zürich, Αθήνα, Київ, 東京, مراكش and São Paulo are cities."""
#: Tokens compared at each place, and tokens of the perplexity.
LENGTH, LONGEST = 96, 512


@dataclasses.dataclass(frozen=True)
class Report:
    """What `parity` found for one model."""

    name: str
    rows: list[compare.Comparison]
    keys: Keys
    text: tuple[int, float] | None = None
    """Of a given text, whole: its tokens, and the perplexity that our model finds in windows of at most 512."""

    @property
    def holds(self) -> bool:
        return all(row.holds for row in self.rows)


def prove(path: str | Path, *, text: str | None = None, ignore_keys: tuple[str, ...] = ()) -> Report:
    """Compares a model in a Hugging Face folder or .gguf file with the reference, and with transformers if it is here.

    `text`: its first 512 tokens are read by both, and all of it by our model; default: a few lines.
    Raises UserError for what cannot be read.
    """
    published = open_published(path, ignore_keys=ignore_keys)
    if published is None:
        raise SettingsError(f"{path}: no config.json there and no .gguf file; give the folder of a published model")
    model, params = published.load()
    whole = _ids(published, text)
    longest = min(LONGEST, model.config.context)
    ids = whole[:longest]
    if str(path).endswith(".gguf"):  # the reference computes by itself, but gets config and tensors from our reader
        raw, tensors = published.raw, published.tensors()
        reference = _reference(raw, lambda name: tensors[name].map(), set(tensors))
    else:
        folder = Folder(path)
        raw, reference = folder.config, lambda ids, start: forward(folder.config, folder, ids, start)
    rows = _compare("reference", raw, ours(model, params), reference, ids)
    if (
        not str(path).endswith(".gguf")
        and importlib.util.find_spec("torch")
        and importlib.util.find_spec("transformers")
    ):
        rows += _beside("transformers", raw, ours(model, params), _transformers(path), reference, ids)
    found = None if text is None else (len(whole), _perplexity(ours(model, params), whole, longest))
    return Report(str(path), rows, published.keys, found)


def _perplexity(ours: compare.Logits, ids: np.ndarray, longest: int) -> float:
    """Every token but the first is predicted once, from those before it in its window."""
    windows = [ids[start : start + longest] for start in range(0, len(ids) - 1, longest - 1)]
    nats = sum((len(window) - 1) * np.log(compare.perplexity(ours(window, 0), window)) for window in windows)
    return float(np.exp(nats / (len(ids) - 1)))


def prove_family(variant: str, *, change: Callable[[dict], dict] = lambda raw: raw, seed: int = 0) -> Report:
    """The same for a small random model. `change` edits the config.json that our side reads (to plant a fault)."""
    raw, arrays = random_model(variant, seed)
    family, config, keys = read_config(change(raw))
    model = build(config)
    params = read(model, family, dequantized(Held(arrays), raw))
    ids = np.random.default_rng(seed).integers(0, config.vocab, 40).astype(np.int32)
    reference = _reference(raw, arrays.__getitem__, set(arrays))
    return Report(variant, _compare(variant, raw, ours(model, params), reference, ids), keys)


def variants(family: str) -> list[str]:
    """The random models of a family's name, or of all. Raises SettingsError."""
    chosen = [name for name in VARIANTS if family in ("all", name, name.split("-")[0], VARIANTS[name]["model_type"])]
    if not chosen:
        raise SettingsError(f"no family {family}{nearest(family, [*VARIANTS, 'all'])}")
    return chosen


def _compare(name: str, raw: dict, ours, other, ids) -> list[compare.Comparison]:
    short = ids[:LENGTH]
    rows = compare.compare_all(name, ours, other, short, compare.starts(raw, len(short)))
    if len(ids) > LENGTH:
        rows += compare.compare_all(f"{name}, {len(ids)} tokens of text", ours, other, ids, [0])
    return rows


#: What another implementation may miss the reference by, at most, in units of the largest logit.
MISS = 1e-3


def _beside(name: str, raw: dict, ours, other, reference, ids) -> list[compare.Comparison]:
    """Another implementation may itself miss the reference (its angles are float32 products): by as much it may miss
    ours."""
    found = _compare(name, raw, ours, other, ids)
    own = _compare(name, raw, other, reference, ids)
    return [dataclasses.replace(a, tolerance=a.tolerance + min(b.error, MISS)) for a, b in zip(found, own, strict=True)]


def _ids(published: OurFolder, text: str | None) -> np.ndarray:
    try:
        ids = published.tokenizer().encode(TEXT if text is None else text, bos=True)
    except UserError:
        if text is not None:
            raise
        ids = np.random.default_rng(0).integers(0, published.config.vocab, LENGTH)  # a folder without a tokenizer
    if len(ids) < 2:
        raise DataError("the text has fewer than two tokens; give a longer one with --text")
    return np.asarray(ids, np.int32)


def ours(model: Model, params: Params) -> compare.Logits:
    """`(ids, start) -> logits [T, V]` of our model."""

    @jax.jit
    def logits(params, ids, start):
        return model.logits(params, ids[None], positions_BT=start + jnp.arange(ids.shape[0])[None])[0]

    return lambda ids, start: np.asarray(logits(params, ids, start))


def _reference(raw: dict, tensor: Callable[[str], np.ndarray], names: set[str]) -> compare.Logits:
    def get(name: str) -> np.ndarray:
        if name not in names:
            raise KeyError(name)
        return tensor(name)

    return lambda ids, start: forward(raw, get, ids, start)


def _transformers(path) -> compare.Logits:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")

    def logits(ids, start):
        with torch.no_grad():
            ids = torch.tensor(np.asarray(ids, np.int64))[None]
            positions = start + torch.arange(ids.shape[1])[None]
            return model.eval()(ids, position_ids=positions, use_cache=False).logits[0].numpy()

    return logits


class Held(dict):
    """Arrays in memory as stored tensors."""

    folder = "random model"

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        super().__init__({name: InMemory(array) for name, array in arrays.items()})


@dataclasses.dataclass(frozen=True)
class InMemory:
    """One of them."""

    array: np.ndarray

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype

    def map(self) -> np.ndarray:
        return self.array


def show(report: Report) -> str:
    """The report as text: the comparisons, then what became of each key of config.json."""
    used = ", ".join(report.keys.used)
    lines = [report.name, compare.table(report.rows), f"keys used: {used}", "keys ignored:"]
    lines += [f"  {key:<28} {why}" for key, why in report.keys.ignored.items()]
    if report.text is not None:
        lines.append("perplexity of the text: {1:.4f} ({0:,} tokens, in windows of at most 512)".format(*report.text))
    return "\n".join(lines)


def as_json(reports: list[Report]) -> str:
    rows: list[dict[str, Any]] = []
    for report in reports:
        found = [dataclasses.asdict(row) | {"holds": row.holds} for row in report.rows]
        keys = {"used": report.keys.used, "ignored": report.keys.ignored}
        rows.append(
            {"model": report.name, "holds": report.holds, "comparisons": found, "keys": keys, "text": report.text}
        )
    return json.dumps(rows, indent=1)
