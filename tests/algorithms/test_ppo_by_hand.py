"""Complete PPO updates against references_ppo.py, which computes them by hand, for each preset.

Each case is two iterations with rewards, whitening, GAE, both clips, the preset's epochs,
minibatches and Adam, and a step of the KL controller. Prompts and responses are ragged; prompts are
padded with random tokens, responses with the EOS.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import references
import references_ppo
from rlhf_jax import forward
from rlhf_jax import types
from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms import setup

EOS, VOCAB, WIDTH = 2, 7, 3
P, R = 4, 6
PROMPTS = (1, 4, 2, 3, 4, 1, 2, 3)  # lengths; B = 8
RESPONSES = (1, 3, 6, 6, 2, 4, 6, 5)  # the last one has no EOS and is not of full length
ENDED = (True, True, True, False, True, True, True, False)
PTX_LENGTHS = (4, 8, 2, 6, 3, 5, 8, 7)
RATE = 0.02  # learning rate of all presets here, large enough for clipping

# The presets by hand, from the papers and codebases named in rlhf_jax/algorithms.
ADAM = dict(b1=0.9, b2=0.999, eps=1e-8, tensorflow=False)
PRESETS = {
  'openai2019': dict(
    coef=0.15,
    critic='trunk',
    schedule='linear',
    adam=ADAM | dict(eps=1e-5, tensorflow=True),
    temperature=0.7,
    position='last',
    missing='replace',
    missing_value=-1.0,
    whiten_rewards=True,
    whiten_advantages='minibatch',
    behaviour='sampler',
    controller='adaptive',
    target=6.0,
    horizon=10_000,
  ),
  'n_plus': dict(
    coef=0.05,
    critic='separate',
    schedule='linear',
    adam=ADAM | dict(eps=1e-5, decay=0.01),
    temperature=0.7,
    position='after_end',
    missing='replace',
    missing_value=-1.0,
    behaviour='sampler',
  ),
  'trl': dict(
    coef=0.05,
    critic='separate',
    schedule='linear',
    adam=ADAM,
    temperature=0.7,
    position='after_end',
    bessel=True,
    behaviour='sampler',
  ),
  'trlx': dict(
    coef=0.001,
    critic='trunk',
    schedule='constant',
    adam=ADAM | dict(b2=0.95, decay=1e-6),
    vf_coef=1.0,
    minibatches=4,
    clip_scores=10.0,
    whiten_advantages='minibatch',
    bessel=True,
  ),
  'instructgpt': dict(
    coef=0.02,
    critic='separate',
    schedule='warmup',
    adam=ADAM | dict(b2=0.95),
    epochs=1,
    minibatches=8,
    ptx_coef=27.8,
  ),
}
# Settings that no preset uses, added to one: (name, preset, config keys, the same by hand).
VARIANTS = [(name, name, {}, {}) for name in PRESETS] + [
  (
    'dense rewards, full KL, per-token controller',
    'n_plus',
    {'rl.kl_estimator': 'full', 'rl.kl_controller': 'adaptive_per_token', 'rl.kl_target': 0.3},
    dict(estimator='full', controller='adaptive_per_token', target=0.3, dense=True),
  ),
  (
    'KL in the loss, entropy, both other clips, microbatches, a penalty on no EOS',
    'trl',
    {
      'rl.missing_eos': 'subtract',
      'rl.missing_eos_value': 1.0,
      'rl.behaviour': 'forward',
      'rl.kl_in': 'loss',
      'rl.kl_estimator': 'k3',
      'rl.entropy_coef': 0.01,
      'rl.clip_high': 0.28,
      'rl.dual_clip': 1.5,
      'rl.minibatches': 2,
      'microbatch_size': 2,
    },
    dict(
      missing='subtract',
      missing_value=1.0,
      behaviour='forward',
      kl_in='loss',
      estimator='k3',
      entropy_coef=0.01,
      clip_high=0.28,
      dual_clip=1.5,
      minibatches=2,
    ),
  ),
  (
    'running scale, adaptive controller, k2',
    'trlx',
    {
      'rl.scale_scores': True,
      'rl.clip_scores': 1.0,
      'rl.kl_estimator': 'k2',
      'rl.kl_controller': 'adaptive',
      'rl.kl_target': 0.7,
      'rl.kl_horizon': 50.0,
      'rl.minibatches': 2,
    },
    dict(
      scale=True,
      clip_scores=1.0,
      estimator='k2',
      controller='adaptive',
      target=0.7,
      horizon=50,
      minibatches=2,
    ),
  ),
  (
    'no clips, no whitening, abs, discount',
    'instructgpt',
    {
      'optim.warmup_steps': 0,
      'rl.kl_estimator': 'abs',
      'rl.value_clip': 0.0,
      'rl.whiten_advantages': 'none',
      'rl.gamma': 0.9,
      'rl.lam': 0.8,
      'rl.epochs': 2,
      'rl.minibatches': 4,
    },
    dict(
      schedule='constant',
      estimator='abs',
      value_clip=0.0,
      whiten_advantages='none',
      gamma=0.9,
      lam=0.8,
      epochs=2,
      minibatches=4,
    ),
  ),
  (
    'pretraining mixed into epochs of one piece',
    'n_plus',
    {'rl.ptx_coef': 0.5, 'rl.behaviour': 'forward'},
    dict(ptx_coef=0.5, behaviour='forward'),
  ),
]


@dataclasses.dataclass(frozen=True)
class LastToken:
  """A language model that depends on the last token and its position: see references_ppo.py."""

  lora: None = None

  def with_max_length(self, length):
    return self

  def forward(self, params, tokens, positions, segments, cache=None):
    del segments
    return params['token'][tokens] + params['place'][positions], cache

  def response_states(self, params, tokens, mask, response_length, frozen_states=None):
    del frozen_states
    return self.forward(params, tokens, types.positions_from_mask(mask), mask)[0][
      :, -response_length - 1 : -1
    ]

  def unembed(self, params, hidden):
    return hidden @ params['unembed']


def make_params(rng, critic):
  """Returns flat parameters by hand, the reference's, and the package's tree of the former."""
  draw = lambda *shape: rng.normal(0, 0.7, shape).astype(np.float32)
  table = lambda: {'token': draw(VOCAB, WIDTH), 'place': draw(P + R, WIDTH)}
  policy = table() | {'unembed': draw(WIDTH, VOCAB)}
  head = {'kernel': draw(WIDTH), 'bias': draw()}
  backbone = {'backbone': table()} if critic == 'separate' else {}
  reference = {k: v + 0.3 * draw(*v.shape) for k, v in policy.items()}
  return {'policy': policy, 'critic': backbone | {'head': head}}, reference


def flat(params):
  """Returns the package's tree as the flat float64 dict of references_ppo.py."""
  leaves = {f'policy/{k}': v for k, v in params['policy'].items()}
  critic = params['critic'].get('backbone', {}) | params['critic']['head']
  leaves |= {f'critic/{k}': v for k, v in critic.items()}
  return {k: np.asarray(v, np.float64) for k, v in leaves.items()}


