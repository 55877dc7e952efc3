"""Saving and resuming: `Checkpoints` for a run, `load` and `read_meta` for whoever uses its weights."""

from jaxllm.checkpoint.manifest import FORMAT
from jaxllm.checkpoint.preemption import Preemption
from jaxllm.checkpoint.reader import Restored, load, locate, read_meta
from jaxllm.checkpoint.store import CheckpointConfig, Checkpoints, check_space

__all__ = [
    "FORMAT",
    "CheckpointConfig",
    "Checkpoints",
    "Preemption",
    "Restored",
    "check_space",
    "load",
    "locate",
    "read_meta",
]
