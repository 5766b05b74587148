"""One full PPO update from the same weights and rollout as TRL 1.12's PPOTrainer.

The numbers are in golden/trl_ppo.npz. golden/make_trl_ppo.py wrote them and describes TRL's
conventions. TRL's unmasked metrics are converted here, because ours are always masked.
"""

import functools
import json
import operator
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

from rlhf_jax import forward
from rlhf_jax import optim
from rlhf_jax import types
from rlhf_jax.algorithms import ppo
from rlhf_jax.models import heads
from rlhf_jax.models import hf
import tiny

GOLDEN = np.load(pathlib.Path(__file__).parent / 'golden' / 'trl_ppo.npz')
CASES = [str(name) for name in GOLDEN['cases']]
QUERIES, RESPONSES = GOLDEN['queries'], GOLDEN['responses']
PAD, EOS = (json.loads(str(GOLDEN['config']))[k] for k in ('pad_token_id', 'eos_token_id'))
PER_MINIBATCH = ('pg_loss', 'vf_loss', 'clipfrac', 'vf_clipfrac', 'approxkl', 'ratio')
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def load(prefix, folder, *, reward=False):
  """Loads a Hugging Face folder of the arrays named `prefix/...` with the package."""
  folder.mkdir()
  tensors = {
    name.removeprefix(f'{prefix}/'): GOLDEN[name]
    for name in GOLDEN.files
    if name.startswith(f'{prefix}/')
  }
  save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
  config = 'reward_config' if reward else 'config'
  (folder / 'config.json').write_text(str(GOLDEN[config]))
  return (hf.load_reward if reward else hf.load)(folder)


def settings_of(case):
  """Returns our settings for TRL's, and TRL's own."""
  theirs = json.loads(str(GOLDEN[f'{case}/settings']))
  penalty = theirs['missing_eos_penalty']
  ours = ppo.Settings(
    epochs=theirs['num_ppo_epochs'],
    minibatches=theirs['num_mini_batches'],
    microbatch_size=0,
    length_buckets=1,
    temperature=theirs['temperature'],
    end_tokens=(EOS,),
    end_after=0,
    samples=1,
    max_new_tokens=RESPONSES.shape[1],
    kl_estimator=theirs['kl_estimator'],
    kl_in='reward',
    kl_controller='fixed',
    kl_target=1.0,
    kl_horizon=1.0,
    gamma=theirs['gamma'],
    lam=theirs['lam'],
    clip_low=theirs['cliprange'],
    clip_high=theirs['cliprange'],
    dual_clip=0.0,
    value_clip=theirs['cliprange_value'],
    vf_coef=theirs['vf_coef'],
    entropy_coef=0.0,
    ptx_coef=0.0,
    response='truncated',
    score_position='after_end',
    missing_eos='none' if penalty is None else 'subtract',
    missing_eos_value=penalty or 0.0,
    scale_scores=False,
    clip_scores=0.0,
    whiten_rewards=theirs['whiten_rewards'],
    whiten_advantages='batch',
    whiten_unbiased=True,
    behaviour='forward',
  )
  return ours, theirs


def make_rollout():
  """Returns TRL's queries and responses as a Rollout; no text contains its padding token."""
  tokens = jnp.asarray(np.concatenate([QUERIES, RESPONSES], axis=1))
  mask = tokens != PAD
  return types.Rollout(
    tokens=tokens,
    mask=mask,
    response_mask=mask[:, QUERIES.shape[1] :],
    logprobs=jnp.zeros(RESPONSES.shape),
  )


def make_optimizers(learning_rate):
  """Returns Adam (AdamW without decay); our value head's bias is fixed at 0, theirs has none."""
  make = functools.partial(
    optim.make,
    name='adam',
    learning_rate=learning_rate,
    schedule_kind='constant',
    warmup_steps=0,
    steps=1,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    clip_norm=0.0,
  )
  bias = lambda params: jax.tree_util.tree_map_with_path(
    lambda path, _: jax.tree_util.keystr(path) == "['head']['bias']", params
  )
  return {'policy': make(), 'critic': optax.chain(make(), optax.masked(optax.set_to_zero(), bias))}


@pytest.fixture(name='start', params=CASES)
def start_fixture(request, tmp_path):
  """Returns the case's name and the arguments of `ppo.train_step`."""
  case = request.param
  settings, theirs = settings_of(case)
  policy, policy_params = load('policy', tmp_path / 'policy')
  critic, critic_params = load('value', tmp_path / 'value', reward=True)
  _, reference = load('reference', tmp_path / 'reference')
  params = {'policy': policy_params, 'critic': critic_params}
  optimizers = make_optimizers(theirs['learning_rate'])
  state = types.TrainState(
    step=jnp.int32(0),
    key=jax.random.key(0),
    params=params,
    opt_state={name: optimizers[name].init(params[name]) for name in params},
    extra={'kl_coef': jnp.float32(theirs['kl_coef']), 'reward_moments': jnp.zeros(3)},
  )
  arrays = dict(
    state=state,
    frozen={'policy': {}, 'reference': reference},
    rollout=make_rollout(),
    scores=jnp.asarray(GOLDEN[f'{case}/raw_scores']),
  )
  static = dict(models=forward.Models(policy, critic), settings=settings)
  return case, arrays, static, optimizers


