"""The rows of each stage, as one way through the text."""

from collections.abc import Mapping, Sequence

from jaxllm.data.config import DataConfig
from jaxllm.data.mixture import Mixture, Place, mix
from jaxllm.data.store import TokenStore
from jaxllm.errors import SettingsError
from jaxllm.train.config import Stage


def make_streams(data: DataConfig, stages: Sequence[Stage], stores: Mapping[str, TokenStore]) -> list[Mixture]:
    """The mixture that each stage reads; each source goes on where the stages before have left it.

    Packed rows of another length begin the next epoch of their source (see `Rows.go_on`), which `renewed` says.
    Raises SettingsError for weights that cannot be mixed.
    """
    sources = {source.name: stores[source.name] for source in data.sources}
    options = dict(seed=data.seed, pack=data.pack, shuffle=data.shuffle, truncate=data.truncate)
    streams: list[Mixture] = []
    reached: dict[str, Place] = {}
    for stage in stages:
        streams.append(mix(sources, stage.weights or data.weights, stage.seq_len, reached=reached, **options))
        reached |= streams[-1].reached(stage.steps * stage.batch)
    return streams


def renewed(streams: Sequence[Mixture], index: int) -> list[str]:
    """The sources of a stage that begin an epoch, since an earlier stage left them amid rows of another length."""
    before = {name: rows for stream in streams[:index] for name, rows in zip(stream.names, stream.sources, strict=True)}
    here = zip(streams[index].names, streams[index].sources, strict=True)
    return [name for name, rows in here if name in before and rows.pack and rows.length != before[name].length]


def rows_of_step(stages: Sequence[Stage], step: int) -> tuple[int, range]:
    """`(stage, the rows of its stream)` that step `step` of a run reads, counted from 1. Raises SettingsError."""
    done = 0
    for index, stage in enumerate(stages):
        if done < step <= done + stage.steps:
            first = (step - 1 - done) * stage.batch
            return index, range(first, first + stage.batch)
        done += stage.steps
    raise SettingsError(f"step {step} is none of the run, whose steps are 1 to {done}")
