"""Where text comes from: settings of a source, and the files that it means."""

import difflib
import glob
import os
import re
from collections.abc import Iterator
from typing import Literal

from etils import epath

from jaxllm.config import settings
from jaxllm.data import stdlib
from jaxllm.errors import DataError

#: Ends of the names of compressed files that are read, and of some that are not.
COMPRESSED = (".gz", ".zst")
UNREAD = (".xz", ".bz2", ".zip", ".7z", ".lz4", ".br", ".tar", ".tgz", ".tar.gz", ".tar.zst", ".rar")
#: Formats of conversations.
TURNS = ("chat", "pairs", "prompts")
Format = Literal["auto", "text", "jsonl", "parquet", "dataset", "chat", "pairs", "prompts"]


@settings
class Source:
    """One kind of text, by glob; `weight` is its share of the training rows."""

    name: str
    """how mixtures, stores and reports call it"""
    path: str | tuple[str, ...]
    """files, globs or dataset folders, local or gs://; python-stdlib, python-stdlib:train, python-stdlib:heldout"""
    weight: float = 1.0
    """share of the training rows (so of the tokens), relative to the other sources"""
    format: Format = "auto"
    """text, jsonl, parquet, dataset (a local Hugging Face folder), chat (a conversation a line), pairs (a chosen and a
    rejected answer a line), prompts (for a teacher to answer, one a line); auto: by the name"""
    field: str = "text"
    """the key or column that holds the text, in all formats but text, chat, pairs and prompts"""
    document: Literal["file", "line", "blank_line"] = "file"
    """what one document is in a text file: all of it, a line, or what lies between blank lines"""

    def __post_init__(self):
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"name={self.name!r}: use letters, digits, dots, dashes and underscores")
        if not self.weight >= 0:
            raise ValueError(f"weight={self.weight}: must not be negative")
        if self.format not in ("auto", "text") and self.document != "file":
            raise ValueError(f"document={self.document} would be ignored: in the format {self.format} it is a record")
        if self.format in ("text", *TURNS) and self.field != "text":
            raise ValueError(f"field={self.field} would be ignored in the format {self.format}")


def files(source: Source) -> list[str]:
    """The files of a source, sorted, each once. Empty files among many are left out.

    Raises DataError for a pattern that matches nothing, or nothing but empty files.
    """
    return matched(source)[0]


def matched(source: Source) -> tuple[list[str], int]:
    """`files`, and how many empty ones are left out."""
    found, empty = [], set()
    for pattern in patterns(source):
        paths = sorted(_expand(pattern, source))
        full = [path for path in paths if size(path) > 0]
        if not full:
            every = f" (and so are all {len(paths)} files of {pattern})" if paths[1:] else ""
            raise DataError(f"source {source.name}: {paths[0]} is empty{every}; name files that hold text")
        found += full
        empty |= set(paths) - set(full)
    return list(dict.fromkeys(found)), len(empty)


def patterns(source: Source) -> list[str]:
    """The paths of a source, made absolute."""
    paths = (source.path,) if isinstance(source.path, str) else source.path
    return [p if remote(p) or stdlib.matches(p) else os.path.abspath(os.path.expanduser(p)) for p in paths]


def kind(source: Source, path: str) -> str:
    """`text`, `jsonl`, `parquet`, `arrow` or `chat`: how one file is read. Raises DataError for what is not."""
    if path.endswith(UNREAD):
        raise DataError(f"{path}: no such file is read; unpack it, or compress its files as {' or '.join(COMPRESSED)}")
    bare = re.sub(r"\.(gz|zst)$", "", path)
    by_name = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
    found = by_name.get(os.path.splitext(bare)[1], "text")
    if source.format in TURNS and found in ("parquet", "arrow"):
        raise DataError(f"source {source.name}: {path}: conversations are read from .jsonl, .jsonl.gz and .jsonl.zst")
    return found if source.format in ("auto", "dataset") else source.format


def remote(path: str) -> bool:
    """Whether a path goes through the remote file-system layer (`gs://bucket/...`)."""
    return "://" in path


