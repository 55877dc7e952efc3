"""Checkpoints: bit-equal round trips, every kind of damage, retention, and failures."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import inspect
import itertools
import json
import logging
import re
import socket
from dataclasses import dataclass
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint._src.serialization import tensorstore_utils
from processes import run

from jaxllm import tree
from jaxllm.checkpoint import CheckpointConfig, Checkpoints, check_space, leaks, load, manifest, read_meta
from jaxllm.checkpoint.reader import newest_whole, numbered, steps_in
from jaxllm.config import parse
from jaxllm.errors import CheckpointError, ResourceError, SettingsError

META = {"settings": {"lr": 1e-3, "layers": [1, 2]}, "data": {"row": 2**40 + 1}, "tokenizer": "ab12"}


@jax.tree_util.register_dataclass
@dataclass
class Quantised:
    values: jax.Array
    scale: jax.Array


def make_state(seed: int = 0) -> dict:
    """A training state with what is awkward to store: odd dtypes, typed keys, None, empty tuples, empty arrays."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "embed": jax.random.normal(keys[0], (16, 8)),
        "layers": {"0": jax.random.normal(keys[1], (2, 8, 8), jnp.bfloat16)},
        "head": Quantised((jnp.arange(8) - seed).astype(jnp.int4), jnp.full(1, 0.1, jnp.float8_e4m3fn)),
    }
    opt = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init({"embed": params["embed"]})
    opt = jax.tree.map(lambda x: x + jnp.ones_like(x) * seed, opt)
    extra = {"ema": {"embed": params["embed"] * 0.5}, "none": None, "empty": (), "zero": jnp.zeros((0, 3))}
    key = {"plain": jax.random.key(seed), "rows": jax.random.split(jax.random.key(seed, impl="rbg"), 8)}
    return {"step": jnp.int32(seed), "params": params, "opt": opt, "key": key, "extra": extra}


def shapes(state, sharding=None):
    """The state as shapes, with a sharding for all leaves or one for each."""
    one = {} if sharding is None else {"sharding": sharding}
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, **one), state)


def bits(state) -> dict[str, tuple]:
    """`{path: (dtype, shape, bytes)}`: equal only where two states are bit-equal."""
    out = {}
    for path, leaf in tree.flatten(state).items():
        data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        out[path] = (str(leaf.dtype), leaf.shape, np.asarray(data).tobytes())
    return out


def mesh(*sizes: int) -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    names = ("fsdp", "tensor")[: len(sizes)]
    return jax.sharding.Mesh(devices, names, axis_types=(AxisType.Auto,) * len(sizes))


def save(folder, *steps: int, config=None, losses=None) -> Path:
    with Checkpoints(folder, config or CheckpointConfig(keep=100)) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), META | {"step": step}, loss=(losses or {}).get(step))
    assert checkpoints.failed is None
    return Path(folder)


def names(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir() if path.name != ".lock")


def files(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def test_round_trip_is_bit_equal_and_keeps_the_structure(tmp_path):
    state = make_state(3)
    save(tmp_path, 3)
    with Checkpoints(tmp_path) as checkpoints:
        restored, meta, step = checkpoints.restore(shapes(state))
    assert step == 3 and meta == META | {"step": 3}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)


def test_the_format_has_no_class_names_and_no_library_in_it(tmp_path):
    step = save(tmp_path, 1) / "1"
    leaves = json.loads((step / "manifest.json").read_text())["leaves"]
    assert leaves["opt/1/0/mu/embed"] == ["float32", [16, 8]]
    trees = (step / "params" / "_METADATA").read_text() + (step / "rest" / "_METADATA").read_text()
    assert "optax" not in trees and "flax" not in trees


