"""RLHF for language models in JAX: pretraining, SFT, reward models and PPO."""
