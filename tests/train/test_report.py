import os
import re
import subprocess
import sys

import numpy as np
import pytest

from jaxllm.errors import DataError
from jaxllm.train.report import draw_loss, git_state, plot_loss, run_card, running_mean, versions

ROWS = [{"step": i, "tokens": 100 * (i + 1), "loss": 8.0 / (i + 1)} for i in range(100)]
ROWS[49] |= {"heldout_loss": 0.5, "bits_per_byte": 1.2}
ROWS[99] |= {"heldout_loss": 0.25}
ROWS[10] |= {"loss": None}


def test_the_figure_holds_every_point_over_tokens():
    (axes,) = draw_loss(ROWS, "a run").axes
    train, mean, heldout = axes.lines
    tokens = np.arange(100, 10_001, 100)
    np.testing.assert_array_equal(train.get_xdata(), tokens)
    assert np.isnan(train.get_ydata()[10]) and train.get_ydata()[1] == 4.0
    assert np.isfinite(mean.get_ydata()).all() and len(mean.get_ydata()) == 100
    assert [*zip(*heldout.get_data(), strict=True)] == [(5000, 0.5), (10_000, 0.25)]
    assert (axes.get_xlabel(), axes.get_title()) == ("tokens", "a run")
    assert any("0.250" in text.get_text() for text in axes.get_legend().get_texts())


def test_a_held_out_sample_is_a_curve_of_its_own():
    rows = [{"tokens": 10 * i, "heldout_loss_sample": 1.0 / i} for i in (1, 2)] + [{"tokens": 20, "heldout_loss": 0.75}]
    sample, heldout = draw_loss(rows).axes[0].lines
    assert [*sample.get_ydata()] == [1.0, 0.5] and [*heldout.get_ydata()] == [0.75]


def test_png_on_disk(tmp_path):
    plot_loss(ROWS, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("rows", [ROWS[:1], [{"step": 0, "tokens": 5, "loss": None}], [ROWS[99]]])
def test_short_runs_are_drawn(rows, tmp_path):
    plot_loss(rows, tmp_path / "loss.png")


@pytest.mark.parametrize("rows", [[], [{"step": 0, "tokens": 5}]])
def test_nothing_to_draw(rows, tmp_path):
    with pytest.raises(DataError, match=f"{len(rows)} rows"):
        plot_loss(rows, tmp_path / "loss.png")


def test_running_mean():
    values = np.arange(200.0)
    mean = running_mean(values)
    np.testing.assert_allclose(mean[4:-4], values[4:-4])
    assert mean[0] == np.mean(values[:5]) and mean[-1] == np.mean(values[-5:])
    values[50] = np.nan
    assert running_mean(values)[50] == 50.0
    assert np.isnan(running_mean(np.array([np.nan, 1.0]))[0])


CARD = {
    "name": "demo",
    "settings": {"model.embed": 256, "data.path": "a|b"},
    "git": "commit 123, clean",
    "data": {"fingerprint": "abcd", "tokens": 1000},
    "devices": "8 x TPU v4",
    "parameters": {"total": 3_000_000, "active": 2_000_000},
    "flops": {"per_token": 12_500_000.0, "active": 2_000_000, "length": 512},
    "speed": {"tokens_per_second": 12_345.6, "mfu": 0.4321},
    "memory": {"host_bytes": 3 * 2**29, "device_bytes": 2**30},
    "final": {"loss": 2.34567891, "bits_per_byte": 1.1},
}


def test_the_card_holds_what_was_given():
    card = run_card(**CARD)
    for text in (
        "# demo\n",
        "| model.embed | 256 |",
        r"| data.path | a\|b |",
        "- code: commit 123, clean",
        "- data fingerprint: abcd",
        "3,000,000 (2,000,000 active",
        "1.25e+07 = 6 * 2,000,000 weights in matrix products + 5e+05 in attention",
        "8 x TPU v4",
        "tokens/s: 12,346",
        "MFU: 43.2%",
        "1.5 GiB on the host, 1.0 GiB on the fullest device",
        "| loss | 2.34568 |",
        "- python: ",
        "- jax: ",
    ):
        assert text in card, text


def test_the_card_says_what_is_not_known():
    card = run_card(**CARD | {"settings": {}, "speed": {}, "memory": {"host_bytes": 1}})
    for text in ("all settings are the defaults", "MFU: peak unknown", "too few steps", "not reported by the devices"):
        assert text in card, text


def test_versions_name_every_package():
    assert set(versions()) >= {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "jaxllm"}
    assert re.fullmatch(r"\d+\.\d+\.\S+", versions()["jax"])


def test_git_state(tmp_path, monkeypatch):
    repository, outside = tmp_path / "repository", tmp_path / "outside"
    repository.mkdir(), outside.mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))

    def git(*arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, *arguments], cwd=repository, check=True, capture_output=True)

    git("init")
    (repository / "code.py").write_text("1")
    assert git_state(repository).startswith("commit unknown")
    git("add", ".")
    git("commit", "-m", "one")
    assert re.fullmatch("commit [0-9a-f]{40}, clean", git_state(outside, repository))
    (repository / "note").write_text("")
    assert git_state(repository).endswith(", clean, 1 untracked")
    (repository / "code.py").write_text("2")
    assert git_state(repository).endswith(", 1 files changed, 1 untracked")
    assert git_state(outside) == git_state() and "unknown" in git_state()
    monkeypatch.setenv("PATH", os.devnull)
    assert git_state(repository).startswith("commit unknown: git is not installed")


def test_report_and_runs_load_no_jax_and_no_matplotlib():
    code = (
        "import sys, jaxllm.train.report, jaxllm.train.runs; sys.exit(bool({'jax', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
