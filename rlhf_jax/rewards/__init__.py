"""Scores for sampled text: learned reward models and Python functions over strings."""
