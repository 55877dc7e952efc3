"""Row 16: losses that are off by little, or another the second time, and steps that depend on how they are split."""

import copy
import json

import pytest

from jaxllm.verify import golden
from jaxllm.verify.lab import Lab

GOLDEN = json.loads(golden.FILE.read_text())


def found(**changes):
    losses = copy.deepcopy(max(GOLDEN.items())[1])
    again = {kind: values[: golden.AGAIN] for kind, values in losses.items()}
    return {"jax": max(GOLDEN), "losses": losses, "again": again, "splits": {"fsdp 8": [1e-7, 1e-6]}} | changes


@pytest.mark.fast
def test_each_kind_of_difference_is_found():
    assert golden.judge(found(), GOLDEN).passed
    later, again, other = found(), found(), found(jax="9.9")
    later["losses"]["moe"][60] *= 1 + 1e-3
    assert golden.judge(later, GOLDEN).failures[0].startswith("moe, step 61: loss ")
    again["again"]["dense"][7] *= 1 + 1e-7
    assert golden.judge(again, GOLDEN).failures == ("dense: a second run gives other losses",)
    for split in ([2e-6, 0.0], [0.0, 2e-5], [float("nan"), 0.0]):
        assert golden.judge(found(splits={"fsdp 8": split}), GOLDEN).failures[0].startswith("fsdp 8: the loss is off")
    nan = found()
    nan["losses"]["dense"][3] = float("nan")
    assert not golden.judge(nan, GOLDEN).passed
    assert golden.judge(other, GOLDEN).passed and "there being none for 9.9" in golden.judge(other, GOLDEN).figure
    assert golden.judge(other, GOLDEN | {"0.9.2": {}}).passed, "the newest is 0.12, not 0.9"
    assert f"those of jax {max(GOLDEN)}" in golden.judge(other, GOLDEN | {"0.9.2": {}}).figure


@pytest.mark.slow
def test_microbatches_that_are_not_averaged_are_found(lab, monkeypatch):
    """Planted: of the microbatches only the first counts."""
    fault = "from jaxllm.train import rows; rows._accumulated = lambda grad, chosen, batch, key, n: grad(chosen, "
    fault += "__import__('jax').tree.map(lambda x: x[::n], batch), key)"
    code = f"import sys\n{fault}\nfrom jaxllm.verify import golden\ngolden.STEPS = golden.AGAIN = 1\n"
    code += "golden.SPLITS = golden.SPLITS[:1]\nsys.exit(golden.main([]))"
    monkeypatch.setattr(Lab, "module", lambda self, name: ["-c", code])
    monkeypatch.setattr(golden, "AGAIN", 1)
    monkeypatch.setattr(golden, "judge", lambda found, golden_: found)
    assert max(golden.determinism(lab)["splits"]["dense, 4 microbatches, 1 device"]) > 1e-3
