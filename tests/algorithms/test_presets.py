"""PPO's presets against the implementations and the paper that they are named after.

docs/presets.md has the same values with their source lines. The expected numbers here are derived
from those lines: tables of keys, torch's optimizers and schedulers stepped where the reference
steps them, and NumPy loops over padded arrays with the masks of each reference.

Letters: B batch, R response length.
"""

import ast
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import references
from rlhf_jax import experience
from rlhf_jax import forward
from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax import update
from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms import wiring

PAGE = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'presets.md'
ITERATIONS = 12
B, R = 8, 6
LENGTHS = np.array([1, 3, 6, 6, 2, 4, 6, 5])
ENDED = np.array([True, True, True, False, True, True, False, True])
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)

# Settings of all references, or defaults without an effect.
COMMON = {
  'batch_size': 64,
  'optim.name': 'adam',
  'optim.schedule': 'constant',
  'optim.warmup_steps': 0,
  'optim.warmup_from': 0.0,
  'optim.b1': 0.9,
  'optim.b2': 0.999,
  'optim.eps': 1e-8,
  'optim.weight_decay': 0.0,
  'optim.clip_norm': None,
  'optim.ema': None,
  'optim.master_dtype': 'float32',
  'optim.moment_dtype': 'float32',
  'critic.path': None,
  'critic.learning_rate': None,
  'ptx.batch_size': None,
  'sampling.top_k': None,
  'sampling.top_p': 1.0,
  'sampling.samples': 1,
  'rl.epochs': 4,
  'rl.minibatches': 1,
  'rl.length_buckets': 4,
  'rl.kl_in': 'reward',
  'rl.kl_estimator': 'k1',
  'rl.kl_controller': 'fixed',
  'rl.kl_target': 6.0,
  'rl.kl_horizon': 10_000.0,
  'rl.gamma': 1.0,
  'rl.lam': 0.95,
  'rl.clip_low': 0.2,
  'rl.clip_high': 0.2,
  'rl.dual_clip': None,
  'rl.value_clip': 0.2,
  'rl.vf_coef': 0.1,
  'rl.entropy_coef': 0.0,
  'rl.ptx_coef': 0.0,
  'rl.response': 'truncated',
  'rl.missing_eos': 'none',
  'rl.missing_eos_value': -1.0,
  'rl.clip_scores': None,
  'rl.scale_scores': False,
  'rl.behaviour': 'forward',
  'rl.importance_cap': None,
  'rl.whiten_rewards': False,
  'rl.whiten_advantages': 'batch',
  'rl.whiten_unbiased': False,
}
KEYS = {
  'openai2019': COMMON
  | {
    'optim.name': 'tf_adam',
    'optim.learning_rate': 1e-5,
    'optim.schedule': 'linear',
    'optim.eps': 1e-5,
    'critic.kind': 'trunk',
    'sampling.temperature': 0.7,
    'rl.kl_coef': 0.15,
    'rl.kl_controller': 'adaptive',
    'rl.response': 'raw',
    'rl.score_position': 'last',
    'rl.missing_eos': 'replace',
    'rl.behaviour': 'sampler',
    'rl.whiten_rewards': True,
    'rl.whiten_advantages': 'minibatch',
  },
  'n_plus': COMMON
  | {
    'optim.learning_rate': 3e-6,
    'optim.schedule': 'linear',
    'optim.eps': 1e-5,
    'optim.weight_decay': 0.01,
    'critic.kind': 'separate',
    'sampling.temperature': 0.7,
    'rl.kl_coef': 0.05,
    'rl.score_position': 'after_end',
    'rl.missing_eos': 'replace',
    'rl.behaviour': 'sampler',
  },
  'trl': COMMON
  | {
    'optim.learning_rate': 3e-6,
    'optim.schedule': 'linear',
    'critic.kind': 'separate',
    'sampling.temperature': 0.7,
    'rl.kl_coef': 0.05,
    'rl.score_position': 'after_end',
    'rl.behaviour': 'sampler',
    'rl.whiten_unbiased': True,
  },
  'trlx': COMMON
  | {
    'batch_size': 128,
    'optim.learning_rate': 3e-5,
    'optim.b2': 0.95,
    'optim.weight_decay': 1e-6,
    'critic.kind': 'trunk',
    'sampling.temperature': 1.0,
    'rl.minibatches': 4,
    'rl.kl_coef': 0.001,
    'rl.vf_coef': 1.0,
    'rl.score_position': 'eos',
    'rl.clip_scores': 10.0,
    'rl.whiten_advantages': 'minibatch',
    'rl.whiten_unbiased': True,
  },
  'instructgpt': COMMON
  | {
    'batch_size': 512,
    'optim.learning_rate': 8.05e-6,
    'optim.warmup_steps': 10,
    'optim.warmup_from': 0.1,
    'optim.b2': 0.95,
    'optim.ema': 0.992,
    'critic.kind': 'separate',
    'critic.learning_rate': 9e-6,
    'ptx.batch_size': 4096,
    'sampling.temperature': 1.0,
    'rl.epochs': 1,
    'rl.minibatches': 8,
    'rl.kl_coef': 0.02,
    'rl.ptx_coef': 27.8,
    'rl.score_position': 'eos',
  },
}
# The learning rate in the first, seventh and last of 12 iterations; the positions of the score in
# responses of 1, 3 and 6 tokens, with R = 6.
RATES = {
  'openai2019': (1e-5, 5e-6, 1e-5 / 12),
  'n_plus': (3e-6, 1.5e-6, 2.5e-7),
  'trl': (3e-6, 1.5e-6, 2.5e-7),
  'trlx': (3e-5, 3e-5, 3e-5),
  # From a tenth over 10 iterations: 0.1, 0.1 + 0.9 * 6 / 10 = 0.64, 1.
  'instructgpt': (8.05e-7, 5.152e-6, 8.05e-6),
}
PAID = {
  'openai2019': [5, 5, 5],
  'n_plus': [1, 3, 5],
  'trl': [1, 3, 5],
  'trlx': [0, 2, 5],
  'instructgpt': [0, 2, 5],
}


