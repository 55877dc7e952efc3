"""How much less memory a step with adapters takes, from the compiled program of a model of a billion parameters."""

import runpy
from pathlib import Path

import pytest


@pytest.mark.slow
def test_qlora_needs_at_most_two_fifths_of_full_fine_tuning():
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts/lora_memory.py"))
    full, qlora = (script["step_bytes"](script["WAYS"][way])["all"] for way in ("full", "QLoRA"))
    assert full > 4 * 4 * 1e9, "float32 weights, gradients and two moments"
    assert qlora <= script["SHARE"] * full
