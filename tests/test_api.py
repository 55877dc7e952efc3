"""The functions of a notebook: what they return, and that model and params are plain JAX."""

import dataclasses
import math
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import jaxllm
from jaxllm import tree
from jaxllm.data.sources import Source
from jaxllm.errors import CheckpointError, DataError, SettingsError
from jaxllm.sharding import ParallelConfig


@pytest.fixture(scope="module")
def loaded(finished):
    return jaxllm.load(finished.folder)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.fast
@pytest.mark.parametrize(
    "first",
    [
        "import jaxllm",
        "from jaxllm.train.loop import train",
        "import jaxllm.generate.text, jaxllm.train.loop; jaxllm.generate.text; jaxllm.train.loop",
        "import jaxllm.train.loop as loop; import jaxllm.generate.text as text; loop.train, text.generate_text",
        "from jaxllm import train, generate",
    ],
)
def test_rooms_and_functions_of_one_name_do_not_hide_each_other(first):
    code = f"""
{first}
import inspect, jaxllm, sys
assert "jax" not in sys.modules or "loop" in {first!r}
from jaxllm import api
for name in ("train", "generate"):
    room, function = getattr(jaxllm, name), getattr(api, name)
    assert inspect.signature(room) == inspect.signature(function) and room.__doc__ == function.__doc__
try:
    jaxllm.train({{"modle": "demo"}})
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "unknown setting modle; did you mean model?" in done.stdout, done.stderr


@pytest.mark.fast
def test_what_the_package_offers():
    for name in jaxllm.__all__:
        assert callable(getattr(jaxllm, name)) and getattr(jaxllm, name).__doc__, name
    with pytest.raises(AttributeError, match="module jaxllm has no attribute lode"):
        jaxllm.lode  # noqa: B018


def test_a_run_folder_its_checkpoints_and_one_step_give_the_same(finished, loaded):
    for path in (str(finished.folder), finished.folder / "checkpoints", finished.folder / "checkpoints/8"):
        again = jaxllm.load(path)
        assert again.step == 8 and again.tokenizer.hash == finished.tokenizer.hash
        assert small.bits(tree.flatten(again.params)) == small.bits(tree.flatten(finished.params))
    earlier = jaxllm.load(finished.folder, step=3)
    assert earlier.step == 3 and jaxllm.load(finished.folder / "checkpoints/3").step == 3
    assert small.bits(tree.flatten(earlier.params)) != small.bits(tree.flatten(loaded.params))


def test_a_damaged_newest_step_gives_the_one_before(finished, tmp_path, caplog):
    shutil.copytree(finished.folder, tmp_path / "run")
    files = [path for path in (tmp_path / "run/checkpoints/8/params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert jaxllm.load(tmp_path / "run").step == 6 and "is damaged" in caplog.text
    with pytest.raises(CheckpointError, match="no whole checkpoint|damaged"):
        jaxllm.load(tmp_path / "run", step=8)


def test_loading_what_is_not_there_is_refused(finished, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        jaxllm.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has no step 5; saved: 3, 4, 6, 8"):
        jaxllm.load(finished.folder, step=5)
    with pytest.raises(CheckpointError, match="holds no extra/ema"):
        jaxllm.load(finished.folder, ema=True)
    with pytest.raises(SettingsError, match="does not fit 8 devices"):
        jaxllm.load(finished.folder, parallel=ParallelConfig(data=3))


@pytest.mark.slow
def test_another_mesh_gives_the_same_weights_and_logits(finished, loaded, corpus):
    other = jaxllm.load(finished.folder, parallel=ParallelConfig(data=2, fsdp=2, tensor=2))
    assert other.params["embed"].sharding != loaded.params["embed"].sharding
    assert small.bits(tree.flatten(other.params)) == small.bits(tree.flatten(loaded.params))
    tokens = np.arange(8 * 16).reshape(8, 16) % 400
    np.testing.assert_allclose(
        other.model.logits(other.params, tokens), loaded.model.logits(loaded.params, tokens), atol=1e-4
    )


def test_gradients_through_a_loaded_model_are_those_of_a_difference(loaded):
    tokens = jnp.asarray(loaded.tokenizer.encode("def f7(self, x):\n", bos=True))

    def loss(params):
        logits = loaded.model.logits(params, tokens[None, :-1])[0]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:, None], axis=-1).mean()

    grads = jax.jit(jax.grad(loss))(loaded.params)
    assert jax.tree.structure(grads) == jax.tree.structure(loaded.params)
    rng = np.random.default_rng(0)
    along = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), loaded.params)
    moved = [jax.tree.map(lambda p, d, e=e: p + e * d, loaded.params, along) for e in (1e-3, -1e-3)]
    difference = (loss(moved[0]) - loss(moved[1])) / 2e-3
    slope = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grads, along)))
    assert float(slope) == pytest.approx(float(difference), rel=0.02)


def test_weights_for_decoding_are_laid_out_once_and_follow_the_weights(loaded):
    assert loaded.decoding is loaded.decoding
    mine = dataclasses.replace(loaded, params=dict(loaded.params))
    before = jaxllm.generate(mine, "def f", temperature=0, max_tokens=8)[0]
    mine.params["layers"] = jax.tree.map(lambda w: -w, mine.params["layers"])
    after = jaxllm.generate(mine, "def f", temperature=0, max_tokens=8)[0]
    assert after.logprobs != before.logprobs, "weights changed in place are the weights that generate"
    assert jaxllm.generate(loaded, "def f", temperature=0, max_tokens=8)[0] == before


def test_generate_and_stream_agree_and_stop_at_the_end_of_text(loaded):
    greedy = {"max_tokens": 12, "temperature": 0.0}
    one, two = jaxllm.generate(loaded, ["def f", "The quick"], **greedy)
    assert len(one.ids) == len(one.logprobs) <= 12 and one.finish in ("length", "stop")
    assert jaxllm.generate(loaded, "def f", **greedy)[0].ids == one.ids, "a prompt alone and among others"
    assert "".join(jaxllm.stream(loaded, "The quick", **greedy)) == two.text
    assert loaded.tokenizer.decode(one.ids) == one.text
    stopped = jaxllm.generate(loaded, "def f", stop_ids=(one.ids[2],), **greedy)[0]
    assert stopped.finish == "stop" and stopped.ids[:2] == one.ids[:2]


def test_evaluate_takes_a_path_several_or_a_source(loaded, corpus):
    paths = sorted(map(str, corpus.glob("prose-*.txt")))
    found = jaxllm.evaluate(loaded, str(corpus / "prose-*.txt"))
    assert found == jaxllm.evaluate(loaded, paths) == jaxllm.evaluate(loaded, Source(name="eval", path=tuple(paths)))
    assert found["documents"] == 12 and found["bytes"] == sum(len(open(path, "rb").read()) for path in paths)
    assert found["perplexity"] == pytest.approx(math.exp(found["heldout_loss"]))
    nats = found["heldout_loss"] * (found["tokens"] - found["documents"])
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"])
    assert jaxllm.evaluate(loaded, paths, batch=3)["heldout_loss"] == pytest.approx(found["heldout_loss"], rel=1e-5)
    assert jaxllm.evaluate(loaded, paths, seq_len=8)["heldout_loss"] > found["heldout_loss"], "it sees less"
    with pytest.raises(DataError, match="no file matches"):
        jaxllm.evaluate(loaded, "nothing.txt")
    with pytest.raises(SettingsError, match="sequence length 0: must be at least 1"):
        jaxllm.evaluate(loaded, paths, seq_len=0)


def test_evaluate_refuses_rows_longer_than_learned_positions(loaded, corpus):
    config = dataclasses.replace(loaded.model.config, positions="learned")
    learned = dataclasses.replace(loaded, model=dataclasses.replace(loaded.model, config=config))
    with pytest.raises(SettingsError, match="65 tokens are more than the 64 learned positions"):
        jaxllm.evaluate(learned, str(corpus / "prose-0.txt"), seq_len=65)


def test_evaluate_uses_the_params_in_hand(loaded, corpus):
    zero = dataclasses.replace(loaded, params=jax.tree.map(jnp.zeros_like, loaded.params))
    found = jaxllm.evaluate(zero, str(corpus / "prose-0.txt"))
    assert found["heldout_loss"] == pytest.approx(math.log(400), rel=1e-5)


def test_train_takes_a_dict_with_overrides_and_goes_on(finished, corpus):
    result = jaxllm.train(small.settings(corpus, "elsewhere"), [f"out={finished.folder}"], quiet=True)
    assert result.summary["steps"] == 8 and result.folder == finished.folder
    assert small.bits(tree.flatten(result.params)) == small.bits(tree.flatten(finished.params))


def test_a_first_token_that_nothing_predicts_is_not_in_bits_per_byte(tmp_path):
    """Without a begin-of-text token: its bytes count no more than its nats do."""
    from jaxllm.data.encode import Encoder
    from jaxllm.data.sources import Source
    from jaxllm.data.tokenizer import Tokenizer

    (tmp_path / "a.txt").write_text("hello there")
    tokenizer = Tokenizer.train(["hello there, and hello again"] * 9, 300)
    whole = next(Encoder(Source(name="a", path="-"), tokenizer)(str(tmp_path / "a.txt")))
    assert whole.bytes == 11

    class NoBegin:
        def __getattr__(self, name):
            return None if name == "bos" else getattr(tokenizer, name)

        def encode(self, text, **options):
            return tokenizer.encode(text, eos=True)

    cut = next(Encoder(Source(name="a", path="-"), NoBegin())(str(tmp_path / "a.txt")))
    assert cut.bytes == 11 - len(tokenizer.bytes_of[cut.ids[0]]) < 11
