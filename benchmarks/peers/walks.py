"""Runs the PPO stage of configs/random_walks.py, or ILQL on recorded walks, beside trlX.

python -m benchmarks.random_walks --model FOLDER
"""

import pathlib
import tempfile

import jax

from benchmarks.peers import jax_device
from benchmarks.peers import ours
from benchmarks.peers import protocol
from rlhf_jax import config_files
from rlhf_jax import pipeline
from rlhf_jax import runtime
from rlhf_jax import sharding
from rlhf_jax.algorithms import build
from rlhf_jax.tasks import random_walks

STEPS = 10  # of ILQL in an iteration: an epoch of trlX's example


def stage(options, folder):
  """Returns the config of the run, whose data are in the folder `world`."""
  if options.algorithm == 'ilql':
    stages = config_files.read(config_files.find('random_walks_offline'))
    config = pipeline.resolve(stages.ilql, folder, stages.seed)
    config.evals = {}
  else:
    stages = config_files.read(config_files.find('random_walks'), f'model={options.model}')
    config = pipeline.resolve(stages.ppo, folder, stages.seed)
  config.steps = 10**6
  return config


def iterate_offline(learner, state, turns):
  """Takes the steps of an iteration of ILQL, reports their seconds, and returns the state."""
  for _ in range(STEPS):
    batch, _ = learner.next_batch(state, timed=False)
    state, metrics = learner.train_step(state, *batch)
  jax.block_until_ready((state, metrics))
  turns.lap('update')
  turns.report()
  return state


def main():
  options = protocol.arguments(__doc__, model='', algorithm='ppo')
  turns = protocol.Turns(device_peak=jax_device.peak)
  jax.config.update('jax_enable_compilation_cache', False)
  runtime.configure()
  mesh = sharding.make_mesh({'data': -1})
  with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
    folder = pathlib.Path(folder)
    (folder / 'world').mkdir()
    random_walks.write(folder / 'world', walks=1, seed=0)
    config = stage(options, folder)
    learner, state = build.load(config.algorithm).create(config, mesh)
    seconds = ours.compiling()
    turns.ready(protocol.versions('rlhf_jax', 'jax', 'jaxlib'))
    while True:
      turns.wait()
      if options.algorithm == 'ilql':
        state = iterate_offline(learner, state, turns)
      else:
        state, _ = ours.iterate(learner, state, turns, seconds)


if __name__ == '__main__':
  main()