@pytest.mark.parametrize(("before", "after"), [((2, 4), (8,)), ((8,), (1,)), ((1,), (4, 2))])
def test_another_mesh_gives_bit_equal_parameters(tmp_path, before, after):
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((16, 8)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 8)

    def on(devices: jax.sharding.Mesh) -> dict:
        spec = PartitionSpec(*devices.axis_names)
        return {"w": NamedSharding(devices, spec), "k": NamedSharding(devices, PartitionSpec("fsdp"))}

    state = {"params": jax.tree.map(jax.device_put, {"w": weight, "k": keys}, on(mesh(*before)))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        wanted = {"params": jax.tree.map(shapes, state["params"], on(mesh(*after)))}
        restored = checkpoints.restore(wanted).state
    assert bits(restored) == bits({"params": {"w": weight, "k": keys}})
    assert restored["params"]["w"].sharding == wanted["params"]["w"].sharding


def test_the_state_saved_is_the_one_at_the_call_though_its_buffers_are_donated(tmp_path):
    double = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    big = double(jnp.arange(4_000_000, dtype=jnp.float32))
    expected, meta = np.array(big), {"row": [1]}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"w": big}}, meta)
        meta["row"][0] = 99
        for _ in range(5):
            big = double(big)
        jax.block_until_ready(big)
    restored = load(tmp_path)
    assert np.array_equal(restored.state["w"], expected)
    assert restored.meta == {"row": [1]}


def change(path: Path, damage: str) -> None:
    data = bytearray(path.read_bytes())
    if damage == "deleted":
        path.unlink()
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(data[: 0 if damage == "emptied" else len(data) - 1])


@pytest.mark.parametrize("damage", ["truncated", "emptied", "deleted", "flipped"])
def test_damage_to_any_file_is_noticed(tmp_path, damage):
    step = save(tmp_path, 1) / "1"
    for path in files(step):
        before = path.read_bytes()
        change(path, damage)
        with pytest.raises(CheckpointError, match="no step 1" if not manifest.sealed(step) else path.name):
            newest_whole(epath.Path(tmp_path), 1, items=("",))
        path.write_bytes(before)
    newest_whole(epath.Path(tmp_path), 1, items=("",))


def test_a_flipped_bit_anywhere_in_the_manifest_is_noticed_or_harmless(tmp_path):
    step = epath.Path(save(tmp_path, 1) / "1")
    right, raw = manifest.read(step), (step / "manifest.json").read_bytes()
    noticed = tried = 0
    for position in range(0, len(raw), 7):
        flipped = bytes([raw[position] ^ (1 << position % 8)])
        (step / "manifest.json").write_bytes(raw[:position] + flipped + raw[position + 1 :])
        tried += 1
        try:
            assert manifest.read(step) == right
        except manifest.Damaged:
            noticed += 1
    assert noticed > 0.9 * tried > 90


@pytest.mark.parametrize("damage", ["truncated", "deleted", "flipped"])
def test_a_damaged_newest_step_falls_back_says_so_once_and_is_kept_aside(tmp_path, caplog, damage):
    save(tmp_path, 10, 20, 30)
    victim = max(files(tmp_path / "30" / "rest"), key=lambda path: path.stat().st_size)
    change(victim, damage)
    with Checkpoints(tmp_path) as checkpoints:
        restored, meta, step = checkpoints.restore(shapes(make_state()))
        assert step == 20 and meta["step"] == 20 and bits(restored) == bits(make_state(20))
        (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert victim.name in line and "30.corrupt" in line and "resuming from 20" in line and "\n" not in line
        assert names(tmp_path) == ["10", "20", "30.corrupt"]
        for later in (25, 30):
            checkpoints.save(later, make_state(later), {})
        checkpoints.wait()
        assert checkpoints.restore(shapes(make_state())).step == 30
        change(tmp_path / "30" / "manifest.json", "flipped")
        assert checkpoints.restore(shapes(make_state())).step == 25
    assert names(tmp_path) == ["20", "25", "30.corrupt", "30.corrupt-again"]


def test_only_damaged_steps_are_refused_and_nothing_is_touched(tmp_path):
    save(tmp_path, 10, 20)
    for step in ("10", "20"):
        change(max(files(tmp_path / step), key=lambda path: path.stat().st_size), "flipped")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="step 20: .*step 10: "):
        checkpoints.restore(shapes(make_state()))
    assert names(tmp_path) == ["10", "20"]
    for step in ("10", "20"):
        (tmp_path / step).rename(tmp_path / f"{step}.corrupt")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="only damaged .*10.corrupt"):
        checkpoints.restore(shapes(make_state()))


