"""Policies that share frozen parameters with reference and critic: top layers, adapters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import forward
from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import ppo
from rlhf_jax.models import heads
from rlhf_jax.models import hf
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.models import peft
from rlhf_jax.models import trainable
import tiny

B, P, R, DEPTH = 6, 4, 5, 3
LORA = lora_lib.Lora((('attention/(query|value)$', 2, 4.0), ('mlp/', 3, 3.0)))


def build(tied):
  model = models.create(tiny.LLAMA | {'num_hidden_layers': DEPTH, 'tie_word_embeddings': tied})
  return model, noisy(model.init(jax.random.key(0)), 1)


def noisy(tree, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: x + 0.1 * jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


@pytest.fixture(scope='module')
def settings(world):
  config = tiny.ppo(world)
  config.rl.update({'epochs': 1, 'minibatches': 1, 'entropy_coef': 0.01})
  config.microbatch_size = 3
  return ppo.Settings.of(config, (tiny.EOS,))


def episode():
  """Returns a ragged rollout of random tokens and its scores."""
  rng = np.random.default_rng(3)
  prompt, response = rng.integers(1, P + 1, B), rng.integers(1, R + 1, B)
  place = np.arange(P + R)[None]
  mask = (place >= P - prompt[:, None]) & (place < P + response[:, None])
  tokens = np.where(mask, rng.integers(4, tiny.VOCAB, mask.shape), tiny.PAD)
  rollout = types.Rollout(
    tokens=jnp.asarray(tokens, jnp.int32),
    mask=jnp.asarray(mask),
    response_mask=jnp.asarray(mask[:, P:]),
    logprobs=jnp.where(mask[:, P:], -4.0, 0.0),
  )
  return rollout, jnp.asarray(rng.normal(size=B), jnp.float32)


def update(params, frozen, handles, settings, moves):
  """Returns the experience, the gradients of the one minibatch, and metrics.

  Args:
    moves: Function from the trained parameters to those at which gradients are taken, so that the
      ratio is not 1.
  """
  rollout, scores = episode()
  state = types.TrainState(
    step=jnp.int32(0),
    key=jax.random.key(0),
    params=params,
    opt_state={},
    extra={'kl_coef': jnp.float32(0.2), 'reward_moments': jnp.zeros(3)},
  )

  @jax.jit
  def run(state, frozen):
    experience, _, metrics = tiny.experience(
      state, frozen, rollout, scores, models=handles, settings=settings
    )
    grads, stats = tiny.gradients(
      moves(state.params),
      experience,
      frozen,
      state.extra['kl_coef'],
      models=handles,
      settings=settings,
    )
    return experience, grads, metrics | stats

  return run(state, frozen)


def grown(tree):
  """Returns the parameters of the experience increased by one percent."""
  return jax.tree.map(lambda x: x * 1.01, tree)


def assert_close(found, expected, **tolerance):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), found, expected)


def head(model):
  return heads.init_scalar(jax.random.key(4), model.width, scale='normal')


@pytest.mark.parametrize('top', [0, 1, DEPTH])
@pytest.mark.parametrize('tied', [False, True])
def test_top_layers_agree_with_the_plain_computation(top, tied, settings):
  """Experience, losses and gradients of trained parameters equal those with a single tree."""
  model, params = build(tied)
  whole = jax.tree.map(jnp.copy, params)
  trained, frozen_policy = trainable.split_trainable(model, params, unfrozen_layers=top)
  reference, critic = noisy(trained, 5), {'head': head(model)}
  ours = update(
    {'policy': trained, 'critic': critic},
    {'policy': frozen_policy, 'reference': reference},
    forward.Models(model),
    settings,
    grown,
  )

  theirs = update(
    {'policy': whole, 'critic': critic},
    {'policy': {}, 'reference': trainable.merge_lora(model, reference, frozen_policy)},
    forward.Models(model),
    settings,
    functools.partial(grown_above, top=top),
  )
  for name in ('logprobs', 'ref_logprobs', 'values', 'advantages', 'returns'):
    np.testing.assert_allclose(getattr(ours[0], name), getattr(theirs[0], name), rtol=0, atol=2e-5)
  for name, value in theirs[2].items():
    np.testing.assert_allclose(ours[2][name], value, rtol=1e-4, atol=1e-5, err_msg=name)
  assert_close(ours[1]['critic'], theirs[1]['critic'], rtol=1e-4, atol=1e-6)
  found, expected = sharding.paths(ours[1]['policy']), sharding.paths(theirs[1]['policy'])
  assert len(found) >= 1 + 9 * (top > 0) + (not tied)
  for path, grad in found.items():
    value = expected[path.removeprefix('top/')]
    value = value[DEPTH - top :] if path.startswith('top/') else value
    np.testing.assert_allclose(grad, value, rtol=1e-4, atol=1e-6, err_msg=path)


def grown_above(params, *, top):
  """Applies `grown` to a tree that is not split, without the lower layers and the embedding."""
  policy = params['policy']
  factor = jnp.where(jnp.arange(DEPTH) < DEPTH - top, 1.0, 1.01)
  blocks = jax.tree.map(lambda x: x * factor.reshape(-1, *[1] * (x.ndim - 1)), policy['blocks'])
  after = {name: grown(policy[name]) for name in policy if name in ('norm', 'unembed')}
  return {'policy': policy | after | {'blocks': blocks}, 'critic': grown(params['critic'])}


@pytest.mark.parametrize('top', [None, 1])
def test_gradients_of_adapters_follow_from_those_of_their_kernels(top, settings):
  """W' = W + s A B, so dA = s dW' B^T and dB = s A^T dW'."""
  plain, params = build(tied=True)
  model = dataclasses.replace(plain, lora=LORA)
  adapters, frozen_policy = trainable.split_trainable(model, params, unfrozen_layers=top)
  adapters, critic = noisy(adapters, 6), {'head': head(model)}
  base = trainable.merge_lora(plain, {}, frozen_policy)
  _, grads, metrics = update(
    {'policy': adapters, 'critic': critic},
    {'policy': frozen_policy, 'reference': {}},
    forward.Models(model),
    settings,
    lambda params: params,
  )
  _, expected, theirs = update(
    {'policy': trainable.merge_lora(model, adapters, frozen_policy), 'critic': critic},
    {'policy': {}, 'reference': base},
    forward.Models(plain),
    settings,
    lambda params: params,
  )
  for name, value in theirs.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
  found, kernels = sharding.paths(grads['policy']), sharding.paths(expected['policy'])
  values = sharding.paths(adapters)
  for path in {name.rpartition('/')[0] for name in found}:
    kernel = path.removeprefix('top/').removesuffix('/lora')
    dw = np.asarray(kernels[f'{kernel}/kernel'])[-len(values[f'{path}/a']) :]
    a, b, scale = values[f'{path}/a'], values[f'{path}/b'], LORA.find(kernel)[1]
    np.testing.assert_allclose(
      found[f'{path}/a'], scale * dw @ b.swapaxes(1, 2), rtol=1e-3, atol=1e-6
    )
    np.testing.assert_allclose(
      found[f'{path}/b'], scale * a.swapaxes(1, 2) @ dw, rtol=1e-3, atol=1e-6
    )


