"""Pages of images and confusion matrices: what stands where."""

import io
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import strange_names
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from sdgen_lib.data import Split
from sdgen_lib.show import figures, names
from sdgen_lib.show.names import printable

from .made import drawn


def split(classes, per_class):
    labels = torch.arange(classes).repeat(per_class)
    images = (labels.view(-1, 1, 1, 1) * 20).expand(-1, 3, 8, 8).to(torch.uint8)
    return Split(images, labels)


@pytest.mark.parametrize("classes", [2, 10, 12])
def test_pages_of_images(classes):
    names, part = [f"class {c}" for c in range(classes)], split(classes, 5)
    figure = drawn(figures.by_class(part.images, part.labels, names, per_class=4, title="a title"))
    rows = min(classes, 10)
    assert len(figure.axes) == 4 * rows
    for c in range(rows):
        axes = figure.axes[4 * c : 4 * c + 4]
        assert axes[0].get_ylabel() == names[c]
        assert all((ax.images[0].get_array() == 20 * c).all() for ax in axes)
    both = drawn(figures.real_beside_synthetic(part, split(classes, 3), names, per_class=6))
    assert len(both.axes) == rows * (6 + 1 + 3)
    assert (both.axes[5].images[0].get_array() == 255).all()  # class 0 has five real images; then comes the gap


def test_one_row_and_one_picture():
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    assert len(drawn(figures.image_grid([images], ["noise"], ["a", "b", "c"])).axes) == 3
    assert len(drawn(figures.image_grid([images[:1]], ["noise"])).axes) == 1


def test_confusions():
    matrix = np.array([[3, 1], [0, 2]])
    (ax,) = drawn(figures.confusions({"a title": matrix}, ["cat", "dog"])).axes
    found = {text.get_position(): text.get_text() for text in ax.texts}
    assert found == {(0, 0): "3", (1, 0): "1", (1, 1): "2"}  # (predicted, true); no 0 is written
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.75, 0.25], [0, 1]])
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("a title", "predicted class", "true class")


# --- names as they come ---


@pytest.fixture
def untold(monkeypatch):
    """As in a process that has not drawn yet."""
    monkeypatch.setattr(figures.CourseFigure, "told", False)


def texts_of(figure):
    return {text.get_text() for text in figure.findobj(Text)}


@pytest.mark.parametrize("name", [*strange_names.ALL, "$5 to $10", r"$\frac$", "a_b^{c}", 200 * "x"])
def test_a_name_is_drawn_as_it_is(name):
    """matplotlib reads what stands between two dollars as TeX, and stops at what is none."""
    part, names = split(2, 1), [name, "other"]
    shown = "\n".join(map(printable, name.split("\n")))
    grid = drawn(figures.image_grid([part.images, part.images], names, names, title=name))
    assert grid.axes[0].get_title() == grid.axes[0].get_ylabel() == shown and grid.get_suptitle() == name
    assert shown in texts_of(drawn(figures.by_class(part.images, part.labels, names, title=name)))
    assert shown in texts_of(drawn(figures.real_beside_synthetic(part, part, names)))
    matrix = drawn(figures.confusions({name: np.eye(2, dtype=int)}, names))
    assert matrix.axes[0].get_title() == name


def test_what_a_notebook_draws_itself_is_no_formula_either():
    """Titles, legends, ticks and texts that are made after the axes, and without `new_axes`."""
    for figure, ax in (plt.subplots(), figures.new_axes(size=(3, 3))):
        ax.plot([1, 2], label="$x^$")
        ax.legend(title="$x^$")
        ax.set(title="$x^$", xlabel="$x^$")
        ax.set_xticks([0, 1], ["$x^$", r"$\frac$"])
        ax.text(0, 1, "$x^$")
        ax.annotate("$x^$", (0, 1))
        figure.suptitle("$x^$")
        figure.supxlabel("$x^$")
        drawn(figure)
        plt.close(figure)


def test_a_style_that_was_reset_changes_nothing():
    with plt.rc_context():
        plt.rcdefaults()
        figure, ax = figures.new_axes(size=(2, 2))
        ax.legend([ax.scatter(0, 0)], ["$x^$"])
        drawn(figure)


def test_letters_that_no_font_has_are_told_of_once(untold, capsys):
    odd = "\U00012000 \U00013000"  # cuneiform and hieroglyphs
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for name in (odd, "other " + odd):
        drawn(figures.image_grid([images], [name]))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("No font here has ") and "\U00012000 \U00013000: boxes" in line and "fonts-noto-cjk" in line


def test_other_warnings_are_passed_on(untold):
    figure, ax = figures.new_axes(size=(2, 2))

    class Warns(Text):
        def draw(self, renderer):
            warnings.warn("something else", RuntimeWarning, stacklevel=1)

    ax.add_artist(Warns(0, 0, "x"))
    with pytest.warns(RuntimeWarning, match="something else"):
        figure.savefig(io.BytesIO())


def test_an_installed_font_stands_in(untold, tmp_path, capsys, monkeypatch):
    """A font with one letter, a black square, under the name of one that has many; before, there is a box."""
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    monkeypatch.setitem(plt.rcParams, "font.family", ["sans-serif"])
    builder, pen = FontBuilder(1000, isTTF=True), TTGlyphPen(None)
    for move, point in (("moveTo", (0, 0)), ("lineTo", (0, 900)), ("lineTo", (900, 900)), ("lineTo", (900, 0))):
        getattr(pen, move)(point)
    pen.closePath()
    square = pen.glyph()
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("\ue777"): "cat"})
    builder.setupGlyf({".notdef": square, "cat": square})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": names.FONTS[0], "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900, usWinAscent=900, usWinDescent=100)
    builder.setupPost()
    builder.save(tmp_path / "font.ttf")

    def ink():
        figure, ax = figures.new_axes(size=(2, 2))
        ax.axis("off")
        ax.text(0.1, 0.1, "\ue777", fontsize=60)
        FigureCanvasAgg(figure).draw()
        return (np.asarray(figure.canvas.buffer_rgba())[..., :3].mean(-1) < 64).sum()

    before = ink()
    font_manager.fontManager.addfont(tmp_path / "font.ttf")
    assert "No font here has U+E777" in capsys.readouterr().out
    side = 0.9 * 60 * 90 / 72  # pixels
    assert ink() == pytest.approx(side**2, rel=0.1) and before < 0.5 * side**2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("here", [0, 1])
def test_a_class_without_an_image_on_one_side(here):
    part = split(2, 3)
    one = part.take([i for i in range(len(part)) if part.labels[i] == 0])
    pair = [part, one] if here else [one, part]
    drawn(figures.real_beside_synthetic(*pair, ["a", "b"]))