def replay_permutations(monkeypatch, case, state, epochs):
  """Makes epoch e of the train step use TRL's e-th permutation."""
  keys = jax.random.key_data(jax.random.split(types.step_keys(state)[1], epochs))
  orders = jnp.asarray(GOLDEN[f'{case}/permutations'])

  def permutation(key, rows):
    assert rows == orders.shape[1]
    return orders[jnp.argmax(jnp.all(keys == jax.random.key_data(key)[None], axis=1))]

  monkeypatch.setattr(jax.random, 'permutation', permutation)


def assert_same_parameters(case, params, before, folder):
  """Compares the parameters after the update, which change by 4e-3, to 1e-5."""
  _, policy = load(f'{case}/policy_after', folder / 'policy_after')
  _, critic = load(f'{case}/value_after', folder / 'value_after', reward=True)
  expected = {'policy': policy, 'critic': critic}
  moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), expected, before)
  assert max(jax.tree.leaves(moved)) > 1e-3
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), params, expected)


def test_reward_model_scores_agree(tmp_path):
  model, params = load('reward', tmp_path / 'reward', reward=True)
  rollout = make_rollout()
  hidden, _ = model.forward(
    params['backbone'],
    rollout.tokens,
    types.positions_from_mask(rollout.mask),
    rollout.mask.astype(jnp.int32),
  )
  scores = heads.last_token(heads.apply_scalar(params['head'], hidden), rollout.mask)
  for case in CASES:
    close(scores, GOLDEN[f'{case}/raw_scores'])


def test_experience_agrees(start):
  case, arrays, static, _ = start
  experience, _, metrics = jax.jit(functools.partial(tiny.experience, **static))(**arrays)
  golden = lambda name: GOLDEN[f'{case}/{name}']
  real, steps = ~golden('padding_mask'), ~golden('padding_mask_p1')
  np.testing.assert_array_equal(experience.response_mask, real)
  np.testing.assert_array_equal(experience.step_mask, steps)
  close(experience.logprobs, np.where(real, golden('logprobs'), 0))
  close(experience.ref_logprobs, np.where(real, golden('ref_logprobs'), 0))
  close(experience.values, golden('values'))
  close(np.where(steps, experience.returns, 0), np.where(steps, golden('returns'), 0))
  close(experience.advantages, golden('advantages'))
  theirs = json.loads(str(golden('metrics')))
  close(metrics['objective/postprocessed_scores'], theirs['objective/scores'])
  if static['settings'].kl_estimator == 'k1':  # ours reports k1 for any penalty
    close(metrics['objective/kl'], theirs['objective/kl'])
    close(metrics['objective/rlhf_reward'], theirs['objective/rlhf_reward'])


def test_every_minibatch_agrees(start, tmp_path):
  case, arrays, static, optimizers = start
  experience, _, _ = jax.jit(functools.partial(tiny.experience, **static))(**arrays)
  state = arrays['state']
  params, opt_state = state.params, state.opt_state

  @jax.jit
  def step(params, opt_state, batch):
    grads, metrics = tiny.gradients(
      params, batch, arrays['frozen'], state.extra['kl_coef'], **static
    )
    return *optim.apply(params, opt_state, grads, optimizers)[:2], metrics

  minibatches = static['settings'].minibatches
  for e, order in enumerate(GOLDEN[f'{case}/permutations']):
    for m, rows in enumerate(order.reshape(minibatches, -1)):
      batch = jax.tree.map(operator.itemgetter(rows), experience)
      params, opt_state, metrics = step(params, opt_state, batch)
      golden = {name: GOLDEN[f'{case}/{name}'][e, m] for name in PER_MINIBATCH}
      close(metrics['policy/loss'], golden['pg_loss'])
      close(metrics['value/loss'], golden['vf_loss'])
      close(metrics['policy/clipfrac'], golden['clipfrac'])
      close(metrics['value/clipfrac'], golden['vf_clipfrac'])
      real = np.mean(batch.response_mask)  # theirs averages over padding, where the ratio is 1
      close(metrics['policy/approxkl'], golden['approxkl'] / real)
      close(metrics['policy/ratio'], (golden['ratio'] - (1 - real)) / real)
  assert_same_parameters(case, params, state.params, tmp_path)


def test_train_step_agrees(start, tmp_path, monkeypatch):
  case, arrays, static, optimizers = start
  state = arrays['state']
  replay_permutations(monkeypatch, case, state, static['settings'].epochs)
  step = jax.jit(functools.partial(ppo.train_step, optimizers=optimizers, ptx=None, **static))
  after, metrics = step(**arrays)
  theirs = json.loads(str(GOLDEN[f'{case}/metrics']))
  close(metrics['policy/loss'], theirs['loss/policy_avg'])
  close(metrics['value/loss'], theirs['loss/value_avg'])
  close(metrics['policy/clipfrac'], theirs['policy/clipfrac_avg'])
  close(metrics['value/clipfrac'], theirs['val/clipfrac_avg'])
  close(metrics['policy/first_ratio'], 1.0)
  assert_same_parameters(case, after.params, state.params, tmp_path)
  assert after.params['critic']['head']['bias'] == 0