def config_of(world, kind):
  config = tiny.ppo(world)
  if 'lora' in kind:
    config.model.lora.targets = (('mlp/', 4, 8.0), ('attention/', 8, 16.0))
  if 'top' in kind:
    config.model.unfrozen_layers = 1
  config.batch_size, config.optim.clip_norm = 64, 1.0
  config.critic.kind = 'adapters' if kind.endswith('adapters') else 'trunk'
  config.optim.learning_rate, config.rl.kl_coef = 0.02, 0.01
  return config


@pytest.mark.parametrize(
  'kind',
  [
    'top',
    'lora adapters',
    pytest.param('lora', marks=pytest.mark.slow),
    pytest.param('top lora adapters', marks=pytest.mark.slow),
  ],
)
def test_it_learns_and_keeps_one_copy(kind, world, tmp_path):
  learner, state, history, _ = tiny.train(ppo, config_of(world, kind), 40)
  assert history[0]['objective/kl'] == pytest.approx(0.0, abs=1e-5)
  assert history[0]['policy/first_ratio'] == pytest.approx(1.0, abs=1e-5)
  scores = [h['objective/scores'] for h in history]
  # With adapters, the logits of this model are bounded by its tied embedding: they reach 0.6.
  assert np.mean(scores[-10:]) > np.mean(scores[:3]) + 0.04
  moments = sharding.paths(state.opt_state['policy'])
  if 'lora' in kind:
    assert all('/lora/' in path for path in sharding.paths(state.params['policy']))
    assert not [path for path in moments if path.endswith(('kernel', 'embedding', 'scale'))]
  if kind.endswith('adapters'):
    assert all('/lora/' in path for path in sharding.paths(state.params['critic']['backbone']))
  if 'top' in kind:
    assert not [path for path in moments if '/blocks/' in path and '/top/' not in path]
  learner.export(state, tmp_path / 'model')
  model, params = hf.load(tmp_path / 'model')
  rollout, _ = episode()
  exported = model.response_states(params, rollout.tokens, rollout.mask, R)
  settings = config_of(world, kind).model
  trained_model, *_ = trainable.set_up(
    *hf.load(world / 'model'), unfrozen_layers=settings.unfrozen_layers, seed=0, **settings.lora
  )
  (frozen, *_), _ = learner.next_batch(state, timed=False)
  trained = trainable.merge(frozen['policy'], state.params['policy'])
  np.testing.assert_allclose(
    exported,
    trained_model.response_states(trained, rollout.tokens, rollout.mask, R),
    rtol=0,
    atol=2e-4,
  )
  if 'lora' in kind:
    lora, adapters = peft.load(tmp_path / 'adapter', model)
    base, base_params = hf.load(world / 'model')
    again = dataclasses.replace(base, lora=lora).response_states(
      trainable.merge(base_params, adapters), rollout.tokens, rollout.mask, R
    )
    np.testing.assert_allclose(
      again, exported, rtol=0, atol=2e-4
    )  # B A added to the weight is rounded differently
  else:
    assert not (tmp_path / 'adapter').exists()
