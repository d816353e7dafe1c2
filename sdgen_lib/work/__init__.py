"""What every method works with: a run's data, model and results, its two training steps' common part, its costs."""
