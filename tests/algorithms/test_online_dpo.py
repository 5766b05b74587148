"""Online DPO: TRL's numbers through its own loss, an update by hand, microbatches, learning."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import references
from rlhf_jax import errors
from rlhf_jax import forward
from rlhf_jax import models
from rlhf_jax import types
from rlhf_jax import update
from rlhf_jax.algorithms import online_dpo
import tiny

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'trl_online_dpo.npz')
CASES = json.loads(str(GOLDEN['settings']))
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
BASE = dict(
  microbatch_size=0,
  temperature=0.7,
  samples=2,
  max_new_tokens=8,
  end_tokens=(tiny.EOS,),
  end_after=0,
)


@pytest.mark.parametrize('name', CASES)
def test_losses_gradients_and_metrics_are_those_of_trl(name):
  case = CASES[name]
  settings = online_dpo.Settings(
    **BASE,
    kl_coef=case['beta'],
    loss=case['loss_type'],
    missing_eos='subtract' if case['missing_eos_penalty'] else 'none',
    missing_eos_value=case['missing_eos_penalty'] or 0.0,
  )
  for step in range(2):
    logprobs = jnp.asarray(GOLDEN[f'{name}/logprobs'][step])
    experience, metrics = prepared(settings, logprobs)
    count = lambda x: jnp.sum(x)
    mask = experience.response_mask
    counts = update.Counts(count(mask), count(mask), count(jnp.any(mask, axis=1)))

    def loss(logprobs):
      outputs = forward.Outputs(logprobs, jnp.zeros_like(logprobs))
      return online_dpo.loss(outputs, experience, counts, settings=settings)

    (value, by_loss), gradient = jax.value_and_grad(loss, has_aux=True)(logprobs)
    close(value, GOLDEN[f'{name}/loss'][step])
    close(gradient, GOLDEN[f'{name}/gradients'][step])
    metrics |= by_loss
    for ours in filter(lambda key: key.startswith(('rewards/', 'logps/')), metrics):
      close(metrics[ours], GOLDEN[f'{name}/{ours}'][step], err_msg=ours)
    close(metrics['objective/postprocessed_scores'], GOLDEN[f'{name}/objective/scores'][step])
    close(metrics['objective/scores_margin'], GOLDEN[f'{name}/objective/scores_margin'][step])
    close(metrics['response/eos_rate'], GOLDEN['ended'].mean())


def test_the_penalty_of_trl_changes_a_preference():
  """Otherwise the golden case with the penalty would not test the ranking."""
  scores, kept = GOLDEN['scores'], np.ones(len(GOLDEN['scores']), bool)
  penalized = scores - CASES['eos']['missing_eos_penalty'] * ~GOLDEN['ended']
  plain, other = (references.best_and_worst(x, 2, kept) for x in (scores, penalized))
  assert plain != other


def prepared(settings, logprobs, scores=None, mask=None):
  """Returns the experience and metrics of the golden responses."""
  mask = GOLDEN['mask'] if mask is None else mask
  rollout = types.Rollout(
    jnp.full(mask.shape, 9), mask, jnp.asarray(mask), jnp.where(mask, logprobs, 0.0)
  ).replace(ended=jnp.asarray(GOLDEN['ended']))
  state = types.TrainState(
    0, None, {}, {}, {'kl_coef': settings.kl_coef, 'reward_moments': jnp.zeros(3)}
  )
  experience, _, metrics = online_dpo.prepare(
    forward.Outputs(logprobs, jnp.ones_like(logprobs)),
    forward.Fixed(None, jnp.asarray(GOLDEN['ref_logprobs']), None),
    state=state,
    rollout=rollout,
    scores=jnp.asarray(GOLDEN['scores'] if scores is None else scores),
    settings=settings,
  )
  return experience, metrics


@pytest.mark.parametrize('n', [2, 4])
def test_equal_scores_and_skipped_responses_are_in_no_pair(n):
  settings = online_dpo.Settings(**BASE | {'samples': n})
  mask, scores = np.array(GOLDEN['mask']), np.array(GOLDEN['scores'])
  scores[:4] = 0.5  # one prompt of four, or two of two, without a preference
  scores[5], mask[5] = np.nan, False  # a response that experience.skip_nan skipped
  experience, metrics = prepared(settings, jnp.asarray(GOLDEN['ref_logprobs']), scores, mask)
  pair = np.array(references.best_and_worst(np.nan_to_num(scores), n, mask.any(1)))
  assert not pair[:4].any() and pair[5] == 0 and pair[4] == (0 if n == 2 else pair[4])
  np.testing.assert_array_equal(experience.response_mask, mask & (pair != 0)[:, None])
  np.testing.assert_array_equal(experience.advantages, mask * pair[:, None])
  groups = len(pair) // n
  assert metrics['groups/equal'] == pytest.approx(1 - np.sum(pair == 1) / groups)


P, R, B = 3, 32, 8
LLAMA = tiny.LLAMA | {'max_position_embeddings': P + R}


def episode():
  """Returns a rollout of ragged responses with holes, its scores, a model and its reference."""
  rng = np.random.default_rng(0)
  lengths = np.array([3, 20, 9, 2, 32, 5, 4, 6])
  mask = np.arange(R) < lengths[:, None]
  holes = mask & ~((rng.random((B, R)) < 0.2) & (np.arange(R) > 0))
  rollout = types.Rollout(
    tokens=jnp.asarray(rng.integers(4, tiny.VOCAB, (B, P + R)), jnp.int32),
    mask=jnp.asarray(np.concatenate([np.ones((B, P), bool), mask], axis=1)),
    response_mask=jnp.asarray(holes),
    logprobs=jnp.zeros((B, R)),
  )
  model = models.create(LLAMA)
  policy = model.init(jax.random.key(1))
  move = lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape)
  scores = jnp.array([1.0, 0.0, 0.3, 0.8, 2.0, 2.0, -1.0, 1.0])  # the third prompt has no pair
  return rollout, scores, model, policy, jax.tree.map(move, policy)


@functools.partial(jax.jit, static_argnums=2)
def pair_loss(params, reference, model, pair, beta):
  """Computes DPO's loss of a pair, the better response first, from logits."""

  def margin(params):
    logits, _ = model.forward(params, pair.tokens, types.positions_from_mask(pair.mask), pair.mask)
    logits = model.unembed(params, logits)[:, P - 1 : -1] / BASE['temperature']
    logprobs = jax.nn.log_softmax(logits)
    total = 0.0
    for sign, row, tokens, mask in zip((1, -1), logprobs, pair.tokens[:, P:], pair.response_mask):
      total += sign * jnp.sum(jnp.where(mask, row[jnp.arange(R), tokens], 0.0))
    return total

  return -jax.nn.log_sigmoid(beta * (margin(params) - margin(reference)))


