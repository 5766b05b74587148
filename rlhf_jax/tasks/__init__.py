"""Data and gold scores or rules of the experiments in configs/."""
