"""Samples responses from a policy and scores them: sampling, decode loops, caches, the actor."""
