"""Random updates on meshes of eight devices equal those on one: parameters, moments and metrics.

A seed draws an algorithm, a family, adapters, frozen layers, a critic, settings, a schedule whose
minibatches may or may not divide over the devices, and three meshes. Configs that validation
refuses are drawn again.
"""

import functools
import itertools
import re
import zlib

import devices
import jax
import numpy as np
import pytest

from rlhf_jax import errors
from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import build
from rlhf_jax.algorithms import grpo
from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms import reinforce
from rlhf_jax.algorithms import reward_model
from rlhf_jax.algorithms import rloo
from rlhf_jax.algorithms import setup
from rlhf_jax.algorithms import sft
from rlhf_jax.algorithms import wiring
from rlhf_jax.models import hf
import tiny

P, R = 4, 6
STEPS = 2
ALGORITHMS = (ppo, grpo, reinforce, sft, ppo, rloo, ppo, reward_model)  # by seed, in turn
MESHES = [
  dict(zip(('data', 'fsdp', 'tensor'), sizes))
  for sizes in itertools.product((1, 2, 4, 8), repeat=3)
  if np.prod(sizes) == 8
]

# Parameters without a gradient: softmax cancels a key's bias, differences of scores cancel the
# head's, and a critic computes no logits.
STILL = 'key/bias$|reward/head/bias$|reward/backbone/norm/bias$|(critic|reward)/backbone/unembed/'

SIZES = {
  'hidden_size': 16,
  'intermediate_size': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'max_position_embeddings': 32,
}
GROUPED = SIZES | {'num_key_value_heads': 2}
WINDOWED = GROUPED | {'head_dim': 4, 'sliding_window': 3}
DECODERS = {
  'llama': GROUPED,
  'llama, tied': GROUPED | {'family': 'llama', 'tie_word_embeddings': True},
  'gpt2': {'n_embd': 16, 'n_layer': 2, 'n_head': 4, 'n_positions': 32},
  'gpt_neox': SIZES,
  'gemma2': WINDOWED,
  'gemma3_text': WINDOWED | {'sliding_window_pattern': 2},
  'mistral': WINDOWED,
  'opt': {
    'hidden_size': 16,
    'ffn_dim': 32,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'max_position_embeddings': 32,
    'word_embed_proj_dim': 8,
  },
  'qwen2': GROUPED,
  'qwen3': WINDOWED,
  'phi3': GROUPED | {'pad_token_id': 0},
}
T5 = {
  't5': {
    'd_model': 16,
    'd_kv': 4,
    'd_ff': 32,
    'num_heads': 4,
    'num_layers': 2,
    'pad_token_id': 0,
    'eos_token_id': tiny.EOS,
    'decoder_start_token_id': 0,
    'n_positions': 32,
  }
}
BERT = {'bert': SIZES}

