"""Evaluates policies by their texts and scores, and writes the report of a run."""
