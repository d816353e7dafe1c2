"""Rows of the tables, made by hand, and figures drawn for real."""

import io
import warnings

POINT = {"num_inference_steps": 50, "guidance_scale": 7.5, "transfer_epoch": 24, "finetune_epoch": None}
TUNED = {"num_inference_steps": 12, "guidance_scale": 1.23456, "transfer_epoch": 20, "finetune_epoch": 7}


def cas_row(point, test, **changes):
    """The facts of a row of table 1, as `evaluate.cas` leaves them."""
    accuracies = {
        "test": test,
        "balanced_test": test,
        "val": test,
        "largest_class": 0.3,
        "num_test": 400,
        "num_classes": 10,
    }
    return {"point": point, **accuracies, "seconds": 12.34, "num_images": 500, "select_on": "val", **changes}


def scaling_row(test, num_images):
    """The facts of a row of table 2."""
    known = {"num_images": num_images, "num_test": 400, "num_classes": 10, "largest_class": 0.3}
    return {"test": test, "balanced_test": test, "val": test, **known}


TABLE_1 = {"after 1": cas_row(POINT, [0.5, 0.6]), "after 4": cas_row(TUNED, [0.7, 0.7])}
TABLE_2 = {
    "real": scaling_row([0.9], 1000),
    "x1": scaling_row([0.71, 0.73, 0.78], 1000),
    "x2": scaling_row([0.8, 0.8], 2000),
}


def drawn(figure):
    """Draws it for real; a warning (a glyph that no font has, a layout that does not fit) fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO())
    return figure