MODEL = {
  'model.unfrozen_layers': (None, None, 1),
  'model.lora.targets': ((), (), (('.*', 2, 4.0),)),
  'model.remat': ('none', 'none', 'block'),
  'model.unroll': (1, 1, 2),
  'optim.clip_norm': (None, 0.5),
  'optim.weight_decay': (0.0, 0.1),
  'optim.ema': (None, 0.9),
  'optim.name': ('adam', 'adam', 'tf_adam'),
  'microbatch_size': (None, 1, 2, 3, 4),
}
ON_POLICY = MODEL | {
  'sampling.temperature': (1.0, 0.7),
  'rl.epochs': (1, 2),
  'rl.minibatches': (1, 2, 3, 4),
  'rl.length_buckets': (1, 2),
  'rl.kl_estimator': ('k1', 'k2', 'k3', 'abs', 'full'),
  'rl.kl_in': ('reward', 'loss'),
  'rl.dual_clip': (None, 3.0),
  'rl.entropy_coef': (0.0, 0.02),
  'rl.ptx_coef': (0.0, 0.0, 0.5),
  'rl.missing_eos': ('none', 'replace', 'subtract'),
  'rl.missing_eos_value': (-1.0, 1.0),
  'rl.scale_scores': (False, True),
  'rl.clip_scores': (None, 1.0),
  'rl.behaviour': ('forward', 'sampler'),
}
SETTINGS = {
  ppo: ON_POLICY
  | {
    'critic.kind': ('separate', 'trunk', 'adapters'),
    'rl.kl_controller': ('fixed', 'adaptive'),
    'rl.gamma': (1.0, 0.9),
    'rl.value_clip': (None, 0.2),
    'rl.score_position': ('eos', 'last', 'after_end'),
    'rl.response': ('truncated', 'raw'),
    'rl.whiten_rewards': (False, True),
    'rl.whiten_advantages': ('batch', 'minibatch', 'none'),
    'rl.whiten_unbiased': (False, True),
    'sampling.samples': (1, 1, 2),
  },
  grpo: ON_POLICY
  | {
    'sampling.samples': (2, 3),
    'rl.scale': ('group', 'batch', 'none'),
    'rl.kl_coef': (0.04, 0.0),
    'rl.normalize': ('token', 'sequence', 'constant'),
    'rl.loss': ('clip', 'clip', 'cispo', 'sapo'),
    'rl.ratio': ('token', 'sequence', 'sequence_token'),
    'rl.drop_equal_groups': (False, True),
    'rl.overlong': (None, 0.5),
  },
  reinforce: ON_POLICY
  | {
    'sampling.samples': (1, 2),
    'rl.kl_coef': (0.05, 0.0),
    'rl.returns': ('token', 'sequence'),
    'rl.gamma': (1.0, 0.9),
    'rl.baseline': reinforce.BASELINES,
    'rl.whiten_advantages': (False, True),
    'rl.clip': (False, True),
    'rl.normalize': ('token', 'sequence', 'constant'),
  },
  rloo: ON_POLICY
  | {
    'sampling.samples': (2, 3),
    'rl.kl_coef': (0.05, 0.0),
    'rl.normalize_advantages': (False, True),
  },
  sft: MODEL | {'data.kind': ('text', 'completion')},
  reward_model: MODEL
  | {
    'preference.loss': ('pairwise', 'pick_best', 'rating'),
    'preference.centering': (0.0, 0.01),
    'preference.label_smoothing': (0.0, 0.1),
    'preference.token_dropout': (0.0, 0.2),
  },
}


@pytest.fixture(scope='module')
def folder(world, tmp_path_factory):
  """Returns the shared folder, to which models of this file are added when needed."""
  path = tmp_path_factory.mktemp('fuzz')
  tiny.write_jsonl(
    path / 'rankings.jsonl',
    [
      {
        'prompt': tiny.text(i, 1 + i % 3),
        'completions': [tiny.text(i + 7 * k, 2 + (i + k) % 3) for k in range(3)],
        'ranks': [i % 3, (i + 1) % 3, 2 * (i % 2)],
      }
      for i in range(48)
    ],
  )
  tiny.write_jsonl(
    path / 'picks.jsonl',
    [
      {
        'prompt': tiny.text(i, 1 + i % 3),
        'completions': [tiny.text(i + 7 * k, 2 + (i + k) % 3) for k in range(3)],
        'best': i % 3,
      }
      for i in range(48)
    ],
  )
  tiny.write_jsonl(
    path / 'ratings.jsonl',
    [
      {'prompt': tiny.text(i, 1 + i % 3), 'completion': tiny.text(i, 2 + i % 3), 'rating': i % 5}
      for i in range(48)
    ],
  )

  @functools.cache
  def model(family):
    fields = (DECODERS | T5 | BERT)[family]
    made = models.create({'family': family, 'vocab_size': tiny.VOCAB} | fields)
    params = shake(
      jax.tree.map(lambda x: np.full(x.shape, 0.0 if x.ndim > 1 else 0.5, x.dtype), made.shapes())
    )
    head = {'kernel': np.linspace(-1, 1, made.width, dtype=np.float32), 'bias': np.float32(0)}
    hf.save(
      path / family,
      made,
      params,
      tokenizer=tiny.write_tokenizer(path / 'tokenizer'),
      head=head if family in BERT else None,
    )
    return str(path / family)

  return world, path, model


