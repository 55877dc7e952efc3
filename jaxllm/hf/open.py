"""Published models by path: a Hugging Face folder or a .gguf file."""

from pathlib import Path

from jaxllm.hf.folder import Folder, is_folder, open_folder


def open_published(path: str | Path, *, ignore_keys: tuple[str, ...] = ()) -> Folder | None:
    """What `path` holds, or None where it is neither a model folder nor a GGUF file."""
    if str(path).endswith(".gguf"):
        from jaxllm.hf.gguf import open_gguf

        return open_gguf(path, ignore_keys=ignore_keys)
    return open_folder(path, ignore_keys=ignore_keys) if is_folder(path) else None
