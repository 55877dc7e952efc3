"""`jaxllm info MODEL`: what a model is and how much room it takes, from its settings; no weight is loaded."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import humanize
import jax

from jaxllm import checkpoint, tree
from jaxllm.adapt.changes import Changes
from jaxllm.checkpoint.models import changes_of, config_of, tokenizer_folder
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError, UserError
from jaxllm.hf.open import open_published
from jaxllm.model.build import active_parameters, build
from jaxllm.model.spec import AttnSpec, ModelConfig
from jaxllm.sharding import ParallelConfig, make_sharding

#: Bits of a weight, the scales of a group of 64 included where there are any.
PRECISIONS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4 (groups of 64)": 4.25}


def info(path: str | Path, *, ignore_keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """Architecture, sizes and tokens of a run folder, a Hugging Face folder or a .gguf file.

    Sizes in bytes, the cache for one token of one sequence. Raises UserError as `load` does.
    """
    found: dict[str, Any] = {"model": str(path)}
    if (published := open_published(path, ignore_keys=ignore_keys)) is not None:
        config, found["family"] = published.config, published.family.name
        found["keys ignored"] = dict(published.keys.ignored)
        weights, tokenizer = _weights(published), _tokenizer(published.tokenizer)
    else:
        step, meta = checkpoint.read_meta(path)
        config = config_of(meta, str(path))
        found |= {"family": "trained here", "steps": step}
        weights = {"changes": _named(changes_of(meta, str(path)))}
        tokenizer = _tokenizer(lambda: Tokenizer.load(tokenizer_folder(path)))
    rest = {"weights": weights, "tokenizer": tokenizer, "name says": name_says(Path(path).name)}
    return found | describe(config) | rest


def _weights(published) -> dict[str, Any]:
    """What the headers of the files say: how many tensors there are, and whether they are stored as codes."""
    try:
        return {"tensors": len(published.tensors()), "changes": _named(published.changes)}
    except UserError as error:
        return {"problem": str(error)}


def _named(changes: Changes) -> str:
    return ", ".join(map(str, changes)) or "none"


def _tokenizer(open_it) -> dict[str, Any]:
    try:
        tokenizer = open_it()
    except DataError as error:
        return {"problem": str(error)}
    names = {name: getattr(tokenizer, name) for name in ("bos", "eos", "pad", "unk")}
    special = {name: f"{i} {tokenizer.piece(i)}" for name, i in names.items() if i is not None and i >= 0}
    return {"ids": tokenizer.vocab} | special


def describe(config: ModelConfig) -> dict[str, Any]:
    """Sizes that follow from the settings."""
    one = make_sharding(ParallelConfig(data=1, fsdp=1), devices=jax.devices()[:1])
    abstract = build(config, one).abstract
    total, active = active_parameters(config, abstract)
    parts: Counter[str] = Counter()
    for name, leaf in tree.flatten(abstract).items():
        parts[_part(name)] += leaf.size
    kinds = Counter(_kind(spec.attn) for spec in config.layer_specs)
    first = config.layer_specs[0].attn
    return {
        "layers": config.layers,
        "attention": ", ".join(f"{count} x {kind}" for kind, count in kinds.items()),
        "embed": config.embed,
        "heads": f"{first.heads} query, {first.kv_heads or first.heads} key-value, of {config.head_dim(first)}",
        "context": config.context,
        "vocabulary": config.vocab,
        "parameters": total,
        "active per token": active,
        "by part": dict(parts.most_common()),
        "bytes": {name: round(total * bits / 8) for name, bits in PRECISIONS.items()},
        "cache per token": {name: cache_bytes(config, size) for name, size in (("float32", 4), ("bfloat16", 2))},
    }


def _part(path: str) -> str:
    if path in ("embed", "positions", "head"):
        return path
    last = path.split("/")[-2:]
    if "moe" in path.split("/"):
        return "shared experts" if "shared" in path.split("/") else "router" if last[1] in ROUTER else "experts"
    return "attention" if last[0] == "attn" else "feed-forward" if last[0] == "mlp" else "norms"


ROUTER = ("router", "router_bias", "bias")


def _kind(attn: AttnSpec) -> str:
    kind = "latent" if attn.latent else f"window {attn.window}" if attn.window else "full"
    return kind if attn.rope is not None else kind + " without RoPE"


def cache_bytes(config: ModelConfig, size: int) -> int:
    """Bytes that one more token adds to the key-value cache of one sequence, before any window is full."""
    total = 0
    for spec in config.layer_specs:
        attn = spec.attn
        if attn.latent:
            total += attn.latent.kv_rank + attn.latent.rope_head
        else:
            total += 2 * (attn.kv_heads or attn.heads) * config.head_dim(attn)
    return total * size


QUANTISED = r"i?q\d_(?:k(?:_[sml])?|[01]|[a-z]+)|bf16|f16|fp16|fp8|int[48]|gptq|awq|mxfp4"


def name_says(name: str) -> dict[str, str]:
    """What a model's name claims: size, experts, quantisation, kind. `8x7B-Instruct.Q4_K_M` says four things."""
    patterns = {
        "experts": r"(?<![0-9.])(\d+)x\d+(?:\.\d+)?[bB]",
        "size": r"(?<![0-9.])(?:\d+x)?(\d+(?:\.\d+)?[bBmM])(?![a-zA-Z])",
        "active": r"[aA](\d+(?:\.\d+)?[bB])(?![a-zA-Z])",
        "quantisation": rf"(?i)(?<![a-z0-9])({QUANTISED})(?![a-z0-9])",
        "context": r"(?<![0-9a-zA-Z.])(\d+k)(?![a-zA-Z])",
        "kind": r"(?i)(?<![a-z])(instruct|chat|it|base|pt)(?![a-z])",
    }
    found = {key: re.search(pattern, name) for key, pattern in patterns.items()}
    return {key: match[1] for key, match in found.items() if match}


def show(found: dict[str, Any]) -> str:
    """The dict of `info` as lines for a person."""
    lines = []
    for key, value in found.items():
        if not isinstance(value, dict):
            lines.append(f"{key:<18}{value:,}" if isinstance(value, int) else f"{key:<18}{value}")
        elif value and key in ("bytes", "cache per token"):
            sizes = ", ".join(f"{humanize.naturalsize(n, binary=True)} in {name}" for name, n in value.items())
            lines.append(f"{key:<18}{sizes}")
        elif value and key == "keys ignored":
            lines.append(f"{key:<18}{', '.join(value)} (--json gives the reasons)")
        elif value:
            lines.append(
                f"{key:<18}" + ", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in value.items())
            )
    return "\n".join(lines)
