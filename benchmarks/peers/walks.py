"""Runs the PPO stage of configs/random_walks.py beside trlX.

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
from rlhf_jax.algorithms import ppo
from rlhf_jax.tasks import random_walks


def main():
  options = protocol.arguments(__doc__, model='')
  turns = protocol.Turns(device_peak=jax_device.peak)
  jax.config.update('jax_enable_compilation_cache', False)
  runtime.configure()
  mesh = sharding.make_mesh({'data': -1})
  with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
    folder = pathlib.Path(folder)
    (folder / 'world').mkdir()
    random_walks.write(folder / 'world', walks=1, seed=0)
    stages = config_files.read(config_files.find('random_walks'), f'model={options.model}')
    config = pipeline.resolve(stages.ppo, folder, stages.seed)
    config.steps = 10**6
    learner, state = ppo.create(config, mesh)
    seconds = ours.compiling()
    turns.ready(protocol.versions('rlhf_jax', 'jax', 'jaxlib'))
    while True:
      turns.wait()
      state, _ = ours.iterate(learner, state, turns, seconds)


if __name__ == '__main__':
  main()
