"""The run folder belongs to one run: whose it is, its tokenizer, and that nothing is written over."""

import pytest
import small
import yaml

from jaxllm.config import to_dict
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import CheckpointError, ResourceError, SettingsError
from jaxllm.train.config import differences
from jaxllm.train.folder import RunFolder
from jaxllm.train.load import load_run

pytestmark = pytest.mark.fast


@pytest.fixture
def make(corpus, tmp_path):
    def make(**changes):
        return RunFolder(load_run(small.settings(corpus, tmp_path / "run", **changes))[0])

    return make


def test_looking_at_a_folder_writes_nothing(make, tmp_path):
    folder = make()
    folder.open_tokenizer(print)
    assert not folder.resumed and not (tmp_path / "run").exists()


def test_the_folder_is_recognised_by_its_settings(make, tmp_path):
    folder = make()
    folder.write_start(folder.open_tokenizer(print))
    assert load_run(tmp_path / "run/settings.yaml")[0] == folder.config
    assert make().resumed and make(log={"every": 5}).resumed
    with pytest.raises(CheckpointError, match="holds a run with other settings: train.steps: 8 there, 9 now"):
        make(train__steps=9)


def test_many_differences_are_counted(make):
    folder = make()
    folder.write_start(folder.open_tokenizer(print))
    with pytest.raises(CheckpointError, match="and [0-9]+ more. Give it the settings it had, or .*train.init="):
        make(model=small.MOE, optim={"name": "sgd"}, train={"steps": 1})


def test_damaged_settings_are_said(make, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/settings.yaml").write_text("train: {")
    with pytest.raises(SettingsError, match="settings.yaml: not valid YAML"):
        make()


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "checkpoints/8", "checkpoints/tokenizer", "checkpoints/3.unfinished"]
)
def test_parts_of_a_run_without_its_settings_are_left_alone(name, make, tmp_path):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=f"{name} is there, but no .*settings.yaml"):
        make()


def test_an_empty_folder_of_checkpoints_is_no_run(make, tmp_path):
    """As where a disk is mounted."""
    (tmp_path / "disk/lost+found").mkdir(parents=True)
    assert not make(checkpoint={"folder": str(tmp_path / "disk")}).resumed


def test_a_run_does_not_look_for_its_checkpoints_elsewhere(make, tmp_path):
    folder = make()
    folder.write_start(folder.open_tokenizer(print))
    with pytest.raises(CheckpointError, match="other settings: checkpoint.folder: None there, '.*' now"):
        make(checkpoint={"folder": str(tmp_path / "disk")})


def test_the_folders_own_tokenizer_comes_first(make, corpus, tmp_path):
    folder = make()
    own = Tokenizer.train(["some other text " * 50], 300)
    folder.write_start(own)
    assert yaml.safe_load((tmp_path / "run/settings.yaml").read_text())["data"]["tokenizer"] == str(
        corpus / "tokenizer"
    )
    assert make().open_tokenizer(print).hash == own.hash


def test_a_tokenizer_is_trained_where_none_is_named(make):
    said = []
    tokenizer = make(data__tokenizer=None, data__vocab=350).open_tokenizer(said.append)
    assert tokenizer.vocab == 350 and said == ["training a tokenizer of 350 pieces"]


def test_a_tokenizer_larger_than_the_model_is_refused(make):
    with pytest.raises(CheckpointError, match="400 pieces and the model a vocabulary of 399; set model.vocab=400"):
        make(model=small.MODEL | {"vocab": 399}).open_tokenizer(print)


def test_a_folder_that_cannot_be_written_is_said(make, tmp_path):
    folder = make()
    (tmp_path / "run").touch()
    with pytest.raises(ResourceError, match="run cannot be written .*out="):
        folder.write_start(folder.open_tokenizer(print))


def test_two_runs_cannot_have_one_folder(make, tmp_path):
    first, second = make(), make()
    tokenizer = first.open_tokenizer(print)
    first.write_start(tokenizer)
    with pytest.raises(CheckpointError, match=r"in use by another run \(process \d+ on .*out="):
        second.write_start(tokenizer)
    with pytest.raises(CheckpointError, match="in use"):
        make().lock()
    first.unlock()
    assert not second.resumed  # it saw an empty folder, and writes once the other one has ended
    with pytest.raises(CheckpointError, match="another run has begun"):
        second.write_start(tokenizer)
    second.unlock()
    resumed = make()
    resumed.lock()
    resumed.unlock()


def test_settings_of_the_version_before_are_read(corpus, tmp_path):
    """`log.profile` is now `profile.steps`; a run that was saved with it goes on."""
    config = load_run(small.settings(corpus, tmp_path / "run"))[0]
    old = to_dict(config)
    del old["profile"]
    old["log"] |= {"profile": "3-4"}
    assert differences(old, config) == {}
