"""`jaxllm plan` from the command line."""

import json

import plans
import pytest
import yaml

from jaxllm import cli


@pytest.fixture(autouse=True)
def environment():
    with plans.environment():
        yield


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            plans.settings(
                model={"vocab": 1024, "embed": 128, "layers": 2, "context": 512}
                | {"pattern": plans.MODELS["llama"]["pattern"]}
            )
        )
    )
    return str(path)


def run(capsys, *words: str):
    code = cli.main(["plan", *words])
    return code, *capsys.readouterr()


@pytest.mark.fast
def test_a_plan_in_words_and_as_json(file, capsys):
    code, out, _ = run(capsys, file, "--topology", "h100:8", "--tokens", "15e12", "train.batch=32")
    assert code == 0 and "15,000,000,000,000 tokens" in out and "MFU" in out
    code, out, _ = run(capsys, file, "--topology", "v6e:2x4", "--no-compile", "--json", "train.batch=32")
    found = json.loads(out)
    assert code == 0 and found["run"]["rows"] == 32 and found["compiled"] is None


@pytest.mark.fast
def test_what_does_not_fit_is_shown_and_fails(capsys):
    code, out, err = run(capsys, "llama3.1-70b", "--topology", "v6e:2x4", "--no-compile")
    assert code == 2 and "(too much)" in out and err.startswith("error: v6e:2x4: a device needs ")
    code, out, _ = run(capsys, "llama3.1-70b", "--topology", "v6e:2x4", "--no-compile", "--json")
    assert code == 2 and json.loads(out)["memory"]["fits"] is False


@pytest.mark.fast
def test_search_and_generation(file, capsys):
    code, out, err = run(capsys, file, "--topology", "v6e:2x4", "--search", "--compile", "0")
    assert code == 0 and "parallel.fsdp=8" in out and "candidates by formulas" in err
    words = ("--generate", "--batch", "8", "--context", "256", "--weights", "int8", "--no-compile")
    code, out, _ = run(capsys, file, "--topology", "v6e:2x2", *words)
    assert code == 0 and "8 rows of 256 tokens" in out and "quantize int8" in out


@pytest.mark.fast
@pytest.mark.parametrize(
    "words, says",
    [
        (("--batch", "8"), "without --generate this plans training and would ignore --batch"),
        (("--generate", "--tokens", "1e9"), "--generate plans no training and would ignore --tokens"),
        (("--generate", "--search"), "would ignore --search"),
        (("--compile", "3"), "without --search one plan is made and would ignore --compile"),
        (("--search", "--no-compile"), "would ignore --no-compile"),
        (("--tokens", "-1"), "--tokens -1: must be above 0"),
        (("--topology", "v6e:3x3"), "no such slice; did you mean v6e:2x4?"),
        (("--prices", "none.yaml"), "--prices none.yaml: no such file"),
        (("model.embd=3",), "unknown setting model.embd; did you mean model.embed?"),
    ],
)
def test_bad_input_is_one_line(file, capsys, words, says):
    words = words if "--topology" in words else (*words, "--topology", "v6e:2x4")
    code, out, err = run(capsys, file, *words)
    assert code == 2 and out == "" and says in err and err.count("\n") == 1


def test_the_compiled_plan_with_a_chart(file, tmp_path, capsys):
    code, out, _ = run(capsys, file, "--topology", "cpu:8", "--chart", str(tmp_path / "plan.png"))
    assert code == 0 and "memory of a device, by the compiled program" in out
    assert (tmp_path / "plan.png").stat().st_size > 10_000
