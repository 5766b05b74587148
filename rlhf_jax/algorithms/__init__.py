"""One file an algorithm. Each has `create(config, mesh, workdir) -> train.Learner`."""
