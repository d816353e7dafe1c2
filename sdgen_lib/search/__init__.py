"""The Optuna search over inference steps (IS), guidance scale (UGS) and training epoch."""
