"""`jaxllm bench train`: the workloads are what the docs say, and the figures follow from one another."""

import json
import sys

import pytest
import tiny

from jaxllm import bench
from jaxllm.errors import ResourceError, SettingsError
from jaxllm.model.build import active_parameters, build
from jaxllm.train.metrics import flops_per_token

TINY = bench.Workload(tiny.config(), rows=2, length=16, steps=3)


@pytest.mark.parametrize(
    "name, millions, active, gflop",
    [("W1", 6.45, 5.40, 142), ("W2", 15.97, 5.41, 143), ("W3", 124.67, 100.1, 1288)],
)
def test_the_workloads_are_the_documented_ones(name, millions, active, gflop):
    workload = bench.WORKLOADS[name]
    config = workload.model
    total, in_products = active_parameters(config, build(config).abstract)
    assert total / 1e6 == pytest.approx(millions, rel=1e-3)
    assert in_products / 1e6 == pytest.approx(active, rel=2e-3)
    layers = [(s.attn.heads, config.attention_dim(s.attn), None) for s in config.layer_specs]
    flops = flops_per_token(in_products, layers, workload.length) * workload.rows * workload.length
    assert flops / 1e9 == pytest.approx(gflop, abs=0.6)


def test_a_row_holds_figures_that_agree():
    row = bench.measure(TINY, 3)
    tokens = TINY.rows * TINY.length
    assert row["step_ms_min"] <= row["step_ms"] <= row["step_ms_max"]
    assert row["tokens_per_second"] == pytest.approx(tokens / row["step_ms"] * 1e3)
    assert row["gflops_per_second"] == pytest.approx(row["gflop_per_step"] / row["step_ms"] * 1e3)
    assert 0 < row["compile_seconds"] < row["first_step_seconds"]
    assert 0 < row["temporaries_mb"] < row["peak_mb"]
    assert 0.5 * 4.1 < row["loss"] < 1.5 * 4.1  # random tokens: about ln 61


def test_prints_a_table_or_json_and_returns_the_rows(monkeypatch, capsys):
    figures = {key: 1.0 for key, _, _ in bench.LINES}
    figures |= {"workload": "W1", "platform": "cpu", "gflops_per_second": 5.0}
    code = f"import json; print('noise'); print(json.dumps({figures!r}))"
    monkeypatch.setattr(bench, "command_of", lambda name, steps: [sys.executable, "-c", code])
    monkeypatch.setattr(bench, "matmul_gflops", lambda: 10.0)
    rows = bench.bench_train(["W1", "W3"], json=True)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    assert [row["matmul_share"] for row in rows] == [0.5, 0.5]
    bench.bench_train(["W1"])
    shown = capsys.readouterr().out
    assert "tokens/s" in shown and "50%" in shown


def test_what_a_user_can_get_wrong():
    with pytest.raises(SettingsError, match="no such workload: W4; did you mean W3"):
        bench.bench_train(["W4"])
    with pytest.raises(SettingsError, match="steps=0"):
        bench.bench_train(["W1"], steps=0)


def test_a_process_that_dies_is_an_error(monkeypatch):
    monkeypatch.setattr(bench, "matmul_gflops", lambda: 10.0)
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(bench, "command_of", lambda name, steps: [sys.executable, "-c", killed])
    with pytest.raises(ResourceError, match="W1.*lack of memory"):
        bench.bench_train(["W1"])


def test_the_matmul_peak_is_a_speed():
    assert 0.1 < bench.matmul_gflops(size=128, repeats=3) < 1e5
