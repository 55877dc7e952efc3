import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from jaxllm.train.metrics import Lagged, Meter, _peak_rss, flops_per_token, peak_flops, peak_memory


@pytest.mark.parametrize(
    "kind, tera",
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("TPU v3", 61.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", None),
        ("NVIDIA H20", None),
        ("TPU v4 lite", None),
        ("cpu", None),
    ],
)
def test_peak_of_a_device(kind, tera):
    assert peak_flops(kind) == (tera and pytest.approx(tera * 1e12))


def test_peak_of_this_machine_is_a_known_device_or_none():
    for device in jax.local_devices():
        assert peak_flops(device.device_kind) is None or device.platform != "cpu"


def test_flops_by_hand():
    active, length = 1000, 64
    assert flops_per_token(active, [], length) == 6000
    full = flops_per_token(active, [(4, 8, None)] * 3, length)
    assert full == 6000 + 3 * 12 * 4 * 8 * length * 0.5
    assert flops_per_token(active, [(4, 8, 64)] * 3, length) == full == flops_per_token(active, [(4, 8, 999)] * 3, 64)
    assert flops_per_token(0, [(4, 8, 16), (2, 8, None)], 64) == 12 * 4 * 8 * 16 * (1 - 16 / 128) + 12 * 2 * 8 * 32


@pytest.mark.parametrize("window", [1, 5, 40, 64])
def test_keys_in_a_window_are_those_of_the_mask(window):
    length = 64
    query, key = np.arange(length)[:, None], np.arange(length)
    seen = ((key <= query) & (key > query - window)).sum() / length
    keys = flops_per_token(0, [(1, 1, window)], length) / 12
    assert abs(keys - seen) <= 0.5  # the formula halves the diagonal


def test_matmul_flops_agree_with_the_compiler():
    """A matrix product forward and backward costs 6 FLOPs for each weight and token, as XLA counts them too."""
    weight, x = jnp.ones((32, 48)), jnp.ones((16, 32))
    step = jax.jit(jax.grad(lambda w, x: jnp.sum((x @ w) ** 2), argnums=(0, 1)))
    cost = step.lower(weight, x).compile().cost_analysis()["flops"]
    assert cost == pytest.approx(flops_per_token(weight.size, [], 1) * 16, rel=0.1)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_meter_leaves_out_compilation_and_pauses():
    clock = Clock()
    meter = Meter(steps=10, peak=1000.0, clock=clock)
    clock.now = 100.0  # compilation
    assert meter.update(0, 50, 500.0) == {} == meter.mean()
    clock.now += 2.0
    assert meter.update(1, 50, 500.0) == {"tokens_per_second": 25.0, "mfu": 0.25, "eta": 16.0}
    clock.now += 60.0  # an evaluation
    meter.skip()
    clock.now += 5.0
    meter.update(2, 50, 500.0)
    clock.now += 4.0
    after = meter.update(3, 50, 500.0)
    assert after["tokens_per_second"] == pytest.approx(100 / 6) and after["eta"] == pytest.approx(3 * 6)
    assert meter.mean() == {"tokens_per_second": pytest.approx(100 / 6), "mfu": pytest.approx(1 / 6)}


def test_meter_follows_a_change_of_speed_and_omits_an_unknown_mfu():
    clock = Clock()
    meter = Meter(steps=100, clock=clock)
    for step in range(60):
        clock.now += 1.0 if step < 30 else 0.5
        speed = meter.update(step, 10, 1.0)
    assert speed == {"tokens_per_second": 20.0, "eta": 0.5 * 40}
    assert 10 < meter.mean()["tokens_per_second"] < 20 and "mfu" not in meter.mean()


def test_lagged_gives_the_step_before_and_never_reads_the_one_just_dispatched(monkeypatch):
    read = []
    monkeypatch.setattr(jax, "device_get", lambda metrics: read.append(metrics) or dict(metrics))
    lagged, first, second = Lagged(), {"loss": 1.5}, {"loss": 2.5}
    assert lagged.push(0, first) is None and read == []
    assert lagged.push(1, second) == (0, {"loss": 1.5}) and read == [first]
    assert lagged.flush() == (1, {"loss": 2.5}) and lagged.flush() is None


def test_lagged_on_device_arrays():
    lagged = Lagged()
    lagged.push(0, {"loss": jnp.float32(0.5), "skipped": jnp.int32(3)})
    step, metrics = lagged.push(1, {"loss": jnp.float32(0.25)})
    assert (step, metrics) == (0, {"loss": 0.5, "skipped": 3.0}) and type(metrics["skipped"]) is float


def test_peak_memory_lies_between_what_is_resident_now_and_what_the_machine_has():
    block = np.ones(2**26, np.uint8)
    assert block.nbytes < psutil.Process().memory_info().rss <= peak_memory()["host_bytes"]
    assert _peak_rss() <= psutil.virtual_memory().total
