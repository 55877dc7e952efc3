"""`adapter_config.json`: what of it changes what an adapter computes, and what cannot be done here."""

import dataclasses
import math
import re
from pathlib import Path

from jaxllm.errors import DataError, SettingsError
from jaxllm.hf.safetensors import read_json

#: Keys that change nothing once an adapter is trained.
IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
READ = {
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
}
#: Ways to start that leave the base as it is; the others take a part of it away.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The settings of an adapter."""

    where: str
    raw: dict

    @property
    def dora(self) -> bool:
        return bool(self.raw.get("use_dora", False))

    @property
    def kind(self) -> str:
        return "dora" if self.dora else "rslora" if self.raw.get("use_rslora") else "lora"

    @property
    def dropout(self) -> float:
        return float(self.raw.get("lora_dropout", 0.0))

    def rank(self, module: str) -> int:
        return self._by_pattern("rank_pattern", module, self.raw.get("r", 8))

    def scale(self, module: str) -> float:
        """alpha / rank, or alpha / sqrt(rank)."""
        rank, alpha = self.rank(module), self._by_pattern("alpha_pattern", module, self.raw.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if self.raw.get("use_rslora") else rank)

    def targets(self, module: str) -> bool:
        """Whether the settings say that the module has an adapter, where they say so of all layers alike."""
        names = self.raw.get("target_modules")
        if any(self.raw.get(key) for key in ("layers_to_transform", "exclude_modules")) or names == "all-linear":
            return False
        if isinstance(names, str):
            return self._matches(names, module)
        return any(module == name or module.endswith("." + name) for name in names or ())

    def _by_pattern(self, key: str, module: str, default):
        """The value of the first pattern that ends the module's name, as in peft."""
        for pattern, value in (self.raw.get(key) or {}).items():
            if self._matches(rf"(.*\.)?({pattern})", module):
                return value
        return default

    def _matches(self, pattern: str, module: str) -> bool:
        try:
            return re.fullmatch(pattern, module) is not None
        except re.error as error:
            raise DataError(f"{self.where}: {pattern!r} is not a regular expression ({error})") from None


def read_config(path: Path) -> PeftConfig:
    """Raises DataError for a damaged file, SettingsError for what peft can and this cannot do, by its key."""
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise SettingsError(f"{path}: peft_type={raw.get('peft_type')!r}; only LORA is read")
    if raw.get("bias", "none") != "none":
        raise SettingsError(
            f"{path}: bias={raw['bias']!r} trains biases of the base; merge the adapter with peft first"
        )
    start = raw.get("init_lora_weights", True)
    if start not in STARTS:
        raise SettingsError(
            f"{path}: init_lora_weights={start!r} takes a part of the base's weights into the adapter; convert it to "
            "plain LoRA with peft (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    unknown = [key for key in raw if key not in IGNORED | READ and raw[key] not in (None, False, {}, [])]
    if unknown:
        raise SettingsError(
            f"{path}: {unknown[0]}={raw[unknown[0]]!r} is not read here; merge the adapter with peft first"
        )
    _check_numbers(path, raw)
    return PeftConfig(str(path), raw)


def _check_numbers(path: Path, raw: dict) -> None:
    for key, kinds in (("rank_pattern", dict), ("alpha_pattern", dict), ("target_modules", (list, str))):
        if raw.get(key) is not None and not isinstance(raw[key], kinds):
            raise DataError(f"{path}: {key}={raw[key]!r} is of the wrong type")
    ranks = [("r", raw.get("r", 8)), *(raw.get("rank_pattern") or {}).items()]
    alphas = [("lora_alpha", raw.get("lora_alpha", 8)), *(raw.get("alpha_pattern") or {}).items()]
    for key, value in ranks:
        if type(value) is not int or value < 1:
            raise DataError(f"{path}: {key}={value!r} must be a rank, an integer from 1")
    for key, value in alphas:
        if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
            raise DataError(f"{path}: {key}={value!r} must be a number above 0")
    dropout = raw.get("lora_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise DataError(f"{path}: lora_dropout={dropout!r} must lie in [0, 1)")
