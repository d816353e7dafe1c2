"""Small pictures and folders of them, for the tests of this room."""

import io
from pathlib import Path

from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def shade(value: int) -> bytes:
    """A grey PNG of 9 pixels."""
    return encoded(Image.new("RGB", (9, 9), (value,) * 3))


def write(root: Path, *names: str, content: bytes | None = None) -> Path:
    """Files under `root`; each is a picture of its own shade of grey, or has the `content`."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(shade(10 * i % 256) if content is None else content)
    return root


def pictures_of(root: Path, *folders: str, count: int = 4) -> Path:
    """`count` pictures in each of the folders."""
    return write(root, *(f"{folder}/{i}.png" for folder in folders for i in range(count)))
