"""What a CAS is measured with, before anything is drawn."""

import pytest

from sdgen_lib.diffusion.generate import balanced_labels
from sdgen_lib.evaluate.cas import check_every_class_is_drawn


@pytest.mark.parametrize(("num_images", "num_classes"), [(400, 1000), (500, 525), (1, 2), (9, 10)])
def test_too_few_images_for_the_classes_are_refused(num_images, num_classes):
    line = f"^num_images is {num_images} and the data has {num_classes} classes: give {num_classes} or more\\.$"
    with pytest.raises(ValueError, match=line):
        check_every_class_is_drawn(num_images, num_classes)
    assert len(balanced_labels(num_images, num_classes).unique()) < num_classes


@pytest.mark.parametrize(("num_images", "num_classes"), [(10, 10), (11, 10), (4000, 1000)])
def test_enough_images_draw_every_class(num_images, num_classes):
    check_every_class_is_drawn(num_images, num_classes)
    assert len(balanced_labels(num_images, num_classes).unique()) == num_classes