def make_episodes(rng, *, raw, dense, params):
  """Returns episodes as lists. Raw responses continue after the EOS."""
  episodes = []
  for n, m, ended in zip(PROMPTS, RESPONSES, ENDED):
    others = [t for t in range(VOCAB) if t != EOS]
    response = [int(t) for t in rng.choice(others, R if raw else m)]
    if ended:
      response[m - 1] = EOS
    length = len(response)
    score = 4 * rng.normal(size=length if dense else ())
    episodes.append(
      dict(
        prompt=[int(t) for t in rng.choice(others, n)],
        response=response,
        ended=ended,
        score=np.float64(np.float32(score)),
      )
    )
    text = episodes[-1]['prompt'] + response
    sampled = [
      references_ppo.distribution(params, text, n + t - 1, 0.7)[text[n + t]] + 0.02 * rng.normal()
      for t in range(length)
    ]
    episodes[-1]['sampled'] = [float(np.float32(x)) for x in sampled]
  return episodes


def make_rollout(rng, episodes):
  """Returns the episodes as a padded Rollout and scores, with garbage after the ends."""
  tokens = rng.integers(0, VOCAB, (len(episodes), P + R)).astype(np.int32)
  tokens[:, P:] = EOS
  mask, logprobs = np.zeros(tokens.shape, bool), np.zeros((len(episodes), R), np.float32)
  dense = np.ndim(episodes[0]['score'])
  scores = np.full((len(episodes), R) if dense else len(episodes), 9.0, np.float32)
  for i, e in enumerate(episodes):
    text, start = e['prompt'] + e['response'], P - len(e['prompt'])
    tokens[i, start : start + len(text)] = text
    mask[i, start : start + len(text)] = True
    logprobs[i, : len(e['sampled'])] = e['sampled']
    scores[(i, slice(0, len(e['response']))) if dense else i] = e['score']
  return types.Rollout(
    tokens=jnp.asarray(tokens),
    mask=jnp.asarray(mask),
    response_mask=jnp.asarray(mask[:, P:]),
    logprobs=jnp.asarray(logprobs),
  ), jnp.asarray(scores)


