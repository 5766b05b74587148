"""Runs rlhf_jax's PPO on a workload.

python -m benchmarks.peers.ours --workload xs --variant separate

`algorithms/ppo.create` creates the learner from a config, and an iteration is that of loop.py.
The reward model is a separate call, but the reference's log-probabilities are compiled into the
train step, so the clock counts them as part of the update. The command `split` times the same
forward passes compiled separately, and benchmarks/run.py moves that time from update to scoring.
Policy and critic need no forward pass before the update, because its first forward pass also
computes their log-probabilities and values.

The report of a turn has the seconds of compilation as JAX measures them. With `--cache DIR`,
compiled programs are stored in DIR and read from it, as the library does by default.
"""

import json
import pathlib
import tempfile
import unittest.mock

import jax
import numpy as np
import tokenizers
import transformers

from benchmarks import updates
from benchmarks import workloads
from benchmarks.peers import jax_device
from benchmarks.peers import protocol
from rlhf_jax import forward as forward_lib
from rlhf_jax import models
from rlhf_jax import runtime
from rlhf_jax import sharding
from rlhf_jax import update
from rlhf_jax.algorithms import build
from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms import setup
from rlhf_jax.models import heads
from rlhf_jax.models import hf

COMPILATION = (
  '/jax/core/compile/jaxpr_trace_duration',
  '/jax/core/compile/jaxpr_to_mlir_module_duration',
  '/jax/core/compile/backend_compile_duration',
)


def write_tokenizer(folder, vocab):
  """Writes a tokenizer with a word for every id. The last two ids are padding and EOS.

  With rl.response='raw', responses continue past the EOS.
  """
  words = {f't{i}': i for i in range(vocab - 2)} | {'<pad>': vocab - 2, '<eos>': vocab - 1}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<pad>'))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token='<pad>', eos_token='<eos>'
  )
  tokenizer.save_pretrained(folder)
  return tokenizer


def write_world(w, folder):
  """Writes a tokenizer, random prompts and a random reward model of the policy's size."""
  tokenizer = write_tokenizer(folder / 'tokenizer', w.vocab)
  rows = np.random.default_rng(0).integers(0, w.vocab - 2, (16 * w.batch, w.prompt))
  lines = [json.dumps({'prompt': ' '.join(f't{i}' for i in row)}) for row in rows]
  (folder / 'prompts.jsonl').write_text('\n'.join(lines), encoding='utf-8')
  model = models.create({'family': 'gpt2', **w.gpt2})
  head = heads.init_scalar(jax.random.key(2), model.width, scale='normal')
  hf.save(
    folder / 'reward', model, jax.jit(model.init)(jax.random.key(1)), tokenizer=tokenizer, head=head
  )


def make_config(w, variant, folder, device):
  """Returns the config of a workload; see workloads.VARIANTS."""
  config = updates.make_config(w, workloads.VARIANTS[variant].config, device)
  config.steps = 10**6
  config.tokenizer = str(folder / 'tokenizer')
  config.data.path = str(folder / 'prompts.jsonl')
  config.reward.model = str(folder / 'reward')
  config.rl.update({'response': 'raw', 'score_position': 'last'})
  build.validate(config, jax.device_count())
  return config


def create(config, mesh):
  """Creates the learner, its state, and a jitted function of the train step's forward passes."""
  steps = []

  def jit_step(function, state, **static):
    steps.append(static)
    return setup_jit_step(function, state, **static)

  setup_jit_step = setup.jit_step
  with unittest.mock.patch.object(setup, 'jit_step', jit_step):
    learner, state = ppo.create(config, mesh)
  models, settings = steps[0]['models'], steps[0]['settings']

  @jax.jit
  def passes(params, frozen, rollout):
    forward = forward_lib.Forward(
      models.with_max_length(rollout.tokens.shape[1]), frozen, settings.temperature
    )
    if settings.schedule.is_full_batch(rollout):
      return forward.fixed(params, rollout)
    return update.before_update(
      params, rollout, rollout.response_mask, forward=forward, schedule=settings.schedule
    )

  return learner, state, passes


def compiling():
  """Returns a list to which JAX adds the seconds of each tracing, lowering and compilation."""
  seconds = []

  def listen(event, duration, **_):
    if event in COMPILATION:
      seconds.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  return seconds


def iterate(learner, state, turns, compilation_seconds):
  """Runs one iteration as in loop.py, and returns the next state and the train step's arguments."""
  compilation_seconds.clear()
  batch, metrics = learner.next_batch(state, timed=True)
  turns.lap('rollout')
  state, _ = jax.block_until_ready(learner.train_step(state, *batch))
  turns.lap('update')
  turns.move('rollout', 'scoring', metrics['seconds/scoring'])
  turns.report(compilation=sum(compilation_seconds))
  return state, batch


def main():
  options = protocol.arguments(__doc__, cache='')
  turns = protocol.Turns(device_peak=jax_device.peak)
  jax.config.update('jax_enable_compilation_cache', bool(options.cache))
  if options.cache:
    jax.config.update('jax_compilation_cache_dir', options.cache)
  runtime.configure()
  w = options.workload
  mesh = sharding.make_mesh({'data': -1})
  with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
    folder = pathlib.Path(folder)
    write_world(w, folder)
    learner, state, passes = create(make_config(w, options.variant, folder, options.device), mesh)
    batch = None
    seconds = compiling()
    turns.ready(protocol.versions('rlhf_jax', 'jax', 'jaxlib', 'flax'))
    while True:
      command = turns.wait()
      if command == 'iterate':
        state, batch = iterate(learner, state, turns, seconds)
      else:
        frozen, rollout, _, _ = batch
        jax.block_until_ready(passes(state.params, frozen, rollout))
        turns.lap('scoring')
        turns.report()


if __name__ == '__main__':
  main()
