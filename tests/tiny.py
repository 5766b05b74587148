"""A world small enough for tests: 64 words, a two-layer Llama, a few examples of every kind.

python -m rlhf_jax.main --config=tests/tiny.py:stage=ppo,world=FOLDER --workdir=DIR

The task: texts of the words w0 .. w59, of which w0 .. w29 are good. Comparisons prefer the text
with more good words, and `good_words` returns their fraction.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import optax
import tokenizers as hf_tokenizers
import transformers

from rlhf_jax import config as config_lib
from rlhf_jax import forward as forward_lib
from rlhf_jax import loop as loop_lib
from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax import update
from rlhf_jax.algorithms import distillation as distillation_lib
from rlhf_jax.algorithms import dpo as dpo_lib
from rlhf_jax.algorithms import grpo as grpo_lib
from rlhf_jax.algorithms import ilql as ilql_lib
from rlhf_jax.algorithms import nlpo as nlpo_lib
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.algorithms import rejection_sampling as rejection_sampling_lib
from rlhf_jax.algorithms import reward_model as reward_model_lib
from rlhf_jax.algorithms import sft as sft_lib
from rlhf_jax.models import heads
from rlhf_jax.models import hf

PAD, BOS, EOS, UNK = range(4)
WORDS = 60
VOCAB = WORDS + 4
LLAMA = {
  'family': 'llama',
  'vocab_size': VOCAB,
  'hidden_size': 16,
  'intermediate_size': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 32,
  'tie_word_embeddings': True,
  'initializer_range': 0.1,
}
T5 = {
  'family': 't5',
  'vocab_size': VOCAB,
  'd_model': 16,
  'd_kv': 4,
  'd_ff': 32,
  'num_layers': 2,
  'num_heads': 4,
  'decoder_start_token_id': PAD,
}


def write(folder):
  """Writes tokenizer/, model/, reward/ and one .jsonl file for each kind of data.

  Args:
    folder: Output folder.

  Returns:
    The folder.
  """
  folder = pathlib.Path(folder)
  write_tokenizer(folder / 'tokenizer')
  write_model(folder / 'model', LLAMA)
  write_model(folder / 'reward', LLAMA, reward=True)
  write_jsonl(folder / 'texts.jsonl', [{'text': text(i, 3 + i % 12)} for i in range(64)])
  write_jsonl(
    folder / 'completions.jsonl',
    [{'prompt': text(i, 1 + i % 4), 'completion': text(3 * i, 2 + i % 5)} for i in range(48)],
  )
  write_jsonl(
    folder / 'conversations.jsonl',
    [
      {
        'messages': [
          {'role': ('user', 'assistant')[turn % 2], 'content': text(i + 5 * turn, 1 + i % 3)}
          for turn in range(2 + 2 * (i % 2))
        ]
      }
      for i in range(24)
    ],
  )
  write_jsonl(
    folder / 'comparisons.jsonl',
    [
      {'prompt': text(i, 1 + i % 3), 'chosen': text(i % 20, 3), 'rejected': text(30 + i % 20, 4)}
      for i in range(48)
    ],
  )
  write_jsonl(folder / 'annotated.jsonl', annotated())
  write_jsonl(
    folder / 'episodes.jsonl',
    [
      {'prompt': text(i, 1 + i % 4), 'completion': text(3 * i, 2 + i % 5), 'reward': i % 7 - 2}
      for i in range(48)
    ],
  )
  write_jsonl(
    folder / 'prompts.jsonl', [{'prompt': text(7 * i, 1 + i % 5), 'number': i} for i in range(40)]
  )
  return folder


def annotated():
  """Returns 100 comparisons of 20 pairs, by four annotators and by nobody.

  Annotators "ann" and 7 prefer good words, "coin" alternates, "contrary" prefers the others.
  """
  records = []
  for i in range(100):
    annotator = ('ann', 7, 'coin', 'contrary', None)[(i + i // 20) % 5]
    pair = [text(i % 20, 3), text(30 + i % 20, 4)]
    if annotator == 'contrary' or (annotator == 'coin' and i % 2):
      pair.reverse()
    record = {'prompt': text(i, 1 + i % 3), 'chosen': pair[0], 'rejected': pair[1]}
    records.append(record if annotator is None else record | {'annotator': annotator})
  return records


def write_model(path, fields, *, reward=False):
  """Writes a random language model or reward model, with the tokenizer."""
  model = models.create(fields)
  tokenizer = write_tokenizer(path)
  head = heads.init_scalar(jax.random.key(8), model.width, scale='normal') if reward else None
  hf.save(path, model, model.init(jax.random.key(7)), tokenizer=tokenizer, head=head)


def write_tokenizer(path, words=WORDS):
  """Writes and returns a tokenizer of whole words, with BOS, EOS and padding."""
  vocabulary = {'<|pad|>': PAD, '<|bos|>': BOS, '<|eos|>': EOS, '<|unk|>': UNK}
  vocabulary |= {f'w{i}': 4 + i for i in range(words)}
  backend = hf_tokenizers.Tokenizer(hf_tokenizers.models.WordLevel(vocabulary, unk_token='<|unk|>'))
  backend.pre_tokenizer = hf_tokenizers.pre_tokenizers.WhitespaceSplit()
  backend.post_processor = hf_tokenizers.processors.TemplateProcessing(
    single='<|bos|> $A', special_tokens=[('<|bos|>', BOS)]
  )
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    pad_token='<|pad|>',
    bos_token='<|bos|>',
    eos_token='<|eos|>',
    unk_token='<|unk|>',
  )
  tokenizer.save_pretrained(path)
  return tokenizer


def text(start, length):
  """Returns `length` consecutive words from word `start`."""
  return ' '.join(f'w{(start + 11 * i) % WORDS}' for i in range(length))


def write_jsonl(path, records):
  """Writes one JSON object per line."""
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return path


def good_words(prompts, responses, *, response_tokens, metadata):
  """Returns the fraction of a response's words that are below w30."""
  del prompts, response_tokens
  assert all('number' in entry for entry in metadata)
  rewards = []
  for response in responses:
    words = [int(word[1:]) for word in response.split() if word[1:].isdigit()]
    rewards.append(sum(word < 30 for word in words) / max(len(words), 1))
  return rewards


