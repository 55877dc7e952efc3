"""SentencePiece models: those trained here, lossless on any text, and published ones, as they define themselves."""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from sentencepiece.sentencepiece_pb2 import SentencePieceText

from jaxllm.data.chat import MARKERS
from jaxllm.data.special import TURNS, Special
from jaxllm.errors import DataError

#: Characters encoded in one call: SentencePiece slows down on long strings (10.7 MB: 2.3 s in pieces, 8 s whole).
WINDOW = 1 << 16
#: SentencePiece writes a space as U+2581, so a real U+2581 in the text is encoded by its three bytes in our own models.
BLOCK = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class SentencePiece:
    """A `.model` file with the added tokens of the files beside it.

    `own`: it was trained here. `control`: `{content: id}` of what no text becomes: control pieces, and whatever the
    files beside it call special. Other user-defined pieces are found in text as the model's author meant.
    """

    def __init__(self, model: bytes, special: Special):
        """Raises DataError for bytes that are not a model, or that do not fit the added tokens."""
        self._proto = _parse(model)
        pieces = {p.piece: i for i, p in enumerate(self._proto.pieces)}
        self.own = all(marker in pieces for marker in MARKERS)
        self.control = self._controls(special)
        self._legacy = special.legacy
        self._added = self._place(special, pieces)
        self.vocab: int = max([len(self._proto.pieces), *(i + 1 for i in self._added.values())])
        for i in self.control.values():
            if i < len(self._proto.pieces) and self._proto.pieces[i].type != UNKNOWN:
                self._proto.pieces[i].type = CONTROL
        self._sp = _processor(self._proto)
        self._inner = self._sp
        self.strips = self._proto.normalizer_spec.add_dummy_prefix
        if self.strips:
            inner = ModelProto.FromString(self._proto.SerializeToString())
            inner.normalizer_spec.add_dummy_prefix = False
            self._inner = _processor(inner)
        plain = sorted((c for c in self._added if c not in self.control), key=len, reverse=True)
        self._plain = re.compile(f"({'|'.join(map(re.escape, plain))})") if plain else None
        self._sides = {
            self.control[c]: (a.lstrip, a.rstrip) for c, a in special.added.items() if a.special and c in self.control
        }
        self.names = {
            f"{n}_token": i for n in ("pad", "unk", "bos", "eos") if (i := getattr(self._sp, f"{n}_id")()) >= 0
        }

    def _controls(self, special: Special) -> dict[str, int]:
        listed = bool(special.added)
        found = {}
        for i, piece in enumerate(self._proto.pieces):
            turn = piece.type == USER_DEFINED and not listed and TURNS.fullmatch(piece.piece)
            if piece.type == CONTROL or i in special.ends or piece.piece in special.control or turn:
                found[piece.piece] = i
        return found

    def _place(self, special: Special, pieces: dict[str, int]) -> dict[str, int]:
        """`{content: id}` of the added tokens that the model file lacks. Raises DataError for ids that cannot be."""
        placed = {}
        for content, token in special.added.items():
            i = pieces.get(content, token.id)
            if token.id is not None and i != token.id:
                raise DataError(f"tokenizer_config.json gives {content!r} the id {token.id}, tokenizer.model {i}")
            if content not in pieces and i is not None:
                if i < len(pieces):
                    raise DataError(
                        f"tokenizer_config.json gives {content!r} the id {i}, which is "
                        f"{self._proto.pieces[i].piece!r} in tokenizer.model"
                    )
                placed[content] = i
                if content in special.control:
                    self.control[content] = i
        if placed and max(placed.values()) > len(pieces) + len(placed) + (1 << 16):
            raise DataError(f"added tokens reach the id {max(placed.values()):,}; the model has {len(pieces):,} pieces")
        return placed

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of a text that stands alone."""
        return self.encode_parts([text])[0]

    def encode_parts(self, parts: Sequence[str | int], spans: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """int32 ids of text with control ids between it; with `spans`, `[ids, 2]` of characters that each id covers.

        A control id counts as one character.
        """
        ids, covers, at = [], [], 0
        for k, part in enumerate(parts):
            if isinstance(part, int):
                ids.append([part])
                covers.append([(at, at + 1)])
                at += 1
                continue
            left = k and parts[k - 1] in self._sides and self._sides[parts[k - 1]][1]
            right = k + 1 < len(parts) and parts[k + 1] in self._sides and self._sides[parts[k + 1]][0]
            body = part.lstrip() if left else part
            start, at = at + len(part) - len(body), at + len(part)
            for offset, piece in self._pieces(body.rstrip() if right else body):
                if self._plain and piece in self._added:
                    ids.append([self._added[piece]])
                    covers.append([(start + offset, start + offset + len(piece))])
                    continue
                processor = self._inner if (k or offset) and not self._legacy else self._sp
                for more, window in self._windows(piece):
                    ids.append(self._text(processor, window))
                    if spans:
                        covers.append(_spans(processor, window, start + offset + more, len(ids[-1])))
                    processor = self._inner
        flat = np.concatenate(ids, dtype=np.int32) if ids else np.zeros(0, np.int32)
        return flat, np.asarray([c for cover in covers for c in cover], int).reshape(-1, 2) if spans else None

    def _pieces(self, text: str) -> Iterable[tuple[int, str]]:
        offset = 0
        for piece in self._plain.split(text) if self._plain else [text]:
            if piece:
                yield offset, piece
            offset += len(piece)

    def _windows(self, text: str) -> Iterable[tuple[int, str]]:
        if len(text) <= WINDOW or self._proto.normalizer_spec.remove_extra_whitespaces:
            return [(0, text)]
        cut = list(windows(text, WINDOW, self._crossed, exact=not self.own))
        return zip(np.cumsum([0, *map(len, cut[:-1])]).tolist(), cut, strict=True)

    def _text(self, processor, text: str) -> np.ndarray:
        if not self.own or BLOCK not in text:
            return processor.EncodeAsNumpy(text)
        ids = [processor.EncodeAsNumpy(part) for part in text.split(BLOCK)]
        return np.concatenate([x for part in ids for x in (self._block, part)][1:], dtype=np.int32)

    @cached_property
    def _crossed(self) -> str:
        """The characters before a space inside of a piece: Gemma has `>▁</`."""
        found = (re.findall(f"([^{BLOCK}]){BLOCK}", piece.piece) for piece in self._proto.pieces)
        return "".join({character for characters in found for character in characters})

    @cached_property
    def bytes_of(self) -> tuple[bytes, ...]:
        """The UTF-8 bytes that each id stands for; none for control pieces."""
        table = [self._bytes(i, piece) for i, piece in enumerate(self._proto.pieces)]
        table += [b""] * (self.vocab - len(table))
        for content, i in self._added.items():
            table[i] = b"" if content in self.control else content.encode("utf-8")
        return tuple(table)

    def _bytes(self, i: int, piece) -> bytes:
        if piece.type == BYTE:
            return bytes([int(piece.piece[1:-1], 16)])
        if piece.type in (CONTROL, UNKNOWN):
            return b""
        return piece.piece.replace(BLOCK, " ").encode("utf-8")

    @cached_property
    def pieces(self) -> tuple[str, ...]:
        """How each token is shown to people: `▁def`, `<0x0A>`, `<bos>`."""
        table = [piece.piece for piece in self._proto.pieces]
        table += [""] * (self.vocab - len(table))
        for content, i in self._added.items():
            table[i] = content
        return tuple(table)

    @cached_property
    def _block(self) -> list[int]:
        return [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in BLOCK.encode("utf-8")]


def _parse(model: bytes) -> ModelProto:
    """Raises DataError also for damage that SentencePiece reads over, such as a piece that is not UTF-8."""
    try:
        proto = ModelProto.FromString(model)
    except DecodeError as error:
        raise DataError(f"not a SentencePiece model ({len(model):,} bytes): {error}") from None
    problem = None
    if not proto.pieces:
        problem = "it holds no pieces"
    for i, piece in enumerate(proto.pieces):
        if not isinstance(piece.piece, str) or not piece.piece or piece.score != piece.score:
            problem = f"piece {i} has no text (in UTF-8) or no score"
            break
        elif piece.type == BYTE and not re.fullmatch("<0x[0-9A-F]{2}>", piece.piece):
            problem = f"piece {i}, {piece.piece!r}, is not a byte"
    if proto.trainer_spec.model_type not in (1, 2):
        problem = f"its type {proto.trainer_spec.model_type} is neither unigram (1) nor BPE (2)"
    if problem:
        raise DataError(f"not a SentencePiece model ({len(model):,} bytes): {problem}")
    return proto


def _processor(proto: ModelProto):
    processor = sentencepiece.SentencePieceProcessor()
    model = proto.SerializeToString()
    try:
        processor.LoadFromSerializedProto(model)
    except (RuntimeError, UnicodeDecodeError) as error:
        raise DataError(f"not a SentencePiece model ({len(model):,} bytes): {error}") from None
    return processor


def _spans(processor, text: str, start: int, count: int) -> list[tuple[int, int]]:
    """The characters of each id of a text; where the text was cut at U+2581, all of it for each."""
    pieces = SentencePieceText.FromString(processor.encode(text, out_type="serialized_proto")).pieces
    if len(pieces) != count:
        return [(start, start + len(text))] * count
    at = np.repeat(np.arange(len(text)), [len(c.encode("utf-8")) for c in text]).tolist() + [len(text)]
    return [(start + at[piece.begin], start + at[piece.end]) for piece in pieces]


def windows(text: str, size: int = WINDOW, keep: str = "", exact: bool = False) -> Iterable[str]:
    """Cuts long text where no piece can span: before a space that follows something else, which is not in `keep`.

    Where there is no such place, text is cut anywhere, or with `exact` at the next one.
    """
    start = 0
    while len(text) - start > size:
        cut = text.rfind(" ", start + 1, start + size)
        while cut > start and text[cut - 1] in " " + keep:
            cut = text.rfind(" ", start + 1, cut)
        if cut <= start:
            cut = start + size
            while exact and cut >= 0 and (text[cut] != " " or text[cut - 1] in " " + keep):
                cut = text.find(" ", cut + 1)
            cut = len(text) if cut < 0 else cut
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def size(text: str) -> int:
    """UTF-8 bytes of a string. Raises DataError for half a surrogate pair, which JSON can say and UTF-8 cannot."""
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise DataError(f"character {error.start} is half a surrogate pair, which UTF-8 cannot hold") from None
