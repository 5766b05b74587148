"""Measures what sampling ahead hides: iterations per second at staleness 0 and 1.

python -m benchmarks.staleness
python -m benchmarks.staleness --curves

The reward sleeps as long as a rollout takes, as one does that waits for a server or for other
processes. At staleness 0 an iteration is rollout + reward + update; at staleness 1 the reward runs
beside the rollout. Adapters are trained on 4 responses of a wide model, so that sampling takes
longer than the update, as on accelerators. `--curves` trains on the random walks with both, without
the sleep.
"""

import pathlib
import statistics
import tempfile
import time

from absl import app
from absl import flags
import jax

from rlhf_jax import loop
from rlhf_jax import metrics as metrics_lib
from rlhf_jax import sharding
from rlhf_jax.algorithms import grpo
from rlhf_jax.evaluation import tables
from rlhf_jax.tasks import random_walks

CURVE_STEPS = 20


def reward(prompts, responses, *, response_tokens, metadata, seconds):
  """Sleeps for some seconds, then returns the length of each response."""
  del prompts, metadata
  time.sleep(seconds)
  return [float(len(tokens)) for tokens in response_tokens]


def config(world, staleness, sleep, *, batch_size=4, response=64, layers=4, width=768):
  """Returns a GRPO config for the random walks' prompts and a new model of a given size.

  Args:
    world: Folder of the random walks.
    staleness: `config.sampling.staleness`.
    sleep: Seconds that the reward sleeps.
    batch_size: Responses of an iteration.
    response: Tokens of each response.
    layers: Layers of the model.
    width: Its width.
  """
  c = grpo.config()
  c.tokenizer = f'{world}/tokenizer'
  c.model.init = random_walks.MODEL | {'n_layer': layers, 'n_embd': width, 'n_head': 4}
  c.model.lora.targets = (('attention/|mlp/', 8, 16.0),)
  c.data.update({'path': f'{world}/prompts.jsonl', 'max_prompt_length': 8})
  c.reward.update({'function': f'{__name__}:reward', 'arguments': {'seconds': sleep}})
  c.sampling.update({'max_new_tokens': response, 'min_new_tokens': response, 'samples': 4})
  c.sampling.staleness, c.rl.kl_coef = staleness, 0.0
  c.batch_size, c.steps = batch_size, 1_000_000
  return c


def seconds_per_step(c, steps):
  """Trains two iterations to compile, then times the rest without waiting in between.

  Returns:
    Seconds of an iteration, and the median `seconds/rollout` of three timed ones before.
  """
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    learner, state = grpo.create(c, mesh)

    def step(state, timed):
      batch, metrics = learner.next_batch(state, timed=timed)
      return learner.train_step(state, *batch)[0], metrics

    times = []
    for _ in range(5):
      state, metrics = step(state, True)
      times.append(metrics['seconds/rollout'])
    jax.block_until_ready(state)
    started = time.perf_counter()
    for _ in range(steps):
      state, _ = step(state, False)
    jax.block_until_ready(state)
    return (time.perf_counter() - started) / steps, statistics.median(times[2:])


def hidden(folder, steps, **size):
  """Times both with a reward that sleeps as long as a rollout; returns the rows of the table."""
  random_walks.write(folder, walks=1, seed=0)
  _, sleep = seconds_per_step(config(folder, 0, 0.0, **size), 1)
  rows = []
  for staleness in (0, 1):
    seconds, _ = seconds_per_step(config(folder, staleness, sleep, **size), steps)
    rows.append({'stage': f'staleness {staleness}', 'iterations/s': 1 / seconds})
  return [row | {'ratio': row['iterations/s'] / rows[0]['iterations/s']} for row in rows]


def curves(folder, model, seeds):
  """Trains on the random walks; returns rows of optimality by iteration, means over seeds."""
  random_walks.write(folder, walks=1, seed=0)
  rows = []
  for staleness, cap in ((0, None), (1, None), (1, 2.0)):
    scores = []
    for seed in range(seeds):
      c = grpo.config()
      c.update({'seed': seed, 'batch_size': 140, 'steps': CURVE_STEPS})
      c.model.path = model
      c.data.update({'path': f'{folder}/prompts.jsonl', 'max_prompt_length': 1})
      c.reward.function = 'rlhf_jax.tasks.random_walks:reward'
      c.sampling.update({'max_new_tokens': random_walks.MAX_LENGTH - 1, 'samples': 7})
      c.sampling.staleness, c.rl.importance_cap = staleness, cap
      c.rl.update({'epochs': 4, 'minibatches': 2, 'kl_coef': 0.0, 'normalize': 'token'})
      c.optim.update({'learning_rate': 3e-4, 'schedule': 'linear', 'b2': 0.95})
      run = folder / f'{staleness}_{cap}_{seed}'
      loop.run(c, run)
      scores.append([record['objective/scores'] for record in metrics_lib.read(run)])
    mean = [statistics.mean(values) for values in zip(*scores)]
    name = f'staleness {staleness}' + (f', cap {cap}' if cap else '')
    rows.append({'stage': name} | {f'{i + 1}': mean[i] for i in (0, 1, 3, 5, 7, 9, 14, 19)})
  return rows


def main(_):
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    if flags.FLAGS.curves:
      rows = curves(folder, flags.FLAGS.model, flags.FLAGS.seeds)
      print(tables.stages_table(rows, title='Optimality by iteration', width=120))
    else:
      rows = hidden(folder, flags.FLAGS.steps)
      print(tables.stages_table(rows, title='A reward that sleeps as long as a rollout'))


if __name__ == '__main__':
  flags.DEFINE_integer('steps', 20, 'Iterations that are timed.')
  flags.DEFINE_bool('curves', False, 'Train on the random walks instead.')
  flags.DEFINE_string('model', '', 'With --curves: the pretrained model of random_walks.')
  flags.DEFINE_integer('seeds', 3, 'With --curves: the number of seeds.')
  app.run(main)
