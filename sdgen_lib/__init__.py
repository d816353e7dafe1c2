"""sdgen: can a classifier be trained on generated images alone? The package behind the course's notebooks."""

__version__ = "0.1.0"


def load(folder, device=None, precision="auto"):
    """A trained generator from the folder that `sdgen_lib.export` made: a `generator.Generator`.

    ``images = generator(class_labels, num_inference_steps=10, guidance_scale=1.5)``. Errors as `generator.load`.
    """
    from . import generator  # here, so that importing the package costs nothing

    return generator.load(folder, device, precision)
