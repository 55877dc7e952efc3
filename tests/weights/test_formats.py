"""Number formats: the nearest code of every value, codes packed and back without a change, and the published levels."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.errors import SettingsError
from jaxllm.weights.formats import FORMATS, Format, get_format


def all_codes(kind):
    """Every code of a format; fp8 without its two NaNs."""
    if kind.name == "fp8":
        codes = np.arange(256, dtype=np.uint8)
        return jnp.asarray(codes[(codes & 0x7F) != 0x7F]).view(jnp.float8_e4m3fn)
    low = 0 if kind.levels else -(2 ** (kind.bits - 1)) + (kind.bits == 8)
    return jnp.arange(low, low + 2**kind.bits - (kind.bits == 8), dtype=jnp.int8)


@pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)
def test_every_code_is_its_own_nearest_and_survives_packing(kind):
    codes = all_codes(kind)
    values = kind.decode(codes, jnp.float32)
    assert len(np.unique(np.asarray(values))) == len(codes) - (kind.name == "fp8")  # 0 and -0
    assert np.asarray(kind.encode(values)).tobytes() == np.asarray(codes).tobytes()
    rows = jnp.tile(codes, 8)[: len(codes) // 4 * 8].reshape(2, -1)
    packed = kind.pack(rows)
    assert packed.size * 8 == rows.size * kind.bits
    assert np.asarray(kind.unpack(packed)).tobytes() == np.asarray(rows).tobytes()


@pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)
def test_codes_are_the_nearest_ones_and_values_out_of_range_take_the_last(kind):
    values = np.random.default_rng(0).uniform(-1.5, 1.5, 4000).astype(np.float32) * kind.largest
    levels = np.asarray(kind.decode(all_codes(kind), jnp.float32), np.float64)
    found = np.asarray(kind.decode(kind.encode(jnp.asarray(values)), jnp.float32), np.float64)
    least = np.min(np.abs(values[:, None].astype(np.float64) - levels), axis=1)
    np.testing.assert_allclose(np.abs(values - found), least, atol=1e-6 * kind.largest)


def test_normal_float_has_the_published_levels():
    """Dettmers et al. 2023, arXiv 2305.14314, appendix E."""
    published = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    np.testing.assert_allclose(FORMATS["nf4"].levels, published, atol=1e-6)


def test_formats_from_outside_and_unknown_ones(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "formats_outside.py").write_text(
        "from jaxllm.weights.formats import Format\nODD = Format('odd', 4, 3.0, tuple(map(float, range(-3, 13))))\n"
    )
    odd = get_format("formats_outside:ODD")
    np.testing.assert_array_equal(odd.decode(odd.encode(jnp.asarray([-9.0, 0.4, 11.6])), jnp.float32), [-3, 0, 12])
    with pytest.raises(SettingsError, match="unknown format 'in8'; did you mean int8.*known are int8, int4"):
        get_format("in8")
    for name in ("nowhere:ODD", "formats_outside:EVEN", "math:pi"):
        with pytest.raises(SettingsError, match=f"{name}.*package.module:NAME"):
            get_format(name)


@pytest.mark.parametrize(
    "parts, says",
    [
        (
            dict(bits=4, largest=1.0, levels=(0.0, 1.0, -1.0)),
            "3 levels: codes of 4 bits stand for 2 to 16 .* ascending",
        ),
        (dict(bits=2, largest=1.0, levels=(-1.0, -0.5, 0.0, 0.5, 1.0)), "5 levels: codes of 2 bits stand for 2 to 4"),
        (dict(bits=2, largest=2.0, levels=(-1.0, 0.0, 1.0)), "largest=2.0 must be above 0, and at most the 1.0"),
        (dict(bits=4, largest=15.0), "largest=15.0 must be above 0, and at most the 7 that its codes reach"),
        (dict(bits=8, largest=448.0, dtype="float8_e3m4"), "largest=448.0 must be .* at most the 15.5"),
        (dict(bits=8, largest=1.0, dtype="float9"), "dtype=float9: .* those of a jax dtype"),
        (dict(bits=8, largest=0.0), "largest=0.0 must be above 0"),
        (dict(bits=16, largest=1.0), "bits=16, dtype=None: codes have 1 to 8 bits"),
        (dict(bits=4, largest=6.0, dtype="float8_e5m2"), "bits=4, dtype=float8_e5m2: .* dtype have 8 and no levels"),
    ],
)
def test_a_format_whose_parts_do_not_fit_is_refused(parts, says):
    with pytest.raises(SettingsError, match=f"format odd: .*{says}"):
        Format("odd", **parts)


def test_another_float_type_is_one_entry():
    """e5m2 of fp8, against ml_dtypes."""
    kind, values = Format("e5m2", 8, 57344.0, dtype="float8_e5m2"), np.float32([0.3, -57344, 1e-5, 3.3])
    found = kind.decode(kind.encode(jnp.asarray(values)), jnp.float32)
    np.testing.assert_array_equal(found, values.astype(ml_dtypes.float8_e5m2).astype(np.float32))
    assert not kind.integer
