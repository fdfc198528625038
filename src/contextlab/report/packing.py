"""Text packed into a page: compressed, then written in 85 characters that HTML leaves alone; the browser unpacks it.

By LZMA Plotly's script of 4.8 MB takes 1.59 MB so written (deflated 1.84), and what a page's figures hold a tenth of
their JSON. Browsers know no LZMA, so the page has its decoder (`templates/unpack.js`), as its author's specification
of LZMA has it (Igor Pavlov, LZMA SDK, lzma-specification.txt). A Python that was built without LZMA deflates.
"""

from __future__ import annotations

import base64
import re
import zlib
from functools import lru_cache
from typing import Any, NamedTuple

from plotly.offline import get_plotlyjs

try:
    import lzma
except ImportError:  # this Python was built without it
    lzma = None  # type: ignore[assignment]

_SAFE = (b"<", b",")
"""RFC 1924's characters have <, which could begin a tag or a comment, and no comma."""
PIECE = re.compile(
    r'<script type="text/plain" id="(\w+)" data-form="(\w+)" data-packed="(\d+)" data-bytes="(\d+)">([^<]*)<'
)
DICTIONARY = 8 << 20
"""Bytes back to which LZMA finds what came before: all of Plotly's."""
LONG = 2 << 20
"""Bytes of a text that takes seconds to be packed as tightly as can be."""


class Packed(NamedTuple):
    """A packed text, in characters.

    form: "lzma" or "deflate". packed: bytes that the characters stand for, less what fills the last of them.
    bytes: of the text in UTF-8.
    """

    form: str
    packed: int
    bytes: int
    text: str


def pack(text: str) -> Packed:
    """Pack a text."""
    plain = text.encode()
    if lzma is None:
        form, packed = "deflate", zlib.compress(plain, 9)
    else:
        form, packed = "lzma", lzma.compress(plain, lzma.FORMAT_RAW, filters=_filters(len(plain)))
    padded = packed + b"\0" * (-len(packed) % 4)
    return Packed(form, len(packed), len(plain), base64.b85encode(padded).replace(*_SAFE).decode())


def unpack(packed: Packed) -> str:
    """The text that `pack` was given."""
    found = base64.b85decode(packed.text.encode().replace(*_SAFE[::-1]))[: packed.packed]
    if packed.form == "deflate":
        return zlib.decompress(found).decode()
    return lzma.decompress(found, lzma.FORMAT_RAW, filters=_filters()).decode()


def unpacked(page: str) -> dict[str, str]:
    """The texts that are packed into a page, by the id of their element."""
    return {
        name: unpack(Packed(form, int(packed), int(size), text))
        for name, form, packed, size, text in PIECE.findall(page)
    }


@lru_cache(maxsize=1)
def packed_plotly() -> Packed:
    """Plotly's script, packed once a process: it takes 0.6 s."""
    return pack(get_plotlyjs())


def _filters(size: int = 0) -> list[dict[str, Any]]:
    """Without a header: the decoder in the page knows these places of a literal's context, and reads no others.

    size: bytes of a text that is packed. A long one is packed in a third of the time, into 10% more bytes.
    """
    how: dict[str, Any] = {"preset": 6}
    if size > LONG:
        how = {"mode": lzma.MODE_FAST, "mf": lzma.MF_HC4, "nice_len": 64, "depth": 8}
    return [{"id": lzma.FILTER_LZMA1, "dict_size": DICTIONARY, "lc": 4, "lp": 0, "pb": 0, **how}]
