"""What would make a step fit: settings that save memory, and what each of them saves, by formulas."""

import dataclasses
import itertools
import shlex
from collections.abc import Callable, Iterator, Sequence

from jaxllm import config as settings_of
from jaxllm.errors import UserError
from jaxllm.optim.config import HYPERPARAMETERS
from jaxllm.train.config import RunConfig
from jaxllm.train.estimate.held import Held, divided, held_by, most_of, table
from jaxllm.train.estimate.step import Step, describe, varied
from jaxllm.train.memory import size

#: So many settings are named where there are as many; and so many go together at most.
NAMED, TOGETHER = 3, 4
#: Where formulas say that it fits and it does not, so much of what they say is aimed at.
CLOSE = 0.9
#: Below this share of what there is, it is not the step that takes the memory.
SMALL = 0.5

Words = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Saving:
    """Overrides that belong together, and what they save: where several go together, beside those before them."""

    overrides: Words
    saves: float
    total: float
    """Bytes that a device needs with them."""
    devices: int | None = None
    """Where they are for another number of devices than the run has."""

    @property
    def words(self) -> str:
        """As one types them into a shell, and on how many devices."""
        return shlex.join(self.overrides) + (f" on {self.devices} devices" if self.devices else "")


@dataclasses.dataclass(frozen=True)
class Place:
    """Devices that a step is to fit."""

    devices: int
    platform: str
    capacity: float
    slices: int = 1
    factor: float = 1.0
    """What the compiler says, as a multiple of what formulas say."""
    grows: bool = True
    """Whether a run of more devices may be named; plans name slices instead."""
    known: dict[str, Step] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """Steps that are made: most settings that are tried leave the state as it is."""

    def step(self, config: RunConfig) -> Step:
        """Raises SettingsError for what no run could have."""
        plain = dataclasses.replace(config.model, remat="none", dtype="float32")
        train = dataclasses.replace(config.train, accumulate=1)
        key = repr(dataclasses.replace(config, model=plain, train=train))
        if key not in self.known:
            self.known[key] = describe(config, self.devices, self.slices)
        return varied(self.known[key], config)

    def total(self, config: RunConfig) -> float:
        """Bytes that a device needs. Raises SettingsError for what no run could have."""
        return self.factor * held_by(self.step(config), self.platform).total


def explain(config: RunConfig, first: str, place: Place, total: float | None = None) -> str:
    """An error of too little memory: what is needed by kind, and what would make it fit.

    `total`: bytes that the compiler says; None goes by formulas.
    """
    held = held_by(place.step(config), place.platform)
    need = max(total or 0.0, held.total)
    kinds = divided(held, need)
    by = "the compiler" if need > held.total else "formulas"
    head = f"a step needs {size(need)} of a device, by {by}"
    lines = [first, f"{head}, and there were {size(place.capacity)}", *table(kinds, most_of(held, kinds))]
    if need < SMALL * place.capacity:
        return "\n".join([*lines, "that is little of what was there: look for what else takes memory of the device"])
    return "\n".join([*lines, *listed(ways_to_fit(config, aimed(place, held, need)))])


def aimed(place: Place, held: Held, need: float) -> Place:
    """The place for a step that needs so much: more than formulas say, or as much as there is and it did not fit."""
    capacity = CLOSE * need if need <= place.capacity else place.capacity
    return dataclasses.replace(place, capacity=capacity, factor=need / held.total)


def listed(ways: Sequence[tuple[Saving, ...]]) -> list[str]:
    """The ways as lines."""
    if not ways:
        others = "take more, or a smaller model (model.embed, model.layers)"
        return [f"no other settings would make it fit on so many devices: {others}"]
    width = max(len(one.words) for way in ways for one in way)
    alone, chains = [way[0] for way in ways if len(way) == 1], [way for way in ways if len(way) > 1]
    groups = [("it would fit with" + " one of these" * (len(alone) > 1), alone)] * bool(alone)
    for chain in chains:
        groups.append(("or with these together" if groups else "it would fit with these together", chain))
    lines = []
    for head, savings in groups:
        lines.append(head)
        for one in savings:
            lines.append(f"  {one.words:<{width}}  saves {size(one.saves)}: {size(one.total)} needed")
    return lines


