"""What is known of a generated set, as sentences, tables and a page of HTML with pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from matplotlib.figure import Figure

from ..data import ImageData
from ..evaluate import quality
from ..evaluate.judged import AUGMENTATION, Judged
from ..evaluate.metrics import distance_name
from . import figures, mixing_figures, tables
from .names import printable

SHOWN = 10  # pictures in a row
MEASURES = ("precision", "recall", "density", "coverage", "authenticity")
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; font-size: .85rem; display: block; overflow-x: auto; }}
td, th {{ padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ max-width: 100%; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def sentences(found: Judged) -> list[str]:
    """What the rows say, one sentence a question; differences are paired by classifier seeds."""
    rows = found.rows

    def beside(name: str, other: str) -> str:
        mean, low, high, verdict = tables.compared(rows[name]["test"], rows[other]["test"])
        within = "" if low != low else f", 95 % interval {low:+.1f} to {high:+.1f}"
        return f"{mean:+.1f} points{within}: {verdict}"

    scores, of_real = found.assessment.scores, found.assessment.of_real
    wrong, beside_real = quality.suspects(scores, of_real), quality.suspects(of_real, of_real)
    flags = ", ".join(
        f"{name} {100 * float(rows.float().mean()):.1f} % ({100 * float(beside_real[name].float().mean()):.1f} %)"
        for name, rows in wrong.items()
    )
    return [
        f"Alone: classifiers of the generated images reach {tables.percent(rows['generated']['test'])} % on the real "
        f"test images, those of the real ones {tables.percent(rows['real']['test'])} %.",
        f"Beside real images: real + generated minus real is {beside('real + generated', 'real')}.",
        "Beside an augmentation that costs nothing: real + generated minus real, both with "
        f"{AUGMENTATION}, is {beside(f'real + generated, {AUGMENTATION}', f'real, {AUGMENTATION}')}.",
        f"Suspect images, and in brackets how many of the real validation images are suspect in the same way: {flags}.",
        f"{len(rows['real']['test'])} classifiers a row. The intervals cover their random starts alone: not another "
        "choice of the images, real or generated.",
        *leaked("generated", found.leaks),
        *leaked("real training", found.real_leaks),
        *tables.taught_too_little(rows),
    ]


def leaked(kind: str, leaks: Mapping[str, torch.Tensor]) -> list[str]:
    """A sentence for each set of held images that images of this ``kind`` show, which classifiers then learn from."""
    return [
        f"LEAK: {int(rows.sum())} of the {len(rows)} {kind} images are one of the real {name} images, or nearly: "
        "accuracies with them may be too high. Leave them out."
        for name, rows in leaks.items()
        if rows.any()
    ] or [f"None of the {kind} images is one of the real validation or test images, nor nearly one."]


def images_table(found: Judged, files: Sequence[str] = ()) -> pd.DataFrame:
    """A row for each generated image, in their order: its class's number, its number in that class (from 1; in a folder
    the files' order by name), its scores, whether it is suspect and how, the nearest real training image, from 0, and
    whether it is a twin of a validation or test image.

    ``files``: the path of each, if they have one, with "/"; in the table it begins with "./", which no program takes
    for a formula.
    """
    labels, scores = found.generated.labels, found.assessment.scores
    flags = quality.suspects(scores, found.assessment.of_real)
    table = pd.DataFrame({"class": labels.tolist()})
    table["number_in_class"] = table.groupby("class").cumcount() + 1
    if files:
        table.insert(0, "file", [f"./{printable(file)}" for file in files])
    numbers = {name: values.tolist() for name, values in scores.items()}
    return table.assign(**numbers, **{name.replace(" ", "_"): rows.tolist() for name, rows in flags.items()}).assign(
        nearest_real_image=found.assessment.nearest.tolist(),
        **{f"twin_of_{name}": rows.tolist() for name, rows in found.leaks.items()},
    )


def measures(found: Judged) -> pd.DataFrame:
    """The set and real validation images beside the real training images, in the judge's features."""
    name = distance_name(found.whole["features"])
    columns = {"generated": found.whole, "real validation images": found.held_out}
    return pd.DataFrame(
        {
            column: {
                "images": row["num_generated"],
                name: round(row["fd"], 2),
                **{measure: round(row[measure], 3) for measure in MEASURES},
                "": row["note"],
            }
            for column, row in columns.items()
        }
    ).T


def nearest_figure(found: Judged, data: ImageData) -> Figure:
    """The generated images that lie nearest to a real one for that one's surroundings, below the real one."""
    ratio = found.assessment.scores["authenticity"]
    rows = ratio.argsort(stable=True)[:SHOWN]
    real = data.train.images[found.assessment.nearest[rows]]
    return figures.image_grid(
        [real, found.generated.images[rows]], ["real", "generated"], [f"{v:.2f}" for v in ratio[rows].tolist()], 0.9
    )


def suspects_figure(found: Judged, data: ImageData) -> Figure | None:
    """The images that look most like another class, and those most unlike any; None where there is none."""
    scores = found.assessment.scores
    wrong = quality.suspects(scores, found.assessment.of_real)
    chosen = {}
    for name, score in (("another class", "confidence"), ("unlike any", "nearness")):
        rows = (wrong[name] & ~wrong["blank"]).nonzero()[:, 0]  # one grey square looks like the next
        chosen[name] = rows[scores[score][rows].argsort(stable=True)[:SHOWN]]
    chosen = {name: rows for name, rows in chosen.items() if len(rows)}
    if not chosen:
        return None
    return figures.image_grid([found.generated.images[rows] for rows in chosen.values()], list(chosen), scale=0.9)


def page(found: Judged, data: ImageData, real_name: str, generated_name: str) -> str:
    """The whole report as HTML without a script; names are escaped, pictures are in it."""
    title = f"{printable(generated_name)} beside {printable(real_name)}"
    parts = [
        _paragraphs(sentences(found)),
        _table(tables.worth_table(found.rows)),
        "<h2>Other test sets</h2>",
        _table(tables.elsewhere_table(found.rows).T),
        "<h2>Class by class</h2>",
        _paragraphs([f"{name}: {said}." for name, said in quality.SCORES.items()]),
        _table(found.assessment.classes.round(1)),
        _picture(
            mixing_figures.extremes(
                found.generated, found.assessment.scores["confidence"], data.class_names, "confidence"
            ),
            "For each class the images of the lowest and of the highest confidence",
        ),
        "<h2>The whole set</h2>",
        _table(measures(found)),
        _paragraphs(["As many generated images as there are real validation images: the measures depend on that."]),
    ]
    if suspicious := suspects_figure(found, data):
        parts += ["<h2>Suspect images</h2>", _picture(suspicious, "Images that look wrong")]
    parts += [
        "<h2>Copies?</h2>",
        _paragraphs(
            [
                "Above each generated image its nearest real training image. The number is their distance over the "
                "real image's distance to its own nearest: 1 or less is nearer than real images lie to each other."
            ]
        ),
        _picture(nearest_figure(found, data), "Generated images and their nearest real ones"),
    ]
    return PAGE.format(title=html.escape(title), body="\n".join(parts))


def _paragraphs(texts: list[str]) -> str:
    return "\n".join(f"<p>{html.escape(text)}</p>" for text in texts)


def _table(table: pd.DataFrame) -> str:
    table = table.rename(index=lambda name: printable(str(name)))
    return table.to_html(escape=True, border=0, na_rep="")


def _picture(figure: Figure, words: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(words)}" src="data:image/png;base64,{data}">'
