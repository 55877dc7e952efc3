"""Plans of the real step, compiled for absent TPUs: in processes of their own, as a user runs them."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import yaml

from jaxllm.chips import CHIPS

pytestmark = [
    pytest.mark.tpu_programs,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]

#: Large enough that it does not matter what fits into the memory on the chip (128 MiB), which is not counted.
WIDE = {
    "model": {
        "vocab": 32768, "embed": 1024, "layers": 6, "context": 4096, "dtype": "bfloat16", "remat": "qkv",
        "pattern": [{"attn": {"heads": 8, "kv_heads": 4, "head": 128}, "mlp": {"ffw": 4096}}],
    },
    "train": {"steps": 10, "seq_len": 4096, "batch": 32},
}  # fmt: skip


def planned(tmp_path, topology: str, *words: str, source=WIDE, code: int = 0):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(source))
    env = {key: value for key, value in os.environ.items() if not key.startswith(("TPU_", "XLA_", "JAX_"))}
    command = [sys.executable, "-m", "jaxllm.cli", "plan", str(tmp_path / "run.yaml"), "--topology", topology, "--json"]
    done = subprocess.run([*command, *words], env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "cache" not in done.stderr, "programs of absent TPUs are not looked for in the compilation cache"
    return json.loads(done.stdout), done.stderr


def check(found):
    assert found["memory"]["source"] == "the compiled program" and found["memory"]["fits"]
    assert abs(found["memory"]["estimate"]["error"]) < 0.15 and abs(found["flops"]["error"]) < 0.02
    assert found["memory"]["total"] == found["memory"]["compiled"]["peak"] < found["memory"]["compiled"]["total"]
    assert found["step"]["seconds"] >= found["flops"]["executed"] / CHIPS[found["topology"]["name"][:3]].bf16
    assert "the compiler's cycles" in found["bounds"]["compute"]["how"] and found["step"]["with_waits"]


def test_a_step_for_four_chips(tmp_path):
    found, _ = planned(tmp_path, "v6e:2x2")
    check(found)
    rows = {row["kind"]: row for row in found["network"]}
    assert rows["all-gather"]["wire_bytes"] > rows["reduce-scatter"]["wire_bytes"] > 1e6
    for row in rows.values():
        assert row["overlapped_bytes"] + row["exposed_bytes"] == pytest.approx(row["wire_bytes"])
    assert found["compiled"]["libtpu"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology, words",
    [
        ("v5p:2x2x1", ["model.remat=full"]),
        ("v5p:2x2x1", ["model.remat=minimal", "train.accumulate=2"]),
        ("v5e:2x2", ["lora={rank: 8}", "train.init=absent"]),
        ("v6e:2x4", ["parallel.fsdp=4", "parallel.tensor=2"]),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_other_chips_and_settings(tmp_path, topology, words):
    check(planned(tmp_path, topology, *words)[0])


@pytest.mark.slow
def test_two_slices(tmp_path):
    found, _ = planned(tmp_path, "v5e:2x2", "--slices", "2", "parallel.data=2")
    assert found["topology"] == {"name": "v5e:2x2", "chips": 8, "devices": 8, "slices": 2}
    assert sum(row["wire_bytes"] for row in found["network"] if row["network"] == "dcn") > 1e6
    assert found["bounds"]["dcn"]["seconds"] > 0


@pytest.mark.slow
def test_what_replicas_in_two_slices_send_is_what_formulas_say(tmp_path):
    words = ("--slices", "2", "parallel.data=4")
    found, _ = planned(tmp_path, "v5e:2x2", *words)
    by_formulas, _ = planned(tmp_path, "v5e:2x2", *words, "--no-compile")
    sent = [
        {
            (kind, network): sum(
                row["wire_bytes"]
                for row in one["network"]
                if (row["kind"], row["network"]) == (kind, network) and row["axes"] == ["data"]
            )
            for kind, network in (("reduce-scatter", "ici"), ("all-reduce", "dcn"), ("all-gather", "ici"))
        }
        for one in (found, by_formulas)
    ]
    for part, bytes_ in sent[0].items():
        assert bytes_ > 1e6 and sent[1][part] == pytest.approx(bytes_, rel=0.05)


@pytest.mark.slow
def test_what_the_compiler_finds_too_large(tmp_path):
    """The estimate is near enough to compile, and the compiler says how much it would be."""
    words = ["train.batch=48", "model.remat=none"]
    found, err = planned(tmp_path, "v5e:2x2", *words, code=2)
    memory = found["memory"]
    assert memory["source"] == "the compiler's refusal" and memory["total"] == pytest.approx(
        memory["estimate"]["total"], rel=0.15
    )
    assert not memory["fits"] and memory["total"] > memory["capacity"] and "error: v5e:2x2: a device needs" in err


@pytest.mark.slow
def test_generation_for_absent_tpus(tmp_path):
    words = ("--generate", "--batch", "8", "--context", "512", "parallel.fsdp=1", "parallel.tensor=4")
    found, _ = planned(tmp_path, "v6e:2x2", *words)
    assert found["memory"]["source"] == "the compiled programs" and found["decode"]["bound"] in ("memory", "ici")
    by_formulas, _ = planned(tmp_path, "v6e:2x2", *words, "--no-compile")
    sent = [sum(row["wire_bytes"] for row in one["decode"]["network"]) for one in (found, by_formulas)]
    assert sent[0] > 0 and sent[1] == pytest.approx(sent[0], rel=0.05)
    assert all(row["axes"] == ["tensor"] for row in by_formulas["decode"]["network"])