def test_an_empty_folder_is_a_fresh_start(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(shapes(make_state())) is None
    assert not (tmp_path / "new").exists(), "made before the first save"
    (tmp_path / "new").mkdir()
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        load(tmp_path / "new")
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tmp_path / "typo")


def test_what_an_evaluation_finds_is_noted_after_the_save(tmp_path):
    """The steps it makes superfluous go; a step that was not saved is left out; all else in the manifest stays."""
    with Checkpoints(tmp_path, CheckpointConfig(keep=1)) as checkpoints:
        for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0)):
            checkpoints.save(step, make_state(step), {"best": None})
            checkpoints.amend(step, {"best": min(loss, 2.0)}, loss=loss)
        checkpoints.amend(7, {"best": 0.0}, loss=0.0)
        checkpoints.wait()
        assert checkpoints.best() == 2 and names(tmp_path) == ["2", "3"]
    assert read_meta(tmp_path) == (3, {"best": 2.0})
    assert newest_whole(epath.Path(tmp_path), 3, items=("",))[1]["loss"] == 3.0
    with Checkpoints(tmp_path, CheckpointConfig(keep=1)) as checkpoints:
        assert checkpoints.best() == 2 and bits(checkpoints.restore(shapes(make_state())).state) == bits(make_state(3))
        checkpoints.amend(3, {"best": 0.5}, loss=0.5)  # of the step that was restored
        checkpoints.wait()
        assert checkpoints.best() == 3 and names(tmp_path) == ["3"]


def test_a_run_elsewhere_says_where_its_checkpoints_are(tmp_path):
    save(tmp_path / "disk", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/settings.yaml").write_text(f"checkpoint: {{folder: {tmp_path / 'disk'}}}")
    assert load(tmp_path / "run").step == read_meta(tmp_path / "run")[0] == 1


def test_two_runs_cannot_save_in_one_folder(tmp_path):
    """The second one touches nothing: neither where the first has begun to save, nor where both were early."""
    with Checkpoints(tmp_path / "both") as first, Checkpoints(tmp_path / "both") as second:
        first.save(1, make_state(1), {})
        with pytest.raises(CheckpointError, match=r"in use by another run \(process .*checkpoint.folder"):
            second.save(2, make_state(2), {})
        first.wait()
        (tmp_path / "both/2").mkdir()
        (tmp_path / "both/2.unfinished").touch()  # a save in flight
        with pytest.raises(CheckpointError, match="in use by another run"):
            Checkpoints(tmp_path / "both")
        assert names(tmp_path / "both") == ["1", "2", "2.unfinished"]
    with Checkpoints(tmp_path / "both") as third:
        assert names(tmp_path / "both") == ["1"] and third.steps() == [1]


def test_other_shapes_dtypes_or_names_stop_the_run_and_do_not_fall_back(tmp_path):
    save(tmp_path, 10, 20)

    def wider(s):
        s["params"]["embed"] = jnp.zeros((32, 8))

    def narrower(s):
        s["params"]["embed"] = s["params"]["embed"].astype(jnp.bfloat16)

    def more(s):
        s["params"]["bias"] = jnp.zeros(8)

    def fewer(s):
        del s["extra"]["ema"]

    cases = [
        (wider, r"params/embed is float32\[16, 8\] there, float32\[32, 8\] here"),
        (narrower, r"params/embed is float32\[16, 8\] there, bfloat16\[16, 8\] here"),
        (more, r"params/bias is absent there, float32\[8\] here"),
        (fewer, r"extra/ema/embed is float32\[16, 8\] there, absent here"),
    ]
    with Checkpoints(tmp_path) as checkpoints:
        for edit, message in cases:
            state = make_state()
            edit(state)
            with pytest.raises(CheckpointError, match=message):
                checkpoints.restore(shapes(state))
    assert names(tmp_path) == ["10", "20"]


def test_retention_by_count_interval_and_best(tmp_path):
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: float("nan"), 6: 2.0, 7: 1.5, 8: None}
    config = CheckpointConfig(keep=2, keep_every=3)
    save(tmp_path, *losses, config=config, losses=losses)
    assert names(tmp_path) == ["2", "3", "6", "7", "8"]
    with Checkpoints(tmp_path, config) as checkpoints:
        assert checkpoints.best() == 2 and checkpoints.steps() == [2, 3, 6, 7, 8]
        checkpoints.save(9, make_state(9), {}, loss=0.5)
        checkpoints.wait()
        assert checkpoints.best() == 9
    assert names(tmp_path) == ["3", "6", "8", "9"]
    save(tmp_path, 10, config=CheckpointConfig(keep=1, keep_best=False))
    assert names(tmp_path) == ["10"]


