"""sdgen: can a classifier be trained on generated images alone? The package behind the course's notebooks."""

__version__ = "0.1.0"
