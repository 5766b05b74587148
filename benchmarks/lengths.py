"""python -m benchmarks.lengths

Updates on responses whose lengths are geometric, in microbatches: of all slots, and of rows of like
length, cut to it (rlhf_jax/lengths.py). The same rows of full length show what a slot costs. The
model is that of a workload; the times are those of a whole update, after the first.
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
flags.DEFINE_integer('longest', 256, 'Slots of a response.')
flags.DEFINE_integer('rows', 64, 'Episodes of an update.')
flags.DEFINE_integer('microbatch', 8, 'Rows at a time.')


def shorten(rollout, mean):
  """The rollout with responses that end after every token with probability 1 / mean."""
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
          workloads.WAYS[FLAGS.way].config
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
            'stage': f'cut to {buckets} lengths' if buckets > 1 else 'all slots',
            'seconds': seconds,
            'tokens a response': round(float(jnp.sum(rollout.response_mask)) / w.batch, 1),
            'seconds before the first': round(compiled, 1),
          }
        )
  print(
    tables.stages_table(
      found,
      title=f'{w.layers} x {w.width}, vocabulary {w.vocab}, {w.batch} rows of '
      f'{w.prompt} + {w.response}, {FLAGS.microbatch} at a time',
      width=130,
    )
  )


if __name__ == '__main__':
  app.run(main)