def test_settings_that_would_keep_nothing_are_refused():
    with pytest.raises(SettingsError, match="keep must be at least 1, not 0"):
        parse(CheckpointConfig, {"keep": 0})


def test_load_reads_the_weights_alone(tmp_path):
    state = make_state(2)
    save(tmp_path / "checkpoints", 1, 2)
    for path in files(tmp_path / "checkpoints" / "2" / "rest"):
        path.unlink()
    for place in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "2"):
        assert bits(load(place).state) == bits(state["params"])
    assert read_meta(tmp_path) == (2, META | {"step": 2})
    assert load(tmp_path, step=1).step == 1 and load(tmp_path / "checkpoints" / "1").step == 1
    row = NamedSharding(mesh(8), PartitionSpec())
    typed = load(tmp_path, shapes(state["params"], row)).state
    assert bits(typed) == bits(state["params"]) and typed["embed"].sharding == row
    assert bits(load(tmp_path, part="extra/ema", step=1).state) == bits(make_state(1)["extra"]["ema"])
    with pytest.raises(CheckpointError, match="has no step 7; saved: 1, 2"):
        load(tmp_path, step=7)
    with pytest.raises(CheckpointError, match="holds no extra/emma"):
        load(tmp_path, part="extra/emma", step=1)


def test_load_falls_back_without_touching_the_folder(tmp_path, caplog):
    save(tmp_path, 1, 2)
    change(max(files(tmp_path / "2" / "params"), key=lambda path: path.stat().st_size), "flipped")
    assert load(tmp_path).step == 1
    assert "2 is damaged" in caplog.text and names(tmp_path) == ["1", "2"]


def test_an_unknown_format_is_refused_by_name(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(manifest, "FORMAT", 2)
    save(tmp_path, 2)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="checkpoint format 2, this jaxllm reads format 1"):
        load(tmp_path)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="checkpoint format 2"):
        checkpoints.restore(shapes(make_state()))
    assert names(tmp_path) == ["1", "2"]


def test_a_failed_save_is_reported_cleaned_up_and_the_next_one_works(tmp_path, monkeypatch, caplog):
    save(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "seal", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            checkpoints.save(2, make_state(2), {})
            checkpoints.wait()
        assert "step 2 was not saved" in checkpoints.failed and str(tmp_path) in checkpoints.failed
        assert "No space left" in checkpoints.failed and "are free" in checkpoints.failed
        assert checkpoints.failed in caplog.text and "saved step 2" not in caplog.text
        assert names(tmp_path) == ["1"]
        checkpoints.save(2, make_state(2), {})
        checkpoints.wait()
        assert checkpoints.failed is None and names(tmp_path) == ["1", "2"]


def test_what_a_failed_save_still_writes_goes_with_its_marker(tmp_path, monkeypatch):
    """Late writes of a failed save keep its folder for a moment: folder and marker go with the next save or the end."""
    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "seal", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            patch.setattr(type(checkpoints.folder), "rmtree", lambda *_, **__: (_ for _ in ()).throw(OSError(39, "")))
            checkpoints.save(2, make_state(2), {})
            checkpoints.wait()
            assert {path.name for path in tmp_path.glob("2*")} == {"2", "2.unfinished"}
    assert not list(tmp_path.glob("2*"))


def test_too_little_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    state = make_state()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ResourceError, match=r"2\.0 KiB would not fit, 1000 Bytes are free"):
        check_space(tmp_path / "not" / "there", 2048)
    with Checkpoints(tmp_path, CheckpointConfig(keep=2)) as checkpoints:
        with pytest.raises(ResourceError, match="4 checkpoints"):
            checkpoints.check_space(state)
        checkpoints.save(1, state, {})
        checkpoints.wait()
        assert "step 1 was not saved" in checkpoints.failed and "1000 Bytes are free" in checkpoints.failed
    assert names(tmp_path) == []
    check_space("gs://bucket/run", 2**60)


