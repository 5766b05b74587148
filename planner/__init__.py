"""Predicts the memory and time of a PPO run on TPUs, without access to any.

The TPU compiler compiles the real rollout, scoring and train step for a described topology. No
weights are read and nothing is executed.
"""
