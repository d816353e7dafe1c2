"""Images with class labels: named datasets, ``.npz`` files and folders, in three splits."""

from .images import ImageData, Split, resize
from .sources import load

__all__ = ["ImageData", "Split", "load", "resize"]
