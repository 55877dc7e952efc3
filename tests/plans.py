"""Settings of small runs to plan, for the tests of plan."""

import contextlib
import os

from jaxllm.plan.read import read
from jaxllm.plan.target import parse_target
from jaxllm.train.estimate.step import describe

ATTN = {"heads": 4, "kv_heads": 2}
MLP = {"ffw": 384}
LATENT = {"heads": 4, "head": 32, "latent": {"kv_rank": 64, "q_rank": 64, "rope_head": 16, "v_head": 32}}
GELU = {"ffw": 512, "activation": "gelu", "bias": True}
PLAIN = {"heads": 4, "rope": None, "qkv_bias": True, "out_bias": True}
#: Six kinds of models, of one to three million weights.
MODELS = {
    "llama": {"layers": 10, "pattern": [{"attn": ATTN, "mlp": MLP}]},
    "tied": {
        "vocab": 4096, "layers": 6, "tied": True, "remat": "qkv",
        "pattern": [{"attn": ATTN | {"qk_norm": "head"}, "mlp": {"ffw": 512}}],
    },
    "gemma": {
        "vocab": 2048, "layers": 12, "remat": "full", "norm": "rms_unit_offset", "norm_placement": "both",
        "pattern": [{"attn": ATTN | {"window": 64}, "mlp": MLP}, {"attn": ATTN, "mlp": MLP}],
    },
    "moe": {
        "layers": 9, "remat": "minimal", "prefix": [{"attn": ATTN, "mlp": MLP}],
        "pattern": [{"attn": ATTN, "moe": {"experts": 4, "ffw": 192}}],
    },
    "latent": {"layers": 9, "remat": "full", "pattern": [{"attn": LATENT, "mlp": MLP}]},
    "gpt2": {
        "layers": 4, "norm": "layer", "positions": "learned", "tied": True, "pattern": [{"attn": PLAIN, "mlp": GELU}],
    },
}  # fmt: skip


def settings(name: str = "llama", **changes) -> dict:
    """A run of a model that has neither text nor tokenizer; `train__batch=8` changes `train.batch`."""
    raw = {
        "model": {"vocab": 1024, "embed": 128, "context": 512} | MODELS[name],
        "train": {"steps": 10, "seq_len": 256, "batch": 16},
    }
    for key, value in changes.items():
        section, _, setting = key.partition("__")
        raw[section] = raw.get(section, {}) | {setting: value} if setting else value
    return raw


def run(source="llama", *overrides: str, devices: int = 8, **changes):
    """The settings of a small run, or of a file or shipped model with overrides."""
    source = settings(source, **changes) if source in MODELS else source
    return read(source, overrides, devices=devices).config


def described(source, topology: str, *overrides: str, slices: int = 1, **changes):
    """`(step, target)` by numbers alone."""
    target = parse_target(topology, slices)
    return describe(run(source, *overrides, devices=target.devices, **changes), target.devices, slices), target


@contextlib.contextmanager
def environment():
    """Puts back what the verb sets for the process that it thinks it is alone in."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
