import pytest

from jaxllm.verify.lab import Lab


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("verify")


@pytest.fixture
def lab(shared, tmp_path, monkeypatch):
    """A lab whose text, tokenizer and compiled programs all tests share, with few cases."""
    (shared / "shared").mkdir(exist_ok=True)
    monkeypatch.setattr(Lab, "shared", property(lambda self: shared / "shared"))
    return Lab(tmp_path, say=lambda text: None)
