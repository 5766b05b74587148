"""Human feedback: the store and its labelling page, simulated annotators, ratings, red teaming."""
