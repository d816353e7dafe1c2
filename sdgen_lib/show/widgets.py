"""What the explorers are made of: a live widget and a still picture in one output, and pictures that can be clicked."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .names import printable

CELL = 4  # pixels: clickable spots lie on a grid of this width


def png(figure: Figure, scale: float = 1.0) -> bytes:
    """A figure as a PNG file, ``scale`` pixels for each of its own."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=figure.dpi * scale)
    return file.getvalue()


def picture(figure: Figure | None = None) -> ipywidgets.Image:
    """An image widget; `show` puts a figure into it."""
    image = ipywidgets.Image(format="png")
    if figure is not None:
        show(image, figure)
    return image


def show(image: ipywidgets.Image, figure: Figure) -> None:
    """Draws ``figure`` into an image widget, sharp on screens of double density too."""
    image.layout.width = f"{figure.get_figwidth() * figure.dpi:.0f}px"
    image.layout.max_width = "100%"
    image.value = png(figure, scale=2)


class Words(ipywidgets.HTML):
    """Lines of plain text. A class name comes with the data, from anyone: it is shown, and never run as HTML."""

    def say(self, *lines: str) -> None:
        self.value = "<br>".join(html.escape(printable(line)) for line in lines)


def picker(class_names: Sequence[str], *first: tuple[str, Any]) -> ipywidgets.Dropdown:
    """A list to pick a class from, by its number; ``first``: (text, value) of what stands above the classes.

    ipywidgets writes its options as text; two that look alike get their numbers.
    """
    names = [printable(name) for name in class_names]
    names = [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]
    return ipywidgets.Dropdown(options=[*first, *((name, i) for i, name in enumerate(names))], description="class")


class Explorer:
    """A widget to move things with, and the same as a still picture.

    Both are in one output: JupyterLab, Notebook 7 and Colab show the widget; where nothing can be moved (GitHub,
    nbconvert, a notebook run by papermill) the picture stands there instead.
    """

    def __init__(self, widget: ipywidgets.Widget, still: Callable[[], Figure], alt: str):
        self.widget, self.still, self.alt = widget, still, alt

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        return {
            "application/vnd.jupyter.widget-view+json": view,
            "image/png": base64.b64encode(png(self.still())).decode(),
            "text/plain": self.alt,
        }


class Clickable(ipywidgets.GridBox):
    """A figure with invisible buttons over some of its points: `draw` it, as often as it changes."""

    def __init__(self):
        self._image, self._on_click = picture(), None
        self._buttons: list[ipywidgets.Button] = []  # made once, then moved
        self._image.layout.grid_area = "1 / 1 / -1 / -1"
        self._image.layout.margin = "0"
        super().__init__([self._image])

    def draw(
        self,
        figure: Figure,
        spots: Sequence[tuple[Any, float, float, str]],
        on_click: Callable[[int], None],
        size: int = 16,
    ) -> None:
        """``spots``: (axes, x, y, tooltip) in data coordinates; ``on_click(i)`` gets the number of the spot."""
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # settled now: drawn once more, square axes would move from under the buttons
        width, height = (round(side * figure.dpi / CELL) for side in figure.get_size_inches())
        span, self._on_click = max(1, size // CELL), on_click
        self._buttons += [self._button(i) for i in range(len(self._buttons), len(spots))]
        for button, (ax, x, y, tooltip) in zip(self._buttons, spots):
            across, up = ax.transData.transform((x, y)) / CELL
            row, column = (round(middle - span / 2) + 1 for middle in (height - up, across))
            button.tooltip = printable(tooltip)
            button.layout.grid_area = f"{max(row, 1)} / {max(column, 1)} / span {span} / span {span}"
            button.layout.width = button.layout.height = f"{span * CELL}px"
        show(self._image, figure)
        self._image.layout.max_width = None  # a picture that shrank with the page would leave the buttons behind
        self._image.layout.height = f"{height * CELL}px"
        self.layout.grid_template_columns = f"repeat({width}, {CELL}px)"
        self.layout.grid_template_rows = f"repeat({height}, {CELL}px)"
        self.children = [self._image, *self._buttons[: len(spots)]]

    def _button(self, i: int) -> ipywidgets.Button:
        button = ipywidgets.Button(layout=ipywidgets.Layout(margin="0", padding="0", border="none"))
        button.style.button_color = "transparent"
        button.on_click(lambda _: self._on_click(i))
        return button