# Optimizers and schedules, by torch.


def theirs(preset, w, gradients):
  """Returns the change of a matrix in each update, with the reference's optimizer and schedule."""
  if preset == 'openai2019':
    return tensorflow_adam(w, gradients)
  torch = pytest.importorskip('torch')
  param = torch.nn.Parameter(torch.tensor(w, dtype=torch.float64))
  adamw = functools.partial(torch.optim.AdamW, [param])
  each_update = False
  if preset == 'n_plus':  # ppo.py:500 and 575-577
    optimizer = adamw(lr=3e-6, eps=1e-5)

    def step(iteration):
      optimizer.param_groups[0]['lr'] = (1 - iteration / ITERATIONS) * 3e-6
  elif preset == 'trl':  # ppo_trainer.py:494-496 and 912, with the defaults of TrainingArguments
    transformers = pytest.importorskip('transformers')
    optimizer = adamw(lr=3e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    schedule = transformers.get_scheduler('linear', optimizer, 0, ITERATIONS)
    step = lambda iteration: iteration and schedule.step()
  elif preset == 'trlx':  # default_configs.py:31-34, accelerate_base_trainer.py:585-587
    optimizer = adamw(lr=3e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-6)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1e12, eta_min=3e-5)
    each_update, step = True, lambda update: update and schedule.step()
  else:  # Ouyang et al., C and C.4
    optimizer = torch.optim.Adam([param], lr=8.05e-6, betas=(0.9, 0.95), eps=1e-8)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10)
    step = lambda iteration: iteration and schedule.step()
  updates, changes = len(gradients) // ITERATIONS, []
  for n, gradient in enumerate(gradients):
    if each_update or n % updates == 0:
      step(n if each_update else n // updates)
    param.grad = torch.tensor(gradient, dtype=torch.float64)
    optimizer.step()
    changes.append(param.detach().numpy() - w)
    with torch.no_grad():
      param.copy_(torch.tensor(w))
  return changes


def tensorflow_adam(w, gradients):
  """Computes tf.train.AdamOptimizer (utils/core.py:627) at a rate of train_policy.py:172-173."""
  adam = references.Adam(b1=0.9, b2=0.999, eps=1e-5, tensorflow=True)
  updates = len(gradients) // ITERATIONS
  return [
    adam.step({'w': w}, {'w': g}, 1e-5 * (1 - n // updates / ITERATIONS))['w'] - w
    for n, g in enumerate(gradients)
  ]


def make_optimizers(config):
  """Returns the optimizers of a run with this config."""
  model = models.create(
    {
      'model_type': 'gpt2',
      'vocab_size': 8,
      'n_layer': 1,
      'n_embd': 4,
      'n_head': 1,
      'n_positions': 8,
    }
  )
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  params = model.init(jax.random.key(0))
  return wiring.wire(config, mesh, (model, params), steps=ITERATIONS).optimizers


def ours(optimizer, w, gradients):
  """Returns the changes of a matrix, and of a scale without decay whose gradient is always 1."""
  params = {'kernel': jnp.asarray(w, jnp.float32), 'scale': jnp.ones(())}

  def step(state, gradient):
    changes, state = optimizer.update({'kernel': gradient, 'scale': jnp.ones(())}, state, params)
    return state, changes

  changes = jax.jit(functools.partial(jax.lax.scan, step))(
    optimizer.init(params), jnp.asarray(gradients, jnp.float32)
  )[1]
  return changes['kernel'], changes['scale']


# Rewards, returns and advantages, by NumPy.


def gae(rewards, values):
  """Computes the loop that lm-human-preferences, N+, TRL and trlX share; gamma 1, lambda 0.95."""
  advantages, last = np.zeros_like(rewards), 0.0
  for t in reversed(range(rewards.shape[1])):
    following = values[:, t + 1] if t < rewards.shape[1] - 1 else 0.0
    last = rewards[:, t] + following - values[:, t] + 0.95 * last
    advantages[:, t] = last
  return advantages, advantages + values


def whiten(x, mask, *, ddof=0, shift_mean=True):
  """Computes (x - mean) / sqrt(var + 1e-8) over a mask."""
  mean, var = x[mask].mean(), x[mask].var(ddof=ddof)
  return (x - mean) / np.sqrt(var + 1e-8) + (0 if shift_mean else mean)


def openai2019(x):
  """Computes train_policy.py:149-154 and 323-338 with all 6 positions real, and 389-390."""
  rewards = -0.15 * (x['sampled'] - x['ref'])
  rewards[:, -1] += np.where(ENDED, x['scores'], -1)
  everything = np.ones((B, R), bool)
  advantages, returns = gae(whiten(rewards, everything, shift_mean=False), x['values'])
  return whiten(advantages, everything), returns


def n_plus(x, *, ddof=0, replace=True):
  """Computes N+ ppo.py:665-704, or TRL ppo_trainer.py:757-798 without a rule on the EOS."""
  slots, last = np.arange(R), LENGTHS - 1  # `sequence_lengths`
  padding, padding_p1 = slots > last[:, None], slots > last[:, None] + 1
  values = np.where(padding_p1, 0, x['values'])
  rewards = -0.05 * np.where(padding, 0, x['sampled'] - x['ref'])
  end = np.where(last + 1 < R, last + 1, last)
  rewards[np.arange(B), end] += np.where(ENDED, x['scores'], -1) if replace else x['scores']
  advantages, returns = gae(rewards, values)
  white = whiten(advantages, ~padding, ddof=ddof)
  return np.where(padding, 0, white), np.where(padding_p1, 0, returns)


def last_token(x, *, coef, ddof, clip, rows):
  """Computes rewards with the score on the last token and masks everywhere, as our presets do."""
  real = np.arange(R) < LENGTHS[:, None]
  rewards = np.where(real, -coef * (x['logprobs'] - x['ref']), 0)
  rewards[np.arange(B), LENGTHS - 1] += np.clip(x['scores'], -clip, clip)
  advantages, returns = gae(rewards, np.where(real, x['values'], 0))
  parts = [
    whiten(advantages[m : m + rows], real[m : m + rows], ddof=ddof) for m in range(0, B, rows)
  ]
  return np.where(real, np.concatenate(parts), 0), np.where(real, returns, 0)


EXPECTED = {
  'openai2019': openai2019,
  'n_plus': n_plus,
  'trl': functools.partial(n_plus, ddof=1, replace=False),
  'trlx': functools.partial(last_token, coef=0.001, ddof=1, clip=10, rows=B // 4),
  'instructgpt': functools.partial(last_token, coef=0.02, ddof=0, clip=np.inf, rows=B),
}


def make_rollout(lengths, slots, ended=None, logprobs=None):
  """Returns a Rollout of responses with given lengths and no prompts; all have ended by default."""
  mask = np.arange(slots) < np.asarray(lengths)[:, None]
  return types.Rollout(
    tokens=jnp.zeros(mask.shape, jnp.int32),
    mask=jnp.asarray(mask),
    response_mask=jnp.asarray(mask),
    logprobs=jnp.zeros(mask.shape) if logprobs is None else jnp.where(mask, logprobs, 0),
    ended=jnp.ones(len(mask), bool) if ended is None else jnp.asarray(ended),
  )


def prepared(settings, x, preset):
  """Returns the package's advantages, as the loss receives them, and returns."""
  to = lambda name: jnp.asarray(x[name], jnp.float32)
  lengths = np.full(B, R) if preset == 'openai2019' else LENGTHS
  rollout = make_rollout(lengths, R, ENDED, to('sampled'))
  state = types.TrainState(
    0, None, {}, {}, {'kl_coef': jnp.float32(settings.kl_coef), 'reward_moments': jnp.zeros(3)}
  )
  goal = ppo.objective(state, rollout, to('scores'), settings=settings)
  batch, *_ = goal.prepare(
    forward.Outputs(to('logprobs'), to('logprobs'), to('values')),
    forward.Fixed(None, to('ref'), None),
  )
  parts = [
    goal.minibatch(jax.tree.map(lambda a, rows=rows: a[rows], batch))
    for rows in np.arange(B).reshape(settings.minibatches, -1)
  ]
  advantages = np.concatenate([part.advantages for part in parts])
  return advantages, np.where(batch.step_mask, batch.returns, 0)


# Minibatches.


class Record(forward.Forward):
  """A model whose gradient identifies a minibatch's rows, and an optimizer that records them."""

  def __init__(self, steps):
    object.__setattr__(self, 'steps', steps)  # Forward is frozen

  def fixed(self, params, rollout):
    return forward.Fixed(None, None, None)

  def outputs(self, params, batch, frozen_states=None):
    rows = params['policy'][batch.tokens[:, 0]][:, None]
    return forward.Outputs(rows, rows, rows)

  def init(self, params):
    return jnp.int32(0), jnp.zeros((self.steps, B))

  def update(self, gradient, state, params=None):
    return jnp.zeros(B), (state[0] + 1, state[1].at[state[0]].set(gradient))


def rows_of_steps(schedule):
  """Returns the rows of every optimizer step of two iterations, [2 * epochs, minibatches]."""
  steps = schedule.epochs * schedule.minibatches
  record = Record(2 * steps)
  rollout = make_rollout(np.ones(B, int), 1)
  rollout = rollout.replace(tokens=jnp.arange(B, dtype=jnp.int32)[:, None])

  def prepare(outputs, fixed):
    batch = types.Experience(
      tokens=rollout.tokens,
      mask=rollout.mask,
      response_mask=rollout.mask,
      step_mask=rollout.mask,
      logprobs=outputs.logprobs,
      advantages=outputs.logprobs,
    )
    return batch, {}, {}

  goal = update.Objective(
    prepare, rollout.mask, lambda outputs, batch, counts: (jnp.sum(outputs.logprobs), {})
  )
  state = types.TrainState(
    jnp.int32(0), jax.random.key(0), {'policy': jnp.zeros(B)}, {'policy': record.init(None)}, {}
  )
  step = jax.jit(
    lambda state: update.run(
      state,
      rollout,
      forward=record,
      objective=goal,
      optimizers={'policy': optax.GradientTransformation(record.init, record.update)},
      schedule=schedule,
    )[0]
  )
  log = np.asarray(step(step(state)).opt_state['policy'][1])
  return [
    [set(np.flatnonzero(row)) for row in epoch]
    for epoch in log.reshape(2 * schedule.epochs, schedule.minibatches, B)
  ]


# The tests.


def flat(config, prefix=''):
  """Returns {dotted key: value}."""
  found = {}
  for key, value in config.items():
    name = f'{prefix}{key}'
    found |= flat(value, f'{name}.') if hasattr(value, 'items') else {name: value}
  return found


@pytest.mark.parametrize('preset', ppo.PRESETS)
def test_keys(preset):
  found = flat(ppo.config(preset))
  assert {key: found[key] for key in KEYS[preset]} == KEYS[preset]
  shown = [key for key in found if key.startswith(('rl.', 'optim.', 'critic.'))]
  assert not set(shown) - set(KEYS[preset]), 'a key that no reference is asked about'


@pytest.mark.parametrize('preset', ppo.PRESETS)
def test_optimizer_and_learning_rate(preset):
  config, rng = ppo.config(preset), np.random.default_rng(0)
  updates = config.rl.epochs * config.rl.minibatches
  w = rng.normal(size=(2, 3))
  gradients = 10.0 ** rng.uniform(-4, 0, (ITERATIONS * updates, 2, 3)) * rng.choice([-1, 1], (2, 3))
  optimizers = make_optimizers(config)
  changes, scale = ours(optimizers['policy'], w, gradients)
  expected = np.array(theirs(preset, w, gradients))
  np.testing.assert_allclose(changes, expected, rtol=2e-5, atol=1e-5 * np.abs(expected).max())
  # If the gradient is always 1, Adam's step is the learning rate, up to epsilon.
  rates = -np.asarray(scale).reshape(ITERATIONS, updates)
  for iteration, rate in zip((0, 6, 11), RATES[preset]):
    np.testing.assert_allclose(rates[iteration], rate, rtol=1e-3)
  share = {'instructgpt': 9e-6 / 8.05e-6}.get(preset, 1.0)
  np.testing.assert_allclose(ours(optimizers['critic'], w, gradients)[1], scale * share, rtol=1e-6)


@pytest.mark.parametrize('preset', ppo.PRESETS)
def test_rewards_and_whitening(preset):
  config, rng = ppo.config(preset), np.random.default_rng(1)
  settings = ppo.Settings.of(config, ())
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32).astype(np.float64)
  x = {name: draw(B, R) for name in ('sampled', 'logprobs', 'ref', 'values')}
  x['scores'] = 9 * draw(B)
  assert np.abs(x['scores']).max() > 10  # the bound of trlX
  if preset != 'openai2019':  # those without an EOS have the full length
    assert not ENDED[LENGTHS == R].all() and ENDED[LENGTHS < R].all()
  advantages, returns = prepared(settings, x, preset)
  expected = EXPECTED[preset](x)
  close(advantages, expected[0])
  close(returns, expected[1])


@pytest.mark.parametrize('preset', ppo.PRESETS)
def test_the_position_of_the_score(preset):
  rollout = make_rollout([1, 3, 6], 6)
  position = ppo.config(preset).rl.score_position
  rewards = ppo.adv.token_rewards(
    jnp.ones(3), jnp.zeros((3, 6)), 0.1, rollout.response_mask, position=position
  )
  assert np.argmax(rewards, axis=1).tolist() == PAID[preset] and rewards.sum() == 3


def test_trlx_places_the_score_later():
  # accelerate_ppo_trainer.py:471-485, counted from the last token of the prompt: the mask of it and
  # of n tokens, plus one, is where the slice of rewards ends; it has a slot for each token of the
  # longest response.
  def slot(n, longest):
    return len(range(longest)[: (1 + n) + 1]) - 1

  assert [slot(n, 6) for n in (1, 3, 5, 6)] == [2, 4, 5, 5]  # two behind the last token
  mask = make_rollout([1, 3, 5, 6], 6).response_mask
  position = ppo.config('trlx').rl.score_position
  assert ppo.adv.score_index(mask, position).tolist() == [0, 2, 4, 5]  # on it: see docs/presets.md


@pytest.mark.parametrize('preset', ppo.PRESETS)
def test_epochs_and_minibatches(preset):
  # Every reference shuffles in each epoch and takes consecutive blocks of the order.
  config = ppo.config(preset)
  epochs = rows_of_steps(update.Schedule(config.rl.epochs, config.rl.minibatches))
  assert len(epochs) == 2 * KEYS[preset]['rl.epochs']
  for epoch in epochs:
    assert [len(rows) for rows in epoch] == [B // KEYS[preset]['rl.minibatches']] * len(epoch)
    assert set.union(*epoch) == set(range(B))
  if config.rl.minibatches > 1:
    assert all(a != b for i, a in enumerate(epochs) for b in epochs[:i])


def test_trlx_clips_then_updates_the_moments_then_divides():
  # Run through trlX's RunningMoments (utils/modeling.py:275-307) in the order of
  # accelerate_ppo_trainer.py:364-379. By hand, the first batch: (10, -10, 3, -4) has mean -0.25 and
  # squared deviations 225 - 4 / 16 = 224.75, so its deviation is sqrt(224.75 / 3) = 8.6554.
  rules, moments = experience.ScoreRules(scale=True, clip=10.0), jnp.zeros(3)
  for scores, expected in [
    ([12, -20, 3, -4], [1.155343, -1.155343, 0.346603, -0.462137]),
    ([40, 0.5, -1, 2], [1.487249, 0.074362, -0.148725, 0.297450]),
  ]:
    postprocessed, moments = rules.apply(
      jnp.array(scores, jnp.float32), make_rollout([1] * 4, 2), moments
    )
    close(postprocessed, expected)
  # Rewards per token are clipped one by one, and their sums are what the moments are of: the first
  # batch's, of responses of two tokens.
  dense = jnp.array([[12, 0], [-20, 0], [1, 2], [0, -4]], jnp.float32)
  postprocessed, moments = rules.apply(dense, make_rollout([2] * 4, 2), jnp.zeros(3))
  close(jnp.sum(postprocessed, axis=1), [1.155343, -1.155343, 0.346603, -0.462137])


@pytest.mark.parametrize('preset', ppo.PRESETS)
def test_the_page_has_what_the_preset_sets(preset):
  section = re.search(rf'^## `{preset}`\n(.*?)(?=^## |\Z)', PAGE.read_text(), re.M | re.S)[1]
  shown = dict(re.findall(r'`([a-z_]+(?:\.[a-z_0-9]+)*)=([^`]+)`', section))
  found = flat(ppo.config(preset))
  for key, value in shown.items():
    assert found[key] == ast.literal_eval(value), key
  assert not set(ppo.PRESETS[preset]) - set(shown), 'set by the preset, but not on the page'