def make_ptx(rng):
  """Returns pretraining texts as lists and as an LMBatch, right-padded, one text per sequence."""
  texts = [[int(t) for t in rng.integers(0, VOCAB, n)] for n in PTX_LENGTHS]
  tokens = rng.integers(0, VOCAB, (len(texts), P + R)).astype(np.int32)
  real = np.zeros(tokens.shape, bool)
  for i, text in enumerate(texts):
    tokens[i, : len(text)] = text
    real[i, : len(text)] = True
  positions = np.where(real, np.arange(P + R), 0)
  loss_mask = real & (np.arange(P + R) > 0)
  batch = types.LMBatch(
    tokens=tokens, segments=real.astype(np.int32), positions=positions, loss_mask=loss_mask
  )
  return texts, jax.tree.map(jnp.asarray, batch)


def rates(schedule, iterations, updates):
  """Returns the learning rates by hand: each iteration's is repeated `updates` times."""
  for n in range(iterations):
    share = {'constant': 1.0, 'linear': 1 - n / iterations, 'warmup': 0.1 + 0.9 * n / 10}[schedule]
    yield from [RATE * share] * updates


def make_run(preset, keys, iterations):
  """Returns a config, the static arguments of `ppo.train_step` and its optimizers."""
  config = ppo.config(preset)
  config.optim.learning_rate = RATE
  config.update_from_flattened_dict(keys)
  updates = config.rl.epochs * config.rl.minibatches
  optimizer = setup.make_optimizer(config.optim, iterations, updates=updates)
  critic = None if config.critic.kind == 'trunk' else LastToken()
  return config, dict(
    models=forward.Models(LastToken(), critic),
    optimizers={'policy': optimizer, 'critic': optimizer},
    settings=ppo.Settings.of(config, (EOS,)),
  )


def make_state(config, params, optimizers):
  params = jax.tree.map(jnp.asarray, params)
  return types.TrainState(
    step=jnp.int32(0),
    key=jax.random.key(3),
    params=params,
    opt_state={name: optimizers[name].init(params[name]) for name in params},
    extra={'kl_coef': jnp.float32(config.rl.kl_coef), 'reward_moments': jnp.zeros(3)},
  )


def epoch_orders(state, epochs):
  """Returns the orders that the train step will draw: its key, split once per epoch."""
  keys = jax.random.split(types.step_keys(state)[1], epochs)
  return [np.asarray(jax.random.permutation(key, len(PROMPTS))) for key in keys]


@pytest.mark.parametrize(
  'preset, keys, changed', [v[1:] for v in VARIANTS], ids=[v[0] for v in VARIANTS]
)
def test_two_iterations_agree(preset, keys, changed):
  hand = references_ppo.SETTINGS | PRESETS[preset] | changed
  rng = np.random.default_rng(len(preset) + len(keys))
  config, static = make_run(preset, keys, iterations=2)
  params, reference = make_params(rng, hand['critic'])
  state = make_state(config, params, static['optimizers'])
  assert float(state.extra['kl_coef']) == pytest.approx(hand['coef'])
  train_step = jax.jit(functools.partial(ppo.train_step, **static))

  mine, coef = flat(params), hand['coef']
  adam, scale = references.Adam(**hand['adam']), references.RunningScale()
  rate = rates(hand['schedule'], 2, hand['epochs'] * hand['minibatches'])
  seen = []
  for _ in range(2):
    episodes = make_episodes(
      rng, raw=hand['position'] == 'last', dense=hand.get('dense'), params=mine
    )
    texts, ptx = make_ptx(rng) if hand['ptx_coef'] else ((), None)
    orders = epoch_orders(state, hand['epochs'])
    before = mine
    mine, coef, expected = references_ppo.iteration(
      mine,
      {f'policy/{k}': v.astype(np.float64) for k, v in reference.items()},
      episodes,
      coef,
      settings=hand,
      adam=adam,
      rates=rate,
      orders=orders,
      scale=scale,
      ptx=texts,
    )
    state, metrics = train_step(
      state, {'policy': {}, 'reference': reference}, *make_rollout(rng, episodes), ptx
    )
    for name, value in expected.items():
      np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=2e-5, err_msg=name)
    for name, value in flat(state.params).items():
      np.testing.assert_allclose(value, mine[name], rtol=0, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(state.extra['kl_coef'], coef, rtol=1e-6)
    assert np.abs(mine['policy/unembed'] - before['policy/unembed']).max() > RATE / 4
    if hand['behaviour'] == 'forward':
      assert metrics['policy/first_ratio'] == pytest.approx(1.0, abs=1e-6)
    seen.append((expected, orders))
  (first, first_orders), (second, second_orders) = seen
  if hand['epochs'] > 1:  # with one epoch no sequence is seen twice
    assert first['policy/clipfrac'] > 0, 'the policy clip has to bite'
    assert first['value/clipfrac'] > 0 or not hand['value_clip'], 'the value clip has to bite'
  assert (first['objective/kl_coef'] != second['objective/kl_coef']) == (
    hand['controller'] != 'fixed'
  )
  assert not np.array_equal(first_orders, second_orders), 'each step has its own randomness'
