"""Scores of sampled text, by learned reward models or Python functions of strings."""