def test_our_own_files_need_no_mounted_file_system(monkeypatch):
    """A store of objects stands in for `gs://`; that tensorstore writes arrays there is not shown."""
    store = fsspec.filesystem("memory")
    monkeypatch.setattr(type(epath.backend.fsspec_backend), "fs", lambda self, path: store)
    folder = epath.Path("gs://bucket/run/checkpoints")
    for step in ("1", "2", "3"):
        (folder / step / "params").mkdir(parents=True)
        (folder / step / "params" / "data").write_bytes(b"weights" * 1000)
    for step in ("1", "2"):
        manifest.seal(folder / step, {"meta": {"step": step}, "leaves": {}})
    assert steps_in(folder) == [1, 2] and numbered(folder) == [1, 2, 3]
    assert newest_whole(folder, None, ("",))[0] == 2 and read_meta("gs://bucket/run") == (2, {"step": "2"})
    (folder / "2" / "params" / "data").write_bytes(b"Weights" * 1000)
    step, _, damaged = newest_whole(folder, None, ("",))
    assert step == 1 and "params/data has CRC-32" in damaged[2]


def test_saving_a_step_twice(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {"first": True})
        checkpoints.save(1, make_state(1), {"first": False})
    assert read_meta(tmp_path)[1] == {"first": True}
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="already has step 1"):
        checkpoints.save(1, make_state(1), {})


def test_a_process_that_dies_before_the_seal_leaves_the_step_before(tmp_path, caplog):
    process = run(
        """
        checkpoints = Checkpoints(sys.argv[1])
        state = lambda i: {"params": {"w": jnp.full(4, i)}}
        checkpoints.save(1, state(1), {})
        checkpoints.wait()
        manifest.seal = lambda folder, body: os._exit(7 if (folder / "commit_success.txt").exists() else 8)
        checkpoints.save(2, state(2), {})
        time.sleep(60)
        """,
        tmp_path,
    )
    process.communicate(timeout=60)
    assert process.returncode == 7
    assert names(tmp_path) == ["1", "2", "2.unfinished"] and load(tmp_path).step == 1
    with Checkpoints(tmp_path) as checkpoints:
        assert names(tmp_path) == ["1"] and "2: its save was never finished" in caplog.text
        checkpoints.save(2, {"params": {"w": jnp.full(4, 2)}}, {})
    assert load(tmp_path).step == 2


def test_a_step_whose_manifest_was_deleted_is_kept_aside(tmp_path, caplog):
    step = save(tmp_path, 1, 2) / "2"
    (step / "manifest.json").unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1] and names(tmp_path) == ["1", "2.corrupt"]
        assert "2 is damaged (manifest.json is missing): kept as 2.corrupt" in caplog.text
        checkpoints.save(2, make_state(2), {})
    assert load(tmp_path).step == 2
    for number in (1, 2):
        (tmp_path / str(number) / "manifest.json").unlink()
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="only damaged checkpoints"):
        checkpoints.restore(shapes(make_state(1)))


def test_a_process_that_dies_while_it_deletes_a_step_leaves_nothing_of_it(tmp_path):
    process = run(
        """
        with Checkpoints(sys.argv[1], CheckpointConfig(keep=1, keep_best=False)) as checkpoints:
            checkpoints.save(1, {"params": {"w": jnp.ones(4)}}, {})
            type(checkpoints.folder).rmtree = lambda *_: os._exit(7)
            checkpoints.save(2, {"params": {"w": jnp.ones(4)}}, {})
        """,
        tmp_path,
    )
    print(process.communicate(timeout=60))
    assert process.returncode == 7 and "1.unfinished" in names(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2] and names(tmp_path) == ["2"]