def sft(world, kind='text'):
  """Returns a config of language modelling on texts.jsonl, or of SFT on completions.jsonl."""
  config = sft_lib.config()
  config.data.kind = kind
  config.data.path = f'{world}/{"texts" if kind == "text" else "completions"}.jsonl'
  return _trained(config, world)


def reward_model(world):
  """Returns a config of a reward model on comparisons.jsonl."""
  config = reward_model_lib.config()
  config.data.path = f'{world}/comparisons.jsonl'
  config.data.held_out = 0.2
  return _trained(config, world)


def dpo(world, preset=''):
  """Returns a config of DPO or one of its relatives on comparisons.jsonl."""
  config = dpo_lib.config(preset)
  config.data.path = f'{world}/comparisons.jsonl'
  config.data.held_out = 0.2
  return _trained(config, world)


def ilql(world, preset=''):
  """Returns a config of ILQL on episodes.jsonl, whose targets move every second step."""
  config = ilql_lib.config(preset)
  config.data.path = f'{world}/episodes.jsonl'
  config.data.held_out = 0.2
  config.ilql.update({'target_every': 2, 'target_alpha': 0.3, 'awac_beta': 0.5})
  return _trained(config, world)


def ppo(world, preset=''):
  """Returns a config of PPO against the reward function above."""
  config = on_policy(ppo_lib.config(preset), world)
  config.rl.update({'epochs': 2, 'minibatches': 2})
  if config.rl.ptx_coef:
    mix_in_pretraining(config, world)
  return config


def grpo(world, preset=''):
  """Returns a config of GRPO against the reward function above, with 2 responses per prompt."""
  config = on_policy(grpo_lib.config(preset), world)
  config.sampling.samples = 2
  return config


def rejection_sampling(world):
  """Returns a config of rejection sampling with the reward function above, 4 responses each."""
  config = on_policy(rejection_sampling_lib.config(), world)
  config.sampling.samples, config.rl.keep_count = 4, 2
  return config


def distillation(world, preset=''):
  """Returns a config of distillation from a larger model, which reads two words more."""
  teacher = pathlib.Path(world) / 'teacher'
  if not teacher.exists():
    fields = {'vocab_size': VOCAB + 8, 'hidden_size': 24, 'initializer_range': 0.3}
    write_model(teacher, LLAMA | fields)
  config = distillation_lib.config(preset)
  config.data.path = f'{world}/completions.jsonl'
  config.data.max_prompt_length = 6
  config.sampling.max_new_tokens = 6
  config.distillation.update({'teacher': str(teacher), 'context': 'w3 w5 '})
  return _trained(config, world)


def nlpo(world):
  """NLPO against the reward function above, with masks of half of the words or more."""
  config = on_policy(nlpo_lib.config(), world)
  config.rl.update({'epochs': 2, 'minibatches': 2})
  config.rl.update({'mask_top_p': 0.6, 'mask_min_tokens': 4, 'mask_every': 2})
  return config


def on_policy(config, world):
  """Returns the config of an on-policy algorithm, against the reward function above."""
  config.data.path = f'{world}/prompts.jsonl'
  config.data.max_prompt_length = 6
  config.reward.function = 'tiny:good_words'
  config.sampling.max_new_tokens = 6
  return _trained(config, world)


def evals(world, every=2):
  """Returns blocks of every evaluator of responses: the first 10 prompts, 4 new tokens."""
  asked = lambda: {
    'path': f'{world}/prompts.jsonl',
    'every': every,
    'count': 10,
    'sampling': {'max_new_tokens': 4},
  }
  scored = lambda: asked() | {'reward': {'function': 'tiny:good_words'}}
  return {'prompts': scored(), 'win_rate': scored(), 'text': asked()}


