"""Text packed into a page: deflated, then written in 85 characters that HTML leaves alone; the browser unpacks it.

Plotly's script is 4.8 MB; so packed it takes 1.84 MB (base64 would take 1.96), and what a page's figures hold a tenth
of their JSON.
"""

from __future__ import annotations

import base64
import re
import zlib
from functools import lru_cache

from plotly.offline import get_plotlyjs

_SAFE = (b"<", b",")
"""RFC 1924's characters have <, which could begin a tag or a comment, and no comma."""
PIECE = re.compile(r'<script type="text/plain" id="(\w+)" data-bytes="(\d+)">([^<]*)</script>')


def pack(text: str) -> tuple[str, int]:
    """The packed text, and how many bytes it has once it is read from its characters."""
    packed = zlib.compress(text.encode(), 9)
    padded = packed + b"\0" * (-len(packed) % 4)
    return base64.b85encode(padded).replace(*_SAFE).decode(), len(packed)


def unpack(packed: str, size: int) -> str:
    """The text that `pack` was given."""
    return zlib.decompress(base64.b85decode(packed.encode().replace(*_SAFE[::-1]))[:size]).decode()


def unpacked(page: str) -> dict[str, str]:
    """The texts that are packed into a page, by the id of their element."""
    return {name: unpack(text, int(size)) for name, size, text in PIECE.findall(page)}


@lru_cache(maxsize=1)
def packed_plotly() -> tuple[str, int]:
    """Plotly's script, packed once a process: it takes 0.3 s."""
    return pack(get_plotlyjs())