def ways_to_fit(config: RunConfig, place: Place) -> list[tuple[Saving, ...]]:
    """What would make it fit, each by itself or some together, what costs least first; empty where nothing would."""
    try:
        now = place.total(config)
    except UserError:
        return []
    found = [(ladder, _best(ladder, config, place, now)) for ladder in LADDERS]
    alone = {ladder: one for ladder, one in found if one and one.total <= place.capacity}
    ways = [(one,) for one in list(alone.values())[:NAMED]]
    left = [ladder for ladder in LADDERS if ladder not in alone]
    while sum(map(len, ways)) < NAMED and (chain := _together(config, place, now, left)):
        ways.append(tuple(found for _, found in chain))
        left.remove(chain[0][0])
    if place.grows and sum(map(len, ways)) < NAMED and (more := _devices(config, place, now)):
        ways.append((more,))
    return sorted(ways, key=lambda way: len(way) > 1)


def _devices(config: RunConfig, place: Place, now: float) -> Saving | None:
    """The fewest devices that share weights as these do, and hold no more; with as many rows, where there are fewer."""
    for n in (place.devices * 2**k for k in range(1, 11)):
        there = dataclasses.replace(place, devices=n, known={})
        rest = place.devices // place.step(config).sharding.mesh.shape["fsdp"]
        whole = ("train.accumulate=1",) * (config.train.accumulate > 1)
        for rows in ((), (f"train.batch={n}", *whole)):
            words = (f"parallel.fsdp={n // rest}", *rows)
            if (found := _saving(words, config, there, now)) and found.total <= place.capacity:
                return dataclasses.replace(found, devices=n)
    return None


