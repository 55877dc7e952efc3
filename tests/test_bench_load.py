"""`jaxllm bench load`: reading many shards takes little more room than the weights and one tensor."""

import json
import os
import subprocess
import sys

import pytest

from jaxllm import bench_load, cli
from jaxllm.errors import ResourceError
from jaxllm.hf.export import write_shards
from jaxllm.hf.safetensors import INDEX
from jaxllm.parity.tensors import random_model
from jaxllm.parity.tiny import VARIANTS

LARGE = {"hidden_size": 512, "intermediate_size": 4096, "vocab_size": 4096, "num_hidden_layers": 6}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A folder of 8 shards and more, whose largest tensor is a twentieth of the weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "large", VARIANTS["llama3"] | LARGE)
        raw, tensors = random_model("large")
    folder = tmp_path_factory.mktemp("sharded")
    write_shards(folder, tensors.items(), 16 << 20)
    (folder / "config.json").write_text(json.dumps(raw))
    assert (folder / INDEX).is_file() and len(list(folder.glob("*.safetensors"))) >= 8
    return folder


def test_the_host_holds_the_weights_and_little_more_than_the_largest_tensor(sharded):
    """In a process of its own: what another load has freed would be taken again and not be seen."""
    command = [sys.executable, "-m", "jaxllm.cli", "bench", "load", str(sharded), "--json"]
    found = json.loads(
        subprocess.run(command, env=os.environ | {"JAXLLM_LAUNCH": "0"}, capture_output=True, check=True).stdout
    )
    assert found["weights"] > 18 * found["largest_tensor"] == 18 * 4 * 4096 * 512
    assert found["peak"] > 0.9 * found["weights"], "the peak is seen"
    assert found["beside"] < 6 * found["largest_tensor"], "all of the folder would be twenty; compiling takes three"


def test_it_is_printed(sharded, capsys, monkeypatch):
    monkeypatch.setenv("JAXLLM_LAUNCH", "0")
    assert cli.main(["bench", "load", str(sharded), "--dtype", "bfloat16"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["largest tensor"].strip() == "8 MiB in float32" and "in bfloat16" in lines["weights"]
    assert "of the largest tensor" in lines["beside weights"]


def test_what_cannot_be_measured_is_said(tmp_path, sharded, monkeypatch, capsys):
    monkeypatch.setenv("JAXLLM_LAUNCH", "0")
    assert cli.main(["bench", "load", str(tmp_path)]) == 2
    assert "give the folder of a published model" in capsys.readouterr().err
    monkeypatch.setattr(bench_load, "STATUS", str(tmp_path / "none"))
    with pytest.raises(ResourceError, match="run this on Linux"):
        bench_load.bench_load(str(sharded))
