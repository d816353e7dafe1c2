"""The README's pictures are outputs that the notebooks store: ``python -m tests.pictures`` copies them out again.

A cell tagged ``picture:name`` goes to ``notebooks/pictures/name.png``.
"""

import base64
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def stored() -> dict[str, bytes]:
    """The PNG file of each tagged cell, by its name."""
    found = {}
    for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            for tag in cell.metadata.get("tags", []):
                if tag.startswith("picture:"):
                    (picture,) = (o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {}))
                    found[tag.partition(":")[2]] = base64.b64decode(picture)
    return found


if __name__ == "__main__":
    for name, picture in stored().items():
        (NOTEBOOKS / "pictures" / f"{name}.png").write_bytes(picture)
