"""Compares continuous batching with plain batches on responses of geometric lengths.

python -m benchmarks.refill

The model has the shape of the workload `xs` and random weights, but the logit of the EOS is set so
that each token is the last with probability 1 / mean. Alternates three ways to sample, with about
the same number of tokens:

  equal    plain batches; all responses have the mean length
  refill   continuous batching; geometric lengths
  plain    plain batches; geometric lengths; a batch runs until its longest response ends

Also counts the responses that differ between refill and plain, which use the same random keys.
"""

import dataclasses
import functools
import statistics
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import models
from rlhf_jax import runtime
from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.rollout import decode
from rlhf_jax.rollout import engine
from rlhf_jax.rollout import sampling as sampling_lib

FLAGS = flags.FLAGS
flags.DEFINE_integer('layers', 4, 'Number of layers.')
flags.DEFINE_integer('width', 256, 'Width. The feed-forward layers are four times as wide.')
flags.DEFINE_integer('vocab', 8192, 'Vocabulary size.')
flags.DEFINE_integer('prompts', 512, 'Number of prompts.')
flags.DEFINE_integer('batch', 32, 'Number of sequences that are sampled at a time.')
flags.DEFINE_integer('prompt', 64, 'Prompt length.')
flags.DEFINE_integer('mean', 32, 'Mean length of a response.')
flags.DEFINE_integer('longest', 256, 'Maximum length of a response.')
flags.DEFINE_string('dtype', 'float32', 'Dtype of the computation.')
flags.DEFINE_integer('rounds', 5, 'Number of timed rounds.')

EOS = 0


@dataclasses.dataclass(frozen=True)
class Ending(transformer.Model):
  """Decoder that samples the EOS with probability 1 / mean at each position."""

  mean: int = 32

  def unembed(self, params, hidden):
    logits = super().unembed(params, hidden)
    others = jax.nn.logsumexp(logits.at[..., EOS].set(-jnp.inf), axis=-1)
    return logits.at[..., EOS].set(others - np.log(self.mean - 1.0))


def make_model():
  """Creates the model and its parameters."""
  model = models.create(
    {
      'family': 'gpt2',
      'vocab_size': FLAGS.vocab,
      'n_embd': FLAGS.width,
      'n_layer': FLAGS.layers,
      'n_head': max(FLAGS.width // 64, 1),
      'n_positions': FLAGS.prompt + FLAGS.longest,
    },
    dtype=FLAGS.dtype,
    unroll=FLAGS.layers,
  )
  model = Ending(
    **{field.name: getattr(model, field.name) for field in dataclasses.fields(model)},
    mean=FLAGS.mean,
  )
  return model, model.init(jax.random.key(0))


def ways(model, params):
  """Returns {name: function without arguments that returns a Rollout of all prompts}."""
  rng = np.random.default_rng(0)
  shape = FLAGS.prompts, FLAGS.prompt
  prompts = types.Prompts(
    jnp.asarray(rng.integers(1, FLAGS.vocab, shape), jnp.int32), jnp.ones(shape, bool)
  )
  key = jax.random.key(1)
  geometric = sampling_lib.Sampling(max_new_tokens=FLAGS.longest, eos_id=EOS)
  equal = sampling_lib.Sampling(max_new_tokens=FLAGS.mean, eos_id=EOS, ignore_eos=True)

  def in_batches(sampling):
    generate = jax.jit(functools.partial(decode.generate, model=model, sampling=sampling))
    starts = range(0, FLAGS.prompts, FLAGS.batch)

    def run():
      parts = [
        generate(
          params, jax.tree.map(lambda x: x[start : start + FLAGS.batch], prompts), key, first=start
        )
        for start in starts
      ]
      return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

    return run

  refill = jax.jit(
    functools.partial(engine.generate, model=model, sampling=geometric, max_concurrent=FLAGS.batch)
  )
  return {
    'equal': in_batches(equal),
    'refill': lambda: refill(params, prompts, key),
    'plain': in_batches(geometric),
  }


def main(_):
  runtime.configure_malloc()
  runs = ways(*make_model())
  found, first = {}, {}
  for name, run in runs.items():
    started = time.perf_counter()
    found[name] = jax.block_until_ready(run())
    first[name] = time.perf_counter() - started
  lengths = np.asarray(found['refill'].response_mask).sum(axis=1)
  differ = np.any(np.asarray(found['refill'].tokens != found['plain'].tokens), axis=1).sum()
  print(
    f'{FLAGS.prompts} responses of {lengths.mean():.1f} tokens, the longest {lengths.max()}; '
    f'batch {FLAGS.batch}; '
    f'{differ} differ between refill and plain'
  )
  seconds = {name: [] for name in runs}
  for _ in range(FLAGS.rounds):
    for name, run in runs.items():
      started = time.perf_counter()
      jax.block_until_ready(run())
      seconds[name].append(time.perf_counter() - started)
  print('         seconds   (min)  tokens/s  seconds per token / that of equal first run')
  tokens = {name: int(np.asarray(rollout.response_mask).sum()) for name, rollout in found.items()}
  medians = {name: statistics.median(times) for name, times in seconds.items()}
  for name, median in medians.items():
    ratio = median / tokens[name] / (medians['equal'] / tokens['equal'])
    print(
      f'{name:8} {median:7.2f} {min(seconds[name]):7.2f} {tokens[name] / median:9.0f} '
      f'{ratio:31.2f} '
      f'{first[name]:11.1f}'
    )
  print(f'refill is {medians["plain"] / medians["refill"]:.2f} times as fast as plain')


if __name__ == '__main__':
  app.run(main)