def applied(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The settings with overrides, as if they were typed behind the settings file. Raises SettingsError."""
    raw = settings_of.to_dict(config)
    if any(text.startswith("optim.name=") for text in overrides):  # its numbers are those of the other one
        raw["optim"] = {name: value for name, value in raw["optim"].items() if name not in _numbers()}
    return settings_of.parse(RunConfig, settings_of.merge(RunConfig, raw, overrides)[0])


def _numbers() -> set[str]:
    return {name for numbers in HYPERPARAMETERS.values() for name in numbers}


def _best(ladder: Callable, config: RunConfig, place: Place, now: float) -> Saving | None:
    """The first rung that fits, else the lowest; None where none saves anything."""
    rungs = list(ladder(config, place.step(config)))
    tried = {words: saving for words in rungs[-1:] if (saving := _saving(words, config, place, now))}
    if tried and min(one.total for one in tried.values()) > place.capacity:
        return tried[rungs[-1]]
    for words in rungs:
        if (saving := tried.get(words) or _saving(words, config, place, now)) and saving.total <= place.capacity:
            return saving
        tried |= {words: saving} if saving else {}
    return min(tried.values(), key=lambda one: one.total, default=None)


def _saving(words: Words, config: RunConfig, place: Place, now: float) -> Saving | None:
    try:
        total = place.total(applied(config, words))
    except UserError:
        return None
    # What saves less than a hundredth is not worth naming.
    return Saving(words, now - total, total) if now - total > 0.01 * now else None


def _together(
    config: RunConfig, place: Place, now: float, ladders: Sequence[Callable]
) -> list[tuple[Callable, Saving]]:
    """Settings that fit together: what changes neither data nor model first, of these what saves most."""
    for group in (FREE, (*FREE, *LATER), LADDERS):
        chain, at, need = [], config, now
        allowed = [ladder for ladder in ladders if ladder in group]
        while need > place.capacity and len(chain) < TOGETHER:
            taken = [ladder for ladder, _ in chain]
            found = [(one, _best(one, at, place, need)) for one in allowed if one not in taken]
            found = [(one, saving) for one, saving in found if saving]
            if not found:
                break
            fits = [pair for pair in found if pair[1].total <= place.capacity]
            chain.append(fits[0] if fits else max(found, key=lambda pair: pair[1].saves))
            at, need = applied(at, chain[-1][1].overrides), chain[-1][1].total
        if len(chain) > 1 and need <= place.capacity:
            return _relaxed(chain, config, place, now)
    return []


def _relaxed(chain, config: RunConfig, place: Place, now: float) -> list[tuple[Callable, Saving]]:
    """The same settings, each no further down than is needed beside the others."""
    words = [one.overrides for _, one in chain]
    for i, (ladder, one) in enumerate(chain):
        for rung in ladder(config, place.step(config)):
            trial = _saving(sum([*words[:i], rung, *words[i + 1 :]], ()), config, place, now)
            if rung == one.overrides or (trial and trial.total <= place.capacity):
                words[i] = rung
                break
    found, at, need = [], config, now
    for (ladder, _), told in zip(chain, words, strict=True):
        at = applied(at, told)
        found.append((ladder, Saving(told, need - place.total(at), place.total(at))))
        need = found[-1][1].total
    return found


def _fsdp(config: RunConfig, step: Step) -> Iterator[Words]:
    """Weights split over the devices that hold them alike."""
    data, fsdp = (step.sharding.mesh.shape[axis] for axis in ("data", "fsdp"))
    for less in (n for n in reversed(_divisors(data)) if n < data):
        yield f"parallel.data={less}", f"parallel.fsdp={fsdp * data // less}"


def _accumulate(config: RunConfig, step: Step) -> Iterator[Words]:
    rows = step.stage.batch // step.sharding.batch_size
    yield from ((f"train.accumulate={n}",) for n in _divisors(rows) if n > config.train.accumulate)


def _remat(config: RunConfig, step: Step) -> Iterator[Words]:
    yield from (("model.remat=full",),) * (config.model.remat != "full")


def _wait(config: RunConfig, step: Step) -> Iterator[Words]:
    """Experts on loan need room, used or not."""
    yield from (("kernels.experts=wait",),) * (config.kernels.experts != "wait")


def _dtype(config: RunConfig, step: Step) -> Iterator[Words]:
    yield from (("model.dtype=bfloat16",),) * (config.model.dtype == "float32")


def _optimizer(config: RunConfig, step: Step) -> Iterator[Words]:
    """With what the other one was told, since this one would refuse it."""
    optim = config.optim
    if optim.name != "adafactor":
        own = HYPERPARAMETERS.get(optim.name) or dict.fromkeys(_numbers())
        told = [name for name, value in own.items() if getattr(optim, name) != value]
        yield "optim.name=adafactor", *(f"optim.{name}=null" for name in told)


def _ema(config: RunConfig, step: Step) -> Iterator[Words]:
    yield from (("train.ema=null",),) * (config.train.ema is not None)


def _lora(config: RunConfig, step: Step) -> Iterator[Words]:
    """Where there are weights to start from, and all of them train."""
    if config.train.init and not config.lora and not config.qat and config.train.trainable is None:
        yield ("lora={rank: 16}",)


def _quantize(config: RunConfig, step: Step) -> Iterator[Words]:
    """Frozen weights alone can be codes."""
    if config.lora and not config.quantize:
        yield from ((f"quantize={{rules: [{{format: {name}}}]}}",) for name in ("int8", "nf4"))


def _rows(config: RunConfig, step: Step) -> Iterator[Words]:
    least = step.sharding.batch_size * config.train.accumulate
    powers = [2**n for n in range((config.train.batch // least).bit_length()) if least * 2**n < config.train.batch]
    yield from ((f"train.batch={least * n}",) for n in reversed(powers))


def _length(config: RunConfig, step: Step) -> Iterator[Words]:
    halves = (config.train.seq_len // 2**n for n in itertools.count(1))
    yield from ((f"train.seq_len={n}",) for n in itertools.takewhile(lambda n: n >= 128, halves))


def _layers(config: RunConfig, step: Step) -> Iterator[Words]:
    """Of new weights alone."""
    if not config.train.init:
        whole, period = len(config.model.prefix), len(config.model.pattern)
        fewer = (whole + period * (config.model.periods // 2**n) for n in range(1, 4))
        yield from ((f"model.layers={n}",) for n in dict.fromkeys(fewer) if max(whole, 0) < n < config.model.layers)


def _divisors(n: int) -> list[int]:
    return sorted({d for k in range(1, int(n**0.5) + 1) if n % k == 0 for d in (k, n // k)})


#: Settings that save memory, each in steps from the least to the most: those that cost time alone, then those that
#: change what is learnt.
FREE = (_fsdp, _accumulate, _remat, _wait, _dtype, _ema, _optimizer)
LATER = (_lora, _quantize, _rows, _length)
LADDERS = (*FREE, *LATER, _layers)
