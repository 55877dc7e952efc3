"""Which tensor of a GGUF file is which tensor of a Hugging Face folder, and in what form llama.cpp keeps it.

The names are those of the `gguf` library's own table. What llama.cpp's converter does to the numbers is a `Form`.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from jaxllm.errors import DataError
from jaxllm.families.base import Family, Map
from jaxllm.hf.gguf_file import Entry, library

Shape = tuple[int, ...]


def _same(x):
    return x


@dataclasses.dataclass(frozen=True)
class Form:
    """How a tensor of a folder is stored in a GGUF file, as one tensor or as several."""

    to_hf: Callable[..., np.ndarray] = _same
    to_gguf: Callable[[np.ndarray], np.ndarray | tuple[np.ndarray, ...]] = _same
    shape: Callable[[Shape], Shape] = _same
    """Shape in the folder, from that of a stored tensor; must take any shape, since files can hold any."""
    rows: Callable[[np.ndarray], np.ndarray] | None = None
    """`to_gguf` of a matrix that has its outputs first already, where only rows move; codes of a row stay together."""
    names: tuple[str, ...] = ()
    """Names in the file, without the layer's prefix, where the library's table has none."""

    def stored(self, value: np.ndarray) -> tuple[np.ndarray, ...]:
        out = self.to_gguf(value)
        return out if isinstance(out, tuple) else (out,)


SAME = Form(rows=_same)
#: Norms that multiply by 1 + w are stored as what they multiply by.
SHIFTED = Form(
    lambda x: np.asarray(x, np.float32) - np.float32(1),
    lambda x: np.asarray(x, np.float32) + np.float32(1),
)
TRANSPOSED = Form(lambda x: x.T, lambda x: x.T, lambda s: s[::-1], rows=_same)


def pairs(heads: int) -> Form:
    """Rows of a rotated head in pairs (x0 y0 x1 y1 ...), where a folder has halves (x0 x1 ... y0 y1 ...)."""

    def to_gguf(x):
        return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    return Form(lambda x: x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape), to_gguf, rows=to_gguf)


#: GPT-OSS: a folder has gate and up as alternating columns of one input-major tensor; E experts, F ffw, D embed.
GPT_OSS = {
    "self_attn.sinks": Form(names=("attn_sinks.weight",)),
    "mlp.experts.gate_up_proj": Form(
        lambda gate_EFD, up_EFD: (
            np.stack([gate_EFD, up_EFD], 2).reshape(len(up_EFD), -1, up_EFD.shape[2]).swapaxes(1, 2)
        ),
        lambda both_EDF: (both_EDF[:, :, ::2].swapaxes(1, 2), both_EDF[:, :, 1::2].swapaxes(1, 2)),
        lambda s: s[:1] + s[2:] + tuple(2 * n for n in s[1:2]),
        names=("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    ),
    "mlp.experts.gate_up_proj_bias": Form(
        lambda gate_EF, up_EF: np.stack([gate_EF, up_EF], 2).reshape(len(up_EF), -1),
        lambda both_EF: (both_EF[:, ::2], both_EF[:, 1::2]),
        lambda s: s[:1] + tuple(2 * n for n in s[1:]),
        names=("ffn_gate_exps.bias", "ffn_up_exps.bias"),
    ),
    "mlp.experts.down_proj": Form(
        lambda x_EDF: x_EDF.swapaxes(1, 2),
        lambda x_EFD: x_EFD.swapaxes(1, 2),
        lambda s: s[:1] + s[:0:-1],
        names=("ffn_down_exps.weight",),
    ),
    "mlp.experts.down_proj_bias": Form(names=("ffn_down_exps.bias",)),
}
#: GPT-2: a folder has its matrices input-major.
GPT2 = {f"{name}.weight": TRANSPOSED for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a family's table: names in the folder and in the file, `{i}` counting layers and `{e}` experts."""

    theirs: str
    names: tuple[str, ...]
    form: Form


def lines(family: Family, arch: str, form_of: Callable[[Map], Form]) -> tuple[Line, ...]:
    """The lines of a family that the architecture `arch` has a tensor for. Raises DataError without such a family."""
    gguf = library()
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if arch not in known:
        raise DataError(f"gguf {arch}: the installed gguf library does not know this architecture; update it")
    table = gguf.get_tensor_name_map(known[arch], 1)
    out = []
    for m in (*family.top, *family.layer):
        layer = family.base + family.prefix if m in family.layer else family.base
        theirs = m.theirs[1:] if m.theirs.startswith("/") else layer + m.theirs
        form = form_of(m)
        names = tuple("blk.{i}." + name for name in form.names) or _name(table, theirs)
        if names:
            out.append(Line(theirs, names, form))
    return tuple(out)


def _name(table, theirs: str) -> tuple[str, ...]:
    first = theirs.replace(".{e}.", ".").format(i=0)
    found = table.get_name(first, (".weight", ".bias"))
    return (found.replace("blk.0.", "blk.{i}."),) if found else ()


@dataclasses.dataclass(frozen=True)
class Folded:
    """A tensor of a folder, made of stored ones when it is read."""

    form: Form
    entries: tuple[Entry, ...]

    @property
    def shape(self) -> Shape:
        return self.form.shape(self.entries[0].shape)

    def map(self) -> np.ndarray:
        try:
            return self.form.to_hf(*(entry.map() for entry in self.entries))
        except ValueError:
            entry = self.entries[0]
            raise DataError(
                f"tensor {entry.name} has shape {list(entry.shape)}, which does not fit its heads"
            ) from None


def as_folder(found: tuple[Line, ...], layers: int, entries: Mapping[str, Entry]) -> dict[str, Folded | Entry]:
    """The tensors of a file by the names of a folder; the rest keep their own.

    Raises DataError for stored tensors that are to be joined and differ in shape.
    """
    out: dict[str, Folded | Entry] = {}
    used = set()
    for line in found:
        for i in range(layers if "{i}" in line.theirs else 1):
            names = [name.format(i=i) for name in line.names]
            if not all(name in entries for name in names):
                continue
            used |= set(names)
            stored = tuple(entries[name] for name in names)
            if len({entry.shape for entry in stored}) > 1:
                raise DataError(f"tensors {' and '.join(names)} differ in shape; the file is damaged")
            out |= _experts(line.theirs.replace("{i}", str(i)), line.form, stored)
    return out | {name: entry for name, entry in entries.items() if name not in used}


def _experts(theirs: str, form: Form, stored: tuple[Entry, ...]) -> dict[str, Folded]:
    if "{e}" not in theirs:
        return {theirs: Folded(form, stored)}
    return {
        theirs.format(e=e): Folded(form, tuple(entry.slice(e) for entry in stored)) for e in range(stored[0].shape[0])
    }
