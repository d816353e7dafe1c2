"""What the notebooks show: figures, tables, diagrams, and explorers to move things with."""
