"""What the notebooks show: figures, tables, diagrams, and explorers to move things with."""

from .names import as_text

as_text()
