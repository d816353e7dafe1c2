"""The commands that are not about one run's results: benchmarks, launches on several GPUs, the tiny model's making."""
