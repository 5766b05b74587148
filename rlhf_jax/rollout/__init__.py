"""Sampling from a policy: filters, the decode loop."""
