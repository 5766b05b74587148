"""Reads and tokenizes data, packs sequences, and iterates over batches with a saved position."""