def draw(seed, folder):
  """Returns the algorithm, config and meshes of a seed."""
  rng, algorithm = np.random.default_rng(seed), ALGORITHMS[seed % len(ALGORITHMS)]
  pick = lambda options: options[rng.integers(len(options))]
  world, path, model = folder
  families = list(DECODERS | T5 | (BERT if algorithm is reward_model else {}))
  while True:
    name = algorithm.__name__.split('.')[-1]
    config = (
      getattr(tiny, name)(world)
      if hasattr(tiny, name)
      else tiny.on_policy(algorithm.config(), world)
    )
    family, meshes = pick(families), [MESHES[i] for i in rng.permutation(len(MESHES))[:3]]
    shards = max(mesh['data'] * mesh['fsdp'] for mesh in meshes)
    config.update_from_flattened_dict(
      {key: pick(options) for key, options in SETTINGS[algorithm].items()}
    )
    config.model.path = config.tokenizer = model(family)
    config.optim.update({'eps': 1e-3, 'learning_rate': 0.01})
    config.batch_size = shards * config.get('sampling', {}).get('samples', 1) * pick((1, 2, 3))
    if family == 't5':
      config.model.unfrozen_layers = None  # which trainable.split_trainable requires
      if algorithm is sft:
        config.data.kind = 'completion'
    if algorithm is sft:
      config.data.path = f'{world}/{"texts" if config.data.kind == "text" else "completions"}.jsonl'
    if algorithm is reward_model:
      config.data.path = {
        'pairwise': f'{path}/rankings.jsonl',
        'pick_best': f'{path}/picks.jsonl',
        'rating': f'{path}/ratings.jsonl',
      }[config.preference.loss]
      config.data.held_out = None
    if 'rl' in config and config.rl.ptx_coef:
      config.ptx.batch_size = shards * config.rl.minibatches
    try:
      for mesh in meshes:
        config.mesh.update(mesh)
        build.validate(config, 8)
    except errors.UserError:
      continue
    if 6 <= config.batch_size <= 24:
      return algorithm, config, meshes


def shake(tree):
  """Returns the tree with noise on every array, drawn by the array's path."""

  def add(path, x):
    rng = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
    moved = np.asarray(x) + 0.2 * rng.standard_normal(x.shape).astype(np.float32)
    return jax.device_put(moved, x.sharding) if isinstance(x, jax.Array) else moved

  return jax.tree_util.tree_map_with_path(add, tree)


def episodes(config, seed):
  """Returns a Rollout of ragged prompts and responses, scores, and pretraining examples or None."""
  rng, batch = np.random.default_rng(seed + 1), config.batch_size
  at, raw = np.arange(P + R)[None], config.rl.response == 'raw'
  ends = P + (np.full(batch, R) if raw else rng.integers(1, R + 1, batch))[:, None]
  mask = (at >= P - rng.integers(1, P + 1, (batch, 1))) & (at < ends)
  tokens = rng.integers(4, tiny.VOCAB, mask.shape)
  tokens[rng.random(mask.shape) < 0.1] = tiny.EOS
  tokens[:, P:][(at == ends - 1)[:, P:] & (rng.random((batch, 1)) < 0.5)] = tiny.EOS
  logprobs = np.where(mask, rng.normal(-4.2, 0.1, mask.shape), 0.0).astype(np.float32)[:, P:]
  rollout = types.Rollout(
    np.where(mask, tokens, tiny.PAD).astype(np.int32), mask, mask[:, P:], logprobs
  )
  scores = rng.normal(size=batch).astype(np.float32)
  count = config.ptx.batch_size
  if not count:
    return rollout, scores, None
  tokens = rng.integers(4, tiny.VOCAB, (count, P + R), dtype=np.int32)
  mask = np.broadcast_to(at < rng.integers(P + 1, P + R + 1, (count, 1)), tokens.shape)
  if config.model.path.endswith('t5'):
    return rollout, scores, types.Pairs(tokens, mask, mask[:, P:])
  return (
    rollout,
    scores,
    types.LMBatch(
      tokens,
      mask.astype(np.int32),
      np.broadcast_to(at, tokens.shape).astype(np.int32),
      mask & (at > 1),
    ),
  )


