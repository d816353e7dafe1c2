"""The command ``python -m sdgen_lib judge REAL GENERATED``: is a set of generated images worth it, whoever made it?"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..config.messages import printable
from ..config.settings import resolve
from ..course import Course
from ..data.sources import checkout, load_generated
from ..evaluate.elsewhere import shifted_set, shifted_tests
from ..evaluate.judged import judged
from ..show import judged_report, tables
from ..store import files

SEVERITY = 3  # of the corruptions that the classifiers are tried on


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables and writes the page; what cannot be judged ends with one line."""
    args = _parser().parse_args(argv)
    try:
        _judge(args)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error


def _judge(args: argparse.Namespace) -> None:
    out = Path(args.out).expanduser().absolute()
    for path in (out, _images_path(out)):
        if path.is_dir() or (path.exists() and not args.overwrite):
            or_else = "" if path.is_dir() else ", or --overwrite"
            raise FileExistsError(f"{printable(path)} is there: give another --out{or_else}.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {printable(out)} cannot be written there ({error.strerror}): give another.") from error
    settings = resolve(
        recipe="demo",
        backbone="tiny",
        dataset=args.real,
        seed=args.seed,
        runs_dir=args.runs_dir,
        classifier_seeds=args.classifiers,
    )
    course = Course(settings)
    ws, data = course.workspace, course.data
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = load_generated(args.generated, data, checkout())
        shifted = {printable(name): shifted_set(ws, name) for name in args.test}
    for warning in said:
        print(warning.message, file=sys.stderr)
    generated = loaded.images
    tests = shifted_tests(ws, shifted, severities=(SEVERITY,))
    print(
        f"{len(data.train)} real training images and {len(generated)} generated ones of {data.num_classes} classes, "
        f"{data.image_size}x{data.image_size} pixels; {len(data.val)} real validation and {len(data.test)} test images"
    )
    found = judged(ws, generated, tests)
    print()
    for title, table in {
        "Classifiers": tables.worth_table(found.rows),
        "The same classifiers elsewhere": tables.elsewhere_table(found.rows).T,
        "Class by class, the one most often taken for another first": found.assessment.classes.round(1),
        "The whole set": judged_report.measures(found),
    }.items():
        print(f"{title}:\n{table.to_string(na_rep='-')}", end="\n\n")
    print("\n".join(judged_report.sentences(found)))
    page = judged_report.page(found, data, args.real, args.generated)
    with files.whole_file(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    scored = _images_path(out)
    with files.whole_file(scored) as temporary:
        judged_report.images_table(found, loaded.files).to_csv(temporary, index=False)
    print(f"\nWith pictures: {printable(out)}\nEach generated image: {printable(scored)}")


def _images_path(out: Path) -> Path:
    """Where the table of the generated images goes, beside the page."""
    return out.with_name(f"{out.stem}_images.csv")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sdgen_lib judge",
        description="Classifiers of real, generated and both, with equal steps; how good each class is; copies; other "
        "test sets. Prints tables; writes a page with pictures, and beside it a .csv with the scores of each generated "
        "image. Finished classifiers are kept, and found again by the same command.",
    )
    parser.add_argument("real", metavar="REAL", help="real images: a dataset's name, an .npz file or a folder")
    parser.add_argument(
        "generated",
        metavar="GENERATED",
        help="generated images of the same classes: an .npz file or a folder; its training images, or all of a folder "
        "without splits",
    )
    parser.add_argument(
        "--test",
        metavar="SHIFTED",
        action="append",
        default=[],
        help="a dataset of the same classes, whose test images are tried, too; may be given several times",
    )
    parser.add_argument("--out", default="judged.html", help="the page (judged.html)")
    parser.add_argument("--overwrite", action="store_true", help="write the page over one that is there")
    parser.add_argument("--classifiers", type=int, default=3, help="classifiers of each row (3)")
    parser.add_argument("--seed", type=int, default=0, help="of the run: validation images and classifiers (0)")
    parser.add_argument("--runs-dir", help="where the results are kept (runs/)")
    return parser