def test_an_update_in_two_minibatches_is_two_steps_by_hand():
  """Each minibatch has two prompts, in microbatches of one that are cut to 16 or 32 tokens."""
  rollout, scores, model, policy, reference = episode()
  settings = online_dpo.Settings(
    **BASE | {'microbatch_size': 2, 'max_new_tokens': R}, minibatches=2, kl_coef=0.5
  )
  state, metrics = tiny.one_step(
    functools.partial(online_dpo.train_step, models=forward.Models(model), settings=settings),
    {'policy': policy},
    {'policy': {}, 'reference': reference},
    rollout,
    scores,
    None,
  )
  pairs = {0: (0, 1), 1: (3, 2), 3: (7, 6)}  # prompt: (better, worse)
  key = types.step_keys(types.TrainState(jnp.int32(0), jax.random.key(0), {}, {}))[1]
  order = jax.random.permutation(jax.random.split(key, 1)[0], B // 2).reshape(2, -1)
  optimizer = optax.adam(1e-3, eps=1e-3)
  params, opt_state, values = policy, optimizer.init(policy), []
  for prompts in order.tolist():
    gradients = []
    for prompt in filter(pairs.get, prompts):
      pair = jax.tree.map(lambda x: x[jnp.array(pairs[prompt])], rollout)
      value, gradient = jax.value_and_grad(pair_loss)(params, reference, model, pair, 0.5)
      values.append((value, sum(p in pairs for p in prompts)))
      gradients.append(gradient)
    mean = jax.tree.map(lambda *g: sum(g) / len(gradients), *gradients)
    updates, opt_state = optimizer.update(mean, opt_state)
    params = optax.apply_updates(params, updates)
  close(metrics['policy/loss'], sum(value / count for value, count in values) / 2)
  close(metrics['groups/equal'], 0.25)
  jax.tree.map(close, state.params['policy'], params)


def test_it_learns_to_use_good_words(world):
  config = tiny.on_policy(online_dpo.config(), world)
  config.batch_size, config.optim.learning_rate = 64, 0.01
  config.sampling.samples, config.rl.loss = 4, 'ipo'
  _, _, history, _ = tiny.train(online_dpo, config, 20)
  scores = [float(metrics['objective/scores']) for metrics in history]
  assert np.mean(scores[-3:]) > np.mean(scores[:2]) + 0.2, scores
  assert history[-1]['rewards/accuracies'] > 0.5


def test_invalid_settings_are_named(world):
  for values, message in (
    ({'sampling.samples': 1}, 'config.sampling.samples=1 must be at least 2'),
    ({'rl.kl_coef': 0.0}, 'config.rl.kl_coef=0.0 must be positive'),
    ({'rl.loss': 'slic'}, "config.rl.loss='slic'"),
    ({'rl.label_smoothing': 0.5}, 'config.rl.label_smoothing=0.5'),
    ({'microbatch_size': 2, 'sampling.samples': 4}, 'microbatch_size=2'),
    ({'rl.minibatches': 8, 'sampling.samples': 4}, 'batch_size / config.rl.minibatches=2'),
  ):
    config = tiny.on_policy(online_dpo.config(), world)
    config.update_from_flattened_dict(values)
    with pytest.raises(errors.UserError, match=re.escape(message)):
      online_dpo.validate(config, 1)
