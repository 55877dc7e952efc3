"""What an hour of a chip costs, by a file that the user edits; no price comes with jaxllm."""

import dataclasses
from pathlib import Path
from typing import Annotated

from pydantic import Field

from jaxllm import config as settings_of
from jaxllm.chips import CHIPS
from jaxllm.config import settings
from jaxllm.errors import SettingsError, nearest


@settings
class Prices:
    """Prices of chips, such as those of configs/prices.yaml."""

    currency: str = "USD"
    """What the numbers are in."""
    date: str | None = None
    """When they were looked up, which is shown beside every sum; needed where there are numbers."""
    chip_hour: dict[str, Annotated[float, Field(gt=0)] | None] = dataclasses.field(default_factory=dict)
    """Price of one TPU chip or one GPU for an hour, by the names of the table of chips; null where it is not known."""

    def __post_init__(self):
        for name in self.chip_hour:
            if name not in CHIPS:
                raise ValueError(f"chip_hour: unknown chip {name!r}{nearest(name, CHIPS)}")
        if any(self.chip_hour.values()) and not self.date:
            raise ValueError("date: say when these prices were looked up, such as date: 2026-11-27")


def read_prices(path: str | None) -> tuple[Prices, str]:
    """The prices of a file, by default of configs/prices.yaml, and the name of the file. Raises SettingsError."""
    file = Path(path) if path else settings_of.config_dir() / "prices.yaml"
    if not file.is_file():
        raise SettingsError(
            f"--prices {path}: no such file; copy {settings_of.config_dir() / 'prices.yaml'} and fill it"
        )
    raw = settings_of.read_yaml(file)
    raw |= {"date": str(raw["date"])} if raw.get("date") is not None else {}  # YAML reads a date as one
    return settings_of.parse(Prices, raw, str(file)), str(path or "configs/prices.yaml")