def on_policy(algorithm, config, mesh, seed):
  """Returns the first state of a run on a mesh, its train step, and () -> its next arguments."""
  tokenizer = setup.load_tokenizer(config)
  base = setup.load_policy(config.model, tokenizer, mesh, config.seed)
  wired = wiring.wire(config, mesh, base, reference=config.rl.kl_coef > 0, steps=10)
  settings = algorithm.Settings.of(config, (tiny.EOS,))
  state = setup.new_state(
    config.seed,
    shake(wired.params),
    wired.optimizers,
    mesh,
    wired.models.policy.rules,
    extra=getattr(algorithm, 'first_extra', wiring.first_extra)(settings),
  )
  step = setup.jit_step(
    algorithm.train_step,
    state,
    models=wired.models,
    optimizers=wired.optimizers,
    settings=settings,
  )
  rollout, scores, ptx = episodes(config, seed)
  batch = (*sharding.put_rows((rollout, scores), mesh), ptx and sharding.put_rows(ptx, mesh))
  return state, step, lambda: (wired.frozen, *batch)


def offline(algorithm, config, mesh):
  """Returns what `on_policy` does, for SFT and reward models, on the batches of their data."""
  learner, state = algorithm.create(config, mesh)
  state = state.replace(params=shake(state.params))
  return state, learner.train_step, lambda: learner.next_batch(state, timed=False)[0]


def train(seed, algorithm, config, shape):
  """Returns the initial parameters, and the state and the metrics after some steps."""
  mesh = sharding.make_mesh(shape, devices=devices.first(8 if shape else 1))
  with jax.set_mesh(mesh):
    state, step, batch = (
      on_policy(algorithm, config, mesh, seed)
      if 'rl' in config
      else offline(algorithm, config, mesh)
    )
    before = jax.device_get(state.params)
    for _ in range(STEPS):
      state, metrics = step(state, *batch())
    return (
      before,
      jax.device_get((state.params, state.opt_state, state.extra)),
      jax.device_get(metrics),
    )


def check(seed, folder):
  """Compares one device with three meshes of eight devices, for one seed."""
  algorithm, config, meshes = draw(seed, folder)
  print(algorithm.__name__, config.to_dict())
  before, expected, metrics = train(seed, algorithm, config, {})
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, expected[0])
  still = [path for path, by in sharding.paths(moved).items() if by == 0]
  assert all(re.search(STILL, path) for path in still), still
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((expected, metrics)))
  for mesh in meshes:
    print(mesh)
    start, found, found_metrics = train(seed, algorithm, config, mesh)
    jax.tree.map(np.testing.assert_array_equal, start, before)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), found, expected
    )
    for name, value in metrics.items():
      if name in ('accuracy', 'ties') and metrics.get('ties'):
        continue  # rounding decides if completions are truncated to the same tokens
      np.testing.assert_allclose(found_metrics[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize('seed', range(8))
def test_eight_devices_are_one(seed, folder):
  """Runs 24 cases, three per seed."""
  check(seed, folder)


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(8, 108))
def test_eight_devices_are_one_at_length(seed, folder):
  """Runs 300 cases."""
  check(seed, folder)