def size(path: str) -> int:
    """Bytes of one file. Raises DataError where it cannot be read."""
    try:
        return epath.Path(path).stat().length if remote(path) else os.path.getsize(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _expand(pattern: str, source: Source) -> Iterator[str]:
    if stdlib.matches(pattern):
        return iter(stdlib.files(pattern))
    if remote(pattern):
        return _expand_remote(pattern)
    if os.path.isdir(pattern):
        return iter(_dataset(pattern, source))
    found = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    if not found:
        raise DataError(f"source {source.name}: no file matches {pattern}{_near(pattern)}")
    return iter(found)


def _expand_remote(pattern: str) -> Iterator[str]:
    scheme, _, rest = pattern.partition("://")
    root, _, inside = rest.partition("/")
    if "**" in pattern:
        raise DataError(f"{pattern}: ** is not supported on {scheme}://, where it could list a whole bucket; use *")
    try:
        if not glob.has_magic(inside) and epath.Path(pattern).is_dir():
            raise DataError(f"{pattern} is a folder; name its files by a glob, such as {pattern.rstrip('/')}/*.parquet")
        found = [os.fspath(path) for path in epath.Path(f"{scheme}://{root}").glob(inside)]
    except ImportError as error:
        raise DataError(f"{pattern}: reading {scheme}:// needs one more package: {error}") from None
    if not found:
        raise DataError(f"no file matches {pattern}")
    return iter(found)


def _near(pattern: str) -> str:
    """A name much like it in the deepest folder of the pattern that exists, or where to look."""
    folder, name = os.path.split(pattern)
    while not os.path.isdir(folder):
        folder, name = os.path.split(folder)
    names = os.listdir(folder)
    close = [] if glob.has_magic(name) else difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else f"; the folder {folder} is there and holds {len(names)} entries"


def _dataset(folder: str, source: Source) -> list[str]:
    """Data files of a Hugging Face dataset folder: from `save_to_disk`, or parquet and JSON lines inside."""
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        splits = sorted(e.name for e in os.scandir(folder) if e.is_dir())
        raise DataError(
            f"source {source.name}: {folder} holds the splits {', '.join(splits)}; name one of these folders"
        )
    for ends in (".arrow", ".parquet", (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json")):
        found = [path for path in glob.glob(f"{glob.escape(folder)}/**/*", recursive=True) if path.endswith(ends)]
        found = [path for path in found if os.path.basename(path) not in ("dataset_info.json", "state.json")]
        # `map` and `filter` leave cache-*.arrow files of their own beside the data.
        found = [path for path in found if not os.path.basename(path).startswith("cache-")]
        splits = sorted({m[0] for path in found if (m := re.match(SPLIT, os.path.relpath(path, folder)))})
        if len(splits) > 1:
            raise DataError(
                f"source {source.name}: {folder} mixes splits ({', '.join(s.strip('/') for s in splits)}); "
                f"choose one by a glob, such as {folder}/**/train*"
            )
        if found:
            _complete(folder, found, source)
            return found
    raise DataError(
        f"source {source.name}: no .arrow, .parquet or .jsonl file in the folder {folder}; name files by a glob"
    )


def _complete(folder: str, found: list[str], source: Source) -> None:
    """Raises DataError where files are numbered, as `train-00001-of-00004.parquet` is, and one is missing."""
    numbered = [m for path in found if (m := re.match(r"(.*-)(\d{5})(-of-(\d{5}).*)", path))]
    for before, after, count in sorted({(m[1], m[3], int(m[4])) for m in numbered}):
        for number in range(count):
            if (path := f"{before}{number:05}{after}") not in found:
                there = sum((m[1], m[3]) == (before, after) for m in numbered)
                raise DataError(
                    f"source {source.name}: {path} is missing: {folder} holds {there} of {count} files; fetch it, or "
                    "name by a glob the files to read without it"
                )


#: A split's name at the start of a path inside a dataset folder, after an optional `data/`.
SPLIT = r"(?:data/)?(train|test|valid|validation|dev)(?=[-_./])"