def mix_in_pretraining(config, world):
  """Adds PPO-ptx on completions.jsonl."""
  config.rl.ptx_coef = 0.5
  config.ptx.update(
    {'path': f'{world}/completions.jsonl', 'kind': 'completion', 'max_length': 16, 'batch_size': 16}
  )


def _trained(config, world):
  config.model.path = f'{world}/model'
  if 'max_length' in config.data:
    config.data.max_length = 16
  config.batch_size, config.steps = 16, 4
  config.optim.learning_rate = 3e-3
  return config


def train(algorithm, config, steps, mesh=None):
  """Takes some steps of a learner.

  Args:
    algorithm: Module of rlhf_jax.algorithms.
    config: Its config.
    steps: Number of steps.
    mesh: Device mesh; None for one device.

  Returns:
    Learner, the last state, the metrics of every step, and those of all evaluators at the end.
  """
  mesh, history = mesh or sharding.make_mesh({}, devices=jax.devices()[:1]), []
  with jax.set_mesh(mesh):
    learner, state = algorithm.create(config, mesh)
    for _ in range(steps):
      batch, _ = learner.next_batch(state, timed=False)
      state, metrics = learner.train_step(state, *batch)
      history.append(jax.device_get(metrics))
    return learner, state, history, loop_lib.evaluate(learner, state, list(learner.evaluators))


def one_step(train_step, params, *batch, jit=True):
  """Takes a train step from the given parameters.

  Args:
    train_step: (state, *batch, optimizers=) -> (state, metrics), not jitted yet.
    params: {name: parameters}.
    *batch: Its arguments.
    jit: Whether to jit it.

  Returns:
    The next TrainState and metrics.
  """
  optimizers = {name: optax.adam(1e-3, eps=1e-3) for name in params}
  first = types.TrainState(
    step=jnp.int32(0),
    key=jax.random.key(0),
    params=params,
    opt_state={name: optimizers[name].init(params[name]) for name in params},
    extra={'kl_coef': jnp.float32(0.1), 'reward_moments': jnp.zeros(3)},
  )
  train_step = functools.partial(train_step, optimizers=optimizers)
  return (jax.jit(train_step) if jit else train_step)(first, *batch)


def experience(state, frozen, rollout, scores, *, models, settings):
  """Returns Experience, extra and metrics before the update; arguments as for ppo.train_step."""
  _, objective = ppo_parts(state, frozen, rollout, scores, models, settings)
  settings = dataclasses.replace(settings, microbatch_size=0)
  fixed, outputs = before_update(state.params, frozen, rollout, models=models, settings=settings)
  return objective.prepare(outputs, fixed)


def before_update(params, frozen, rollout, *, models, settings):
  """Runs PPO's forward passes before an update; returns Fixed and Outputs."""
  state = types.TrainState(0, None, params, {}, {'kl_coef': 0.0})
  scores = jnp.zeros(len(rollout.tokens))
  forward, objective = ppo_parts(state, frozen, rollout, scores, models, settings)
  return update.before_update(
    params, rollout, objective.step_mask, forward=forward, schedule=settings.schedule
  )


def gradients(params, experience, frozen, kl_coef, *, models, settings):
  """Returns PPO's gradients of one minibatch, and metrics."""
  state = types.TrainState(0, None, params, {}, {'kl_coef': kl_coef})
  scores = jnp.zeros(len(experience.tokens))
  forward, objective = ppo_parts(state, frozen, experience, scores, models, settings)
  return update.minibatch_gradients(
    params, experience, forward=forward, objective=objective, schedule=settings.schedule
  )


def ppo_parts(state, frozen, rollout, scores, models, settings):
  """Returns the forward passes and the objective that ppo.train_step gives to the update."""
  forward = forward_lib.Forward(
    models, frozen, settings.temperature, full_kl=settings.kl_estimator == 'full'
  )
  return forward, ppo_lib.objective(state, rollout, scores, settings=settings)


def get_config(arg=None):
  """Returns long runs of small steps, for tests that kill them; see the arguments below."""
  arg = config_lib.parse_arg(arg, stage='ppo', world='', evaluator='')
  if arg.stage in ('reward_model', 'sft'):
    config = reward_model(arg.world) if arg.stage == 'reward_model' else sft(arg.world)
    config.data.held_out = config.data.held_out or 0.1
    config.evals.held_out.every = 7
  else:
    config = ppo(arg.world) if arg.stage == 'ppo' else grpo(arg.world)
    mix_in_pretraining(config, arg.world)
    config.reward.update({'function': None, 'model': f'{arg.world}/reward'})
    config.rl.scale_scores = True
    if arg.stage == 'ppo':
      config.rl.update({'kl_controller': 'adaptive', 'kl_horizon': 100.0})
    else:
      config.sampling.staleness, config.rl.importance_cap = 1, 1.1
    config.samples_every = 10
    config.evals = evals(arg.world, every=7)
  if arg.evaluator:
    config.evals.user = {'function': arg.evaluator, 'every': 4}
  config.steps, config.checkpoint_every = 150, 3
  return config
