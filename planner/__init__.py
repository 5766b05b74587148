"""What a PPO run needs and how long it takes, on TPUs that nobody has to own.

The real rollout, scoring and train step are compiled by the TPU's compiler for a topology that is
only described; nothing is read from disk and nothing is run.
"""
