"""Images in a question, as llama-server takes them: a data URL (it fetches nothing and opens no file itself).

Takes a path, gives a part of a message. What formats there are is stb_image's affair (tools/mtmd of llama.cpp).
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from dynrun.errors import NotFoundError, UsageError

_MOST_BYTES = 64 << 20
# The beginnings of the formats that stb_image reads and that are of use.
_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
}


def image_part(path: Path) -> dict[str, Any]:
    """Raises NotFoundError for no such file, UsageError for one that is no image or is too large."""
    try:
        size, data = path.stat().st_size, b""
        if size <= _MOST_BYTES:
            data = path.read_bytes()
    except OSError as error:
        raise NotFoundError(f"the image {path} cannot be read: {error.strerror}", fix="check the path") from error
    if size > _MOST_BYTES:
        raise UsageError(f"the image {path} has {size:,} bytes", fix="make it smaller: a model sees few of its pixels")
    kind = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)
    if kind is None:
        raise UsageError(f"{path} is no image that llama.cpp reads", fix="convert it to PNG or JPEG")
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


def find_mmproj(model: Path) -> Path | None:
    """The image encoder that lies beside a model: a GGUF whose name begins with or holds ``mmproj``."""
    names = sorted(path for path in model.parent.glob("*.gguf") if "mmproj" in path.name.lower())
    # Of several precisions F16, which every backend runs.
    return next((path for path in names if "f16" in path.stem.lower().split("-")), names[0] if names else None)
