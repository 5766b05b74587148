"""rlhf_jax's PPO on a workload.

python -m benchmarks.peers.ours --workload xs --way separate

The learner is what `algorithms/ppo.create` makes of a config, and an iteration is what loop.py's
loop does with it. Scoring by the reward model is a call of its own; the rest of scoring (the
reference's log-probabilities) is compiled into the train step. So the clock gives both to the
update, and at `split` the same function compiled apart says how much of it is scoring:
benchmarks/run.py moves that many seconds. Policy and critic are not read before the update: its
first forward pass gives their log-probabilities and values too.

A turn's report has the seconds of compilation in it, as JAX counts them. With `--cache DIR`
compiled programs are kept in DIR and read from it, as the library does by default.
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
  """A word for every id; the last two are padding and EOS, past which responses go on ('raw')."""
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


def make_config(w, way, folder, device):
  """The config of a workload; see workloads.WAYS."""
  config = updates.make_config(w, workloads.WAYS[way].config, device)
  config.steps = 10**6
  config.tokenizer = str(folder / 'tokenizer')
  config.data.path = str(folder / 'prompts.jsonl')
  config.reward.model = str(folder / 'reward')
  config.rl.update({'response': 'raw', 'score_position': 'last'})
  build.validate(config, jax.device_count())
  return config


def create(config, mesh):
  """The learner, and the forward passes that its train step begins with."""
  steps = []

  def jit_step(function, state):
    steps.append(function)
    return setup_jit_step(function, state)

  setup_jit_step = setup.jit_step
  with unittest.mock.patch.object(setup, 'jit_step', jit_step):
    learner, state = ppo.create(config, mesh)
  models, settings = steps[0].keywords['models'], steps[0].keywords['settings']

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
  """A list to which the seconds of tracing, lowering and compiling are added as they happen."""
  seconds = []

  def listen(event, duration, **_):
    if event in COMPILATION:
      seconds.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  return seconds


def iterate(learner, state, turns, compilation_seconds):
  """One turn of the loop in loop.py; returns the next state and what the train step was given."""
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
    learner, state, passes = create(make_config(w, options.way, folder, options.device), mesh)
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