def test_a_full_disk_leaves_the_older_steps_and_no_traceback(tmp_path):
    process = run(
        """
        import resource
        with Checkpoints(sys.argv[1]) as checkpoints:
            checkpoints.save(1, {"params": {"w": jnp.ones(4)}}, {})
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            checkpoints.save(2, {"params": {"w": jax.random.normal(jax.random.key(0), (500, 500))}}, {})
            checkpoints.wait()
            assert checkpoints.failed
            checkpoints.save(3, {"params": {"w": jnp.ones(4)}}, {})
        assert checkpoints.failed is None and checkpoints.steps() == [1, 3]
        """,
        tmp_path,
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    (line,) = err.strip().splitlines()
    assert "step 2 was not saved" in line and "Traceback" not in err
    assert names(tmp_path) == ["1", "3"]


TWO = """
jax.distributed.initialize("localhost:" + sys.argv[2], 2, int(sys.argv[3]))
from jax.sharding import *
import numpy as np
mesh = Mesh(np.array(jax.devices()), ("fsdp",), axis_types=(AxisType.Auto,))
shard = NamedSharding(mesh, PartitionSpec("fsdp"))
every = NamedSharding(mesh, PartitionSpec())
make = lambda step: {"params": {"w": jnp.arange(8.0) + step}, "key": jax.random.key(step)}
state = jax.jit(make, out_shardings={"params": {"w": shard}, "key": every})
with Preemption() as preemption, Checkpoints(sys.argv[1], CheckpointConfig(keep=2)) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"step": step})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3] and not checkpoints.failed, checkpoints.failed
    if jax.process_index() == 0:
        name = max((p for p in (checkpoints.folder / "3").walk()), key=lambda p: len(p[2]))
        (name[0] / name[2][0]).unlink()
    jax.experimental.multihost_utils.sync_global_devices("damaged")
    wanted = {"params": {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=shard)},
              "key": jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=every)}
    restored = checkpoints.restore(wanted)
    assert restored.step == 2 and restored.meta == {"step": 2}, restored
    for piece in restored.state["params"]["w"].addressable_shards:
        assert (np.asarray(piece.data) == np.arange(8.0)[piece.index] + 2).all()
    rank = jax.process_index()
    assert together.first_says(lambda: {"rank": rank, "text": "\u00e9"}) == {"rank": 0, "text": "\u00e9"}
    for ask in (
        lambda: together.first_says(lambda: manifest.missing if rank else check_space(sys.argv[1], 2**70)),
        lambda: together.check_same({"text": "same", "tokenizer": str(rank)}),
    ):
        try:
            raise AssertionError(ask())
        except UserError as error:
            assert re.search("would not fit|process 1 has another tokenizer than process 0", str(error)), error
    together.check_same({"text": "same"})
    step = 4
    while not preemption.reached(step):
        if jax.process_index() == 1 and step == 10:
            os.kill(os.getpid(), 15)
        time.sleep(0.02)
        step += 1
    checkpoints.save(step, state(step), {"step": step})
    checkpoints.wait()
    print("stopped", step, file=sys.stderr, flush=True)
"""


def test_two_processes_save_fall_back_and_stop_after_the_same_step(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    pair = [run(TWO, tmp_path, port, rank, env=env) for rank in (0, 1)]
    try:
        errors = [process.communicate(timeout=60)[1] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], errors
    first, second = [re.search(r"stopped (\d+)", text).group(1) for text in errors]
    assert first == second and load(tmp_path).step == int(first) >= 10
    assert "3.corrupt" in names(tmp_path)


def test_orbax_asks_once_a_folder_where_it_is_and_gets_the_same_answer():
    """tensorstore never frees what it answers, so that each array and save would cost memory."""
    build = inspect.unwrap(tensorstore_utils._build_ocdbt_kvstore_tspec)
    asked = []

    def counted(directory, name=None, **options):
        asked.append(directory)
        return build(directory, name, **options)

    spec = leaks.once_a_folder(counted)
    write = tensorstore_utils.OcdbtKvStoreWriteOptions(mode=tensorstore_utils.OcdbtWriteMode.WRITE)
    for folder, name, options in itertools.product(("/a", "/b"), ("x", "y", None), ({}, {"write_options": write})):
        found = spec(folder, name, **options)
        assert found == build(folder, name, **options)
        found["base"]["path"] = "changed by who asked"
    assert sorted(asked) == ["/a", "/a", "/b", "/b"]
    leaks.stop()
    assert hasattr(tensorstore_utils._build_ocdbt_kvstore_tspec, "__wrapped__")
