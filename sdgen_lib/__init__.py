"""sdgen: can a classifier be trained on generated images alone? The package behind the course's notebooks."""

__version__ = "0.1.0"


def load(folder, device=None, precision="auto"):
    """A trained generator from the folder that ``python -m sdgen_lib export --to generator`` made.

    ``images = generator(class_labels, num_inference_steps=10, guidance_scale=1.5)``. Errors as those of
    `share.generator.load`.
    """
    from .share.generator import load as load_generator  # here, so that importing the package costs nothing

    return load_generator(folder, device, precision)
