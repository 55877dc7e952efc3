"""`jaxllm bench generate` and `jaxllm bench adapt`: figures that follow from the times, of several models in turn."""

import json

import pytest
import tiny

from jaxllm import bench, bench_adapt, bench_generate, cli

pytestmark = pytest.mark.usefixtures("here")


def test_models_are_measured_in_turn_and_compared_with_the_first(finished, monkeypatch, capsys):
    for name, value in dict(PREFILL=16, PROMPT=4, DECODE=4).items():
        monkeypatch.setattr(bench_generate, name, value)
    order, seconds = [], iter([3.0, 9.0, 1.0, 1.0, 5.0, 1.0] * 2 + [2.0, 7.0, 1.0, 2.0, 3.0, 1.0])

    def timed(call):
        order.append(call)
        return next(seconds)

    monkeypatch.setattr(bench_generate, "_seconds", timed)
    model = str(finished.folder)
    assert cli.main(["bench", "generate", model, model, "--batches", "2", "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"model": model, "batch": 2, "prefill": 2 * 16 / 2.0, "decode": 2 * 4 / (7.0 - 1.0)}
    assert (second["prefill"], second["decode"]) == (2 * 16 / 1.0, 2 * 4 / (3.0 - 1.0))
    assert (second["prefill_ratio"], second["decode_ratio"]) == (3.0, 2.0)
    assert order[:6] == order[6:12] == order[12:] and len(set(order)) == 6
    assert "(3.00x), decode 4.0 tokens/s (2.00x)  there" in bench_generate._line(
        second | {"model": "there"}, alone=False
    )


@pytest.mark.slow
def test_adapters_are_timed_beside_full_fine_tuning(monkeypatch, capsys):
    monkeypatch.setitem(
        bench.WORKLOADS, "W1", bench.Workload(tiny.config(embed=64, mlp={"ffw": 64}), rows=2, length=16, steps=2)
    )
    found = bench_adapt.bench_adapt(steps=2)
    assert all(value > 0 for value in found.values())
    assert capsys.readouterr().out.count("goal: at most") == 2
    assert found.keys() == {"full ms", "LoRA ms", "QLoRA ms", "LoRA / full", "QLoRA / LoRA"}
