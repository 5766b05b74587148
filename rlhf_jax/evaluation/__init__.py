"""Judging policies from their texts and scores, and the report of a run."""
