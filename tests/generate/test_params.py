"""Sampling parameters: one number for all rows or one for each, and what is out of range."""

import numpy as np
import pytest

from jaxllm.errors import SettingsError
from jaxllm.generate.params import make_sampling


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(temperature="0.5"), "temperature=0.5: must be 0"),
        (dict(temperature=None), "temperature=None: must be 0"),
        (dict(top_k=-1), "top_k=-1: must be an integer from 0"),
        (dict(top_k=1.5), "top_k=1.5: must be an integer from 0"),
        (dict(top_p=0), "top_p=0: must be above 0"),
        (dict(min_p=1.5), "min_p=1.5: must be from 0"),
        (dict(typical_p=0), "typical_p=0: must be above 0"),
        (dict(repetition_penalty=0), "repetition_penalty=0: must be above 0"),
        (dict(presence_penalty=float("inf")), "presence_penalty=inf: must be a finite number"),
        (dict(seed=2**32), "seed=4294967296: must be"),
        (dict(temperature=[1, 2, 3]), "3 values for 2 prompts"),
        (dict(temprature=1), "unknown option temprature; did you mean temperature"),
    ],
)
def test_parameters_out_of_range_are_refused(options, message):
    with pytest.raises(SettingsError, match=message):
        make_sampling(2, **options)


def test_one_number_is_for_all_rows():
    made = make_sampling(2, temperature=0.5, seed=range(2), top_k=np.array([3, 4]))
    assert made.temperature_B.tolist() == [0.5, 0.5] and made.seed_B.tolist() == [0, 1]
    assert made.top_k_B.tolist() == [3, 4] and made.top_k_B.dtype == np.int32 and made.seed_B.dtype == np.uint32
