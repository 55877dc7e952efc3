"""Angles by row length, and the factors on cos and sin; the equations themselves are in test_reference.py."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm.config import parse
from jaxllm.model.rope import angles, frequencies, lengths, tables
from jaxllm.model.spec import RopeSpec

YARN = {"scaling": "yarn", "factor": 4.0, "original_context": 16}
LONG = {"scaling": "longrope", "original_context": 16, "short_factors": [1, 1, 2, 2], "long_factors": [2, 3, 5, 9]}


def rope(**settings) -> RopeSpec:
    return parse(RopeSpec, settings)


@pytest.mark.fast
def test_the_factor_on_cos_and_sin_is_the_one_given():
    """0 is a number like any other; null means the method's own."""
    for spec, own in ((YARN, 1.1386), (LONG, 1.0), (LONG | {"factor": 4.0}, 1.2247)):
        assert frequencies(rope(**spec), 8, 1)[1] == pytest.approx(own, abs=1e-4)
        given = {key: value for key, value in spec.items() if spec is YARN or key != "factor"}
        for factor in (0.0, 0.5):
            assert frequencies(rope(**given, attention_factor=factor), 8, 1)[1] == factor


def row_tables(spec, positions):
    """Those of rows that are as long as they are here."""
    return tables(spec, 8, jnp.asarray(positions), lengths(jnp.asarray(positions), None))


@pytest.mark.fast
def test_long_factors_are_for_rows_longer_than_the_original_context():
    """Rows of 16 and of 17 tokens in one batch; the angle of position 1 is the frequency."""
    positions = np.stack([np.r_[np.arange(16), -1], np.arange(17)])
    plain = 10_000.0 ** (-np.arange(4) / 4)
    cos, sin = (np.asarray(x)[:, 1] for x in row_tables(rope(**LONG), positions))
    np.testing.assert_allclose(np.arctan2(sin[0], cos[0]), plain / LONG["short_factors"], rtol=1e-6, atol=2e-9)
    np.testing.assert_allclose(np.arctan2(sin[1], cos[1]), plain / LONG["long_factors"], rtol=1e-6, atol=2e-9)


@pytest.mark.parametrize("spec", [LONG, {"scaling": "dynamic_ntk", "factor": 4.0, "original_context": 16}])
def test_a_part_of_a_row_has_the_angles_of_the_whole(spec):
    positions = jnp.arange(40)[None]
    whole = row_tables(rope(**spec), positions)
    part = tables(rope(**spec), 8, positions[:, :9], jnp.array([[40]]))
    assert tiny.bit_equal(part, tuple(x[:, :9] for x in whole))
    alone = row_tables(rope(**spec), positions[:, :9])
    assert tiny.worst(alone, part) > 0.1


@pytest.mark.fast
@pytest.mark.parametrize("base", [100.0, 10_000.0, 1e6])
def test_angles_are_right_at_every_position(base):
    """A float32 product is wrong by 0.008 at 131,071."""
    position = np.array([[0, 1, 7, 511, 32_767, 131_071, 2**20 + 1, 2**24 - 1]])
    frequency = base ** (-np.arange(16) / 16)
    found = np.asarray(angles(frequency, jnp.asarray(position)), np.float64)
    error = np.mod(found - position[..., None] * frequency + np.pi, 2 * np.pi) - np.pi
    assert np.abs(found).max() <= np.pi + 1e-6
    assert (np.abs(error) < 4e-7 + 3e-12 * position[..., None]).all()


@pytest.mark.fast
@pytest.mark.parametrize("spec", [LONG, {"scaling": "dynamic_ntk", "factor": 4.0, "original_context": 16}])
def test_packed_documents_have_the_angles_that_they_have_alone(spec):
    sizes = (9, 30, 5)
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in sizes])[None])
    segments = jnp.asarray(np.repeat([1, 2, 3], sizes)[None])
    packed, start = tables(rope(**spec), 8, positions, lengths(positions, segments)), 0
    for n in sizes:
        alone = row_tables(rope(**spec), np.arange(n)[None])
        assert tiny.bit_equal(tuple(x[:, start : start + n] for x in packed), alone)
        start += n
