"""Row 13: published files with damage in them: an error of ours or a model, in little time and memory."""

import contextlib
import json
import signal
import threading
import time
import tracemalloc
from random import Random
from typing import Any

from jaxllm.errors import UserError
from jaxllm.verify.lab import Found, Lab, said

SECONDS = 2.0
#: Bytes that Python may hold beside twice the file: what it makes of any file, however small.
FLOOR = 8 << 20
MODEL = {
    "embed": 32,
    "layers": 1,
    "context": 64,
    "pattern": [{"attn": {"heads": 4, "kv_heads": 2}, "mlp": {"ffw": 48}}],
}


def mutated(lab: Lab) -> Found:
    """Files of each kind with random damage: no crash, no hang, no large allocation."""
    folder, readers = seeds(lab)
    cases, failures, refused = lab.count(100, 10_000), [], 0
    for number in range(cases):
        name, read = lab.random.choice(list(readers.items()))
        path = folder / name
        whole = path.read_bytes()
        path.write_bytes(mutate(whole, lab.random, path.suffix == ".json"))
        problem, was_refused = attempt(read, path.stat().st_size)
        refused += was_refused
        if problem:
            failures.append(f"{name}, case {number}: {problem}")
        path.write_bytes(whole)
    figure = f"{cases} damaged files of {len(readers)} kinds: {refused} refused, {cases - refused} read, none crashed"
    return Found(cases, tuple(failures), figure if not failures else f"{len(failures)} of {cases} files went wrong")


def attempt(read, size: int) -> tuple[str | None, bool]:
    """`(what went wrong, whether the file was refused)`."""
    tracemalloc.start()
    started, refused, problem = time.monotonic(), False, None
    try:
        with said(), _alarm(10 * SECONDS):
            read()
    except UserError:
        refused = True
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"[:200]
    took, (_, peak) = time.monotonic() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if not problem and took > SECONDS:
        problem = f"took {took:.1f} s"
    if not problem and peak > 2 * size + FLOOR:
        problem = f"held {peak:,} bytes for a file of {size:,}"
    return problem, refused


@contextlib.contextmanager
def _alarm(seconds: float):
    """Raises TimeoutError within the block once it has taken so long, where signals can: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_):
        raise TimeoutError(f"it hangs: still there after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def mutate(data: bytes, random: Random, is_json: bool) -> bytes:
    """One kind of damage: bits, a cut, something put in, left out or said twice; of JSON also another value."""
    out, at = bytearray(data), random.randrange(len(data))
    length = min(random.choice((1, 8, 200)), len(data) - at)
    kind = random.randrange(7 if is_json else 5)
    if kind == 0:
        for _ in range(random.choice((1, 1, 8))):
            # Most of what can go wrong stands at the beginning.
            out[random.randrange(random.choice((min(400, len(out)), len(out))))] ^= 1 << random.randrange(8)
    elif kind == 1:
        del out[at:]
    elif kind == 2:
        out[at:at] = random.randbytes(length)
    elif kind == 3:
        del out[at : at + length]
    elif kind == 4:
        out[at:at] = out[at : at + length]
    else:
        out = bytearray(json.dumps(_another(json.loads(data), random)).encode())
    return bytes(out)


VALUES = (None, True, -1, 0, 2**40, 1e300, "", "x" * 1000, [], {}, [[[]]], {"a": {"b": []}}, "\ud800")


def _another(value: Any, random: Random) -> Any:
    """The value with a part of it replaced, taken out, or put under another name."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        out = dict(value)
        if random.random() < 0.15:
            del out[key]
        elif random.random() < 0.15:
            out[key + "x"] = out.pop(key)
        else:
            out[key] = _another(value[key], random)
        return out
    if isinstance(value, list) and value and random.random() < 0.9:
        at = random.randrange(len(value))
        return [*value[:at], _another(value[at], random), *value[at + 1 :]]
    return random.choice(VALUES)


def seeds(lab: Lab):
    """A folder with a small model in each published form, and what reads each of its files."""
    import jax

    from jaxllm.adapt.lora import LoraConfig, lora_plan
    from jaxllm.config import parse
    from jaxllm.data.tokenizer import Tokenizer
    from jaxllm.hf.export import export_hf
    from jaxllm.hf.folder import open_folder
    from jaxllm.hf.peft import load_peft
    from jaxllm.hf.peft_export import export_peft
    from jaxllm.model.build import build
    from jaxllm.model.change import change, changed
    from jaxllm.model.spec import ModelConfig
    from jaxllm.sharding import make_sharding

    tokenizer = Tokenizer.load(lab.corpus() / "tokenizer")
    sharding = make_sharding(devices=jax.devices()[:1])
    model = build(parse(ModelConfig, MODEL | {"vocab": tokenizer.vocab}), sharding)
    params, folder = model.init(jax.random.key(0)), lab.folder / "files"
    folder.mkdir()
    family = export_hf(model.config, params, tokenizer, folder / "hf")
    plan = lora_plan(model, LoraConfig(rank=2))
    adapted, weights = changed(model, plan), change(model, plan, params, jax.random.key(1))
    export_peft(adapted, weights, folder / "peft", family=family, rslora=False, dropout=0.0)

    def whole():
        opened = open_folder(folder / "hf")
        opened.tokenizer()
        opened.load(sharding)

    def adapter():
        load_peft(model, params, folder / "peft", family=family)

    def pieces():
        Tokenizer.load(folder / "pieces")

    (folder / "pieces").mkdir()
    (folder / "pieces/tokenizer.model").write_bytes((folder / "hf/tokenizer.model").read_bytes())
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors")
    readers = {f"hf/{name}": whole for name in names}
    readers |= {f"peft/{path.name}": adapter for path in (folder / "peft").iterdir() if path.suffix != ".md"}
    readers |= {"pieces/tokenizer.model": pieces}
    try:
        import gguf  # noqa: F401
    except ImportError:  # without the extra
        return folder, readers
    from jaxllm.hf.gguf import open_gguf
    from jaxllm.hf.gguf_export import export_gguf

    export_gguf(model.config, params, tokenizer, folder / "model.gguf")

    def single():
        opened = open_gguf(folder / "model.gguf")
        opened.tokenizer()
        opened.load(sharding)

    return folder, readers | {"model.gguf": single}
