"""Who prefers what: simulated annotators, and ratings from the matches between policies."""
