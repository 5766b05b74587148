"""Feedback on responses: simulated annotators, and Elo ratings of policies."""
