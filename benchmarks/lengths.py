"""Times updates on responses of geometric lengths, with and without length buckets.

python -m benchmarks.lengths

Without buckets all microbatches have the full length. With buckets a microbatch holds sequences of
similar length and is cut to it (rlhf_jax/lengths.py). Updates on responses of full length show the
cost of a token. The model is that of a workload. Times are of full updates after the first.
"""

import dataclasses
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import options
from benchmarks import updates
from benchmarks import workloads
from rlhf_jax import runtime
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.evaluation import tables

FLAGS = options.FLAGS
flags.DEFINE_integer('mean', 32, 'Mean length of a response.')
flags.DEFINE_integer('longest', 256, 'Maximum length of a response.')
flags.DEFINE_integer('rows', 64, 'Batch size of an update.')
flags.DEFINE_integer('microbatch', 8, 'Microbatch size.')


def shorten(rollout, mean):
  """Returns the rollout with responses that end after each token with probability 1 / mean."""
  batch, slots = rollout.response_mask.shape
  lengths = np.random.default_rng(1).geometric(1 / mean, batch).clip(max=slots)
  response = jnp.asarray(np.arange(slots)[None] < lengths[:, None])
  return types.Rollout(
    rollout.tokens, rollout.mask.at[:, -slots:].set(response), response, rollout.logprobs
  )


def main(_):
  options.hold_to_cores()
  runtime.configure_malloc()
  w = dataclasses.replace(
    workloads.WORKLOADS[FLAGS.workload], response=FLAGS.longest, batch=FLAGS.rows
  )
  mesh, found = sharding.make_mesh({'data': -1}), []
  with jax.set_mesh(mesh):
    for buckets in (1, 4):
      started = time.perf_counter()
      update = updates.prepare(
        updates.make_config(
          w,
          workloads.VARIANTS[FLAGS.variant].config
          | {'microbatch_size': FLAGS.microbatch, 'rl.length_buckets': buckets},
          FLAGS.device,
        ),
        mesh,
      )
      compiled = time.perf_counter() - started
      frozen, full, *rest = update.arguments
      for rollout in (full, shorten(full, FLAGS.mean)):
        state, seconds = updates.seconds(
          update._replace(arguments=(frozen, rollout, *rest)), FLAGS.timed
        )
        update = update._replace(state=state)
        found.append(
          {
            'stage': f'{buckets} length buckets' if buckets > 1 else 'full length',
            'seconds': seconds,
            'tokens per response': round(float(jnp.sum(rollout.response_mask)) / w.batch, 1),
            'seconds of set-up': round(compiled, 1),
          }
        )
  print(
    tables.stages_table(
      found,
      title=f'{w.layers} x {w.width}, vocabulary {w.vocab}, batch {w.batch} x '
      f'({w.prompt} + {w.response}), microbatches of {FLAGS.microbatch}',
      width=130,
    )
  )


if __name__ == '__main__':
  app.run(main)
