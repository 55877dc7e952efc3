"""Memory that a run with many saves would lose: what tensorstore never frees, and orbax asks it for at every save.

tensorstore 0.1.86 leaks what it answers as JSON. The names are orbax's own (0.12), and may go: then nothing is changed.
"""

import copy
import ctypes
import functools

from orbax.checkpoint._src.serialization import tensorstore_utils


def stop() -> None:
    """Orbax asks once a folder what it asked once an array, and never for counters. Once for the process."""
    # For a line of a log that nobody has turned on: 30 to 80 KB a save.
    if hasattr(tensorstore_utils, "get_tensorstore_raw_bytes"):
        tensorstore_utils.get_tensorstore_raw_bytes = lambda *_, **__: 0
    # Where a folder is, in full: 275 bytes an array and save, which is the same for all arrays of a folder.
    build = getattr(tensorstore_utils, "_build_ocdbt_kvstore_tspec", None)
    if build is not None and not hasattr(build, "__wrapped__"):
        tensorstore_utils._build_ocdbt_kvstore_tspec = once_a_folder(build)


def once_a_folder(build):
    """`build(directory, name, **options)` called once for each folder and options; the name is put in."""
    of_folder = functools.lru_cache(maxsize=8)(lambda directory, options: build(directory, None, **dict(options)))

    @functools.wraps(build)
    def spec(directory, name=None, **options):
        found = copy.deepcopy(of_folder(directory, tuple(sorted(options.items()))))
        return found if name is None else found | {"path": name}

    return spec


def give_back() -> None:
    """What a save held, and what was compiled before it, goes back to the system: a third of a small run's memory.

    The threads of a save take from arenas of their own, which glibc keeps: 5 % more after 8,000 steps with 400 saves.
    """
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
