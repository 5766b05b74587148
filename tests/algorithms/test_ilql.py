"""ILQL: trlX's and LMRL-Gym's own numbers, Sea-Snell's loss by a loop, targets, folders, errors."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import errors
from rlhf_jax import implicit_q
from rlhf_jax import loop
from rlhf_jax import policy as policy_lib
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import build
from rlhf_jax.algorithms import ilql
from rlhf_jax.data import pipelines
from rlhf_jax.data import shapes
import tiny

FOLDER = pathlib.Path(__file__).parents[1] / 'golden'
DEFAULTS = ilql.config().ilql
close = lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def settings(**changes):
  """Settings of the default config, with changes."""
  fields = implicit_q.Settings.__dataclass_fields__
  return implicit_q.Settings(**{name: DEFAULTS[name] for name in fields} | changes)


# trlX.


class Given:
  """A model whose hidden states and logits are given: `params` holds both, [B, T, ...]."""

  encoder_decoder = False

  def forward(self, params, tokens, positions, segments):
    return params['hidden'], None

  def unembed(self, params, hidden):
    return params['logits']


def linear(golden, name):
  """A head of ours from one of torch: Linear, ReLU, Linear."""
  part = lambda layer: {
    'kernel': jnp.asarray(golden[f'{name}.{layer}.weight'].T),
    'bias': jnp.asarray(golden[f'{name}.{layer}.bias']),
  }
  return {'up': part(0), 'down': part(2)}


@pytest.fixture(scope='module')
def trlx():
  return np.load(FOLDER / 'trlx_ilql.npz')


def trlx_episodes(golden):
  """Episodes with trlX's returns; the texts do not matter."""
  return [shapes.Episode(('', ''), (float(x),), 'episode', {}) for x in golden['returns']]


def trlx_batch(golden):
  """The dialogues as Episodes."""
  tokens, outputs = golden['tokens'], golden['outputs']
  rows, length = tokens.shape
  last = np.zeros(outputs.shape, bool)
  ends = outputs.shape[1] - 1 - np.argmax(outputs[:, ::-1], axis=1)
  last[np.arange(rows), ends] = True
  put = lambda x: jnp.pad(jnp.asarray(x)[:, 1:], ((0, 0), (0, 1)))
  return types.Episodes(
    tokens=jnp.asarray(tokens, jnp.int32),
    segments=jnp.ones((rows, length), jnp.int32),
    positions=jnp.tile(jnp.arange(length), (rows, 1)),
    actions=put(tokens.astype(np.int32)),
    mask=put(outputs),
    last=put(last),
    rewards=put(golden['rewards']),
  )


@pytest.mark.parametrize('case', ['default', 'weighted'])
def test_loss_and_gradients_of_trlx(trlx, case):
  """Its dialogues of several turns, standardized rewards, heads and targets."""
  batch = trlx_batch(trlx)
  target = {f'q{i + 1}': linear(trlx, f'heads/target_q_heads.{i}') for i in (0, 1)}
  critic = {f'q{i + 1}': linear(trlx, f'heads/q_heads.{i}') for i in (0, 1)}
  critic['v'] = linear(trlx, 'heads/v_head')
  given = {'hidden': jnp.asarray(trlx['hidden']), 'logits': jnp.asarray(trlx['logits'])}
  chosen = settings(
    gamma=0.9, tau=float(trlx[f'{case}/tau']), awac_beta=float(trlx[f'{case}/beta']), awac_coef=0.5
  )
  actions, tokens = implicit_q.counts(batch)

  def loss(params):
    found = implicit_q.outputs(params, target, {}, batch, model=Given(), settings=chosen)
    return implicit_q.means(implicit_q.loss_sums(found, batch, chosen), actions, tokens, chosen)

  gradients, metrics = jax.jit(jax.grad(loss, has_aux=True))({'policy': given, 'critic': critic})
  names = {
    'loss': 'loss',
    'loss_v': 'v/loss',
    'loss_q': 'q/loss',
    'loss_cql': 'q/cql_loss',
    'loss_awac': 'policy/awac_loss',
  }
  for theirs, ours in names.items():
    close(metrics[ours], trlx[f'{case}/{theirs}'])
  for name in ('hidden', 'logits'):
    close(gradients['policy'][name], trlx[f'{case}/grad/{name}'])
  for name, theirs in (('v', 'v_head'), ('q1', 'q_heads.0'), ('q2', 'q_heads.1')):
    expected = linear(trlx, f'{case}/grad/{theirs}')
    jax.tree.map(close, gradients['critic'][name], expected)


def test_standardized_returns_of_trlx(trlx):
  mean, std = ilql.return_moments(trlx_episodes(trlx))
  close((trlx['returns'] - mean) / std, trlx['rewards'].sum(axis=1))


# LMRL-Gym.


def test_loss_and_gradients_of_lmrl_gym():
  golden = np.load(FOLDER / 'lmrl_gym.npz')
  mask = golden['mask']
  last = mask & (np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)
  zeros = np.zeros(mask.shape, np.int32)
  batch = types.Episodes(
    zeros, zeros + 1, zeros, golden['tokens'].astype(np.int32), mask, last, golden['rewards']
  )
  batch = jax.tree.map(jnp.asarray, batch)
  gamma, tau, cql_coef = map(float, golden['settings'])
  chosen = settings(gamma=gamma, tau=tau, cql_coef=cql_coef, awac_coef=0.0, td_coef=0.5)

  def loss(v, *q_logits):
    pick = lambda x: jnp.take_along_axis(x, batch.actions[..., None], axis=2)[..., 0]
    q = tuple(map(pick, q_logits))
    cql = tuple(jax.nn.logsumexp(x, axis=2) - pick(x) for x in q_logits)
    target_q = jnp.minimum(golden['target_q1'], golden['target_q2'])
    sums = implicit_q.loss_sums(implicit_q.Outputs(None, v, q, cql, target_q), batch, chosen)
    return implicit_q.means(sums, *implicit_q.counts(batch), chosen)

  inputs = [jnp.asarray(golden[name]) for name in ('v', 'q1_logits', 'q2_logits')]
  gradients, metrics = jax.grad(loss, (0, 1, 2), has_aux=True)(*inputs)
  close(metrics['loss'], golden['loss'])
  close(0.5 * metrics['v/loss'], golden['v_loss'])
  close(0.5 * metrics['q/loss'], golden['q1_loss'] + golden['q2_loss'])
  close(metrics['q/cql_loss'], golden['q1_cql_loss'] + golden['q2_cql_loss'])
  for found, name in zip(gradients, ('v', 'q1_logits', 'q2_logits')):
    close(found, golden[f'grad/{name}'])


# Sea-Snell's.


def test_loss_of_sea_snell_by_loop():
  """PerTokenIQL.get_loss: Q without 1/2, the policy loss divided by all tokens of a sequence."""
  preset = ilql.config('sea_snell').ilql
  chosen = settings(
    cql_coef=preset.cql_coef, awac_mean=preset.awac_mean, awac_beta=0.4, gamma=preset.gamma
  )
  rng = np.random.default_rng(4)
  for _ in range(20):
    rows, length, vocab = 3, 8, 5
    lengths = rng.integers(2, length + 1, rows)
    real = np.arange(length) < lengths[:, None]
    mask = real & (rng.random(real.shape) < 0.6)
    mask[:, 0] = True  # every episode has an action
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    logits, q1, q2 = (normal(rows, length, vocab) for _ in range(3))
    v, target_q, rewards = (normal(rows, length) for _ in range(3))
    actions = rng.integers(0, vocab, real.shape)
    pick = lambda x: np.take_along_axis(x, actions[..., None], axis=2)[..., 0]
    nll = lambda x: np.log(np.exp(x).sum(axis=2)) - pick(x)
    v_loss = q_loss = cql = awac = 0.0
    for row in range(rows):
      own = np.flatnonzero(mask[row])
      for number, t in enumerate(own):
        following = v[row, own[number + 1]] if number + 1 < len(own) else 0.0
        gap = target_q[row, t] - v[row, t]
        v_loss += (chosen.tau if gap >= 0 else 1 - chosen.tau) * gap**2
        for q in (q1, q2):
          q_loss += (rewards[row, t] + chosen.gamma * following - pick(q)[row, t]) ** 2
          cql += nll(q)[row, t]
        awac += np.exp(0.4 * gap) * nll(logits)[row, t]
    count = mask.sum()
    expected = (v_loss + q_loss + 1e-4 * cql) / count + awac / real.sum()
    last = mask & (np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)
    zeros = jnp.zeros(real.shape, jnp.int32)
    batch = types.Episodes(
      zeros, jnp.asarray(real, jnp.int32), zeros, *map(jnp.asarray, (actions, mask, last, rewards))
    )
    found = implicit_q.Outputs(nll(logits), v, (pick(q1), pick(q2)), (nll(q1), nll(q2)), target_q)
    sums = implicit_q.loss_sums(jax.tree.map(jnp.asarray, found), batch, chosen)
    close(implicit_q.means(sums, *implicit_q.counts(batch), chosen)[0], expected)


@pytest.mark.parametrize('pack', [False, True])
def test_copies_that_fill_a_batch_have_no_tokens(pack, world):
  """BOS and 2 words, then 1 to 3 words and the EOS: 4, 5 and 6 predicted tokens."""
  tokenizer = tiny.write_tokenizer(world / 'tokenizer')
  texts = [('w1 w2', tiny.text(i, 1 + i)) for i in range(3)]
  examples = [shapes.Episode(text, (1.0,), 'episode', {}) for text in texts]
  of_data = pipelines.EpisodeSettings(max_length=12, pack=pack)
  for size in (3, 8):
    batches = pipelines.episode_batches(examples, tokenizer, of_data, batch_size=size)
    counts = [implicit_q.counts(jax.tree.map(jnp.asarray, batch)) for batch, _ in batches]
    actions, tokens = np.sum(counts, axis=0)
    assert (actions, tokens) == (2 + 3 + 4, 4 + 5 + 6)


# The run.


@pytest.fixture(scope='module')
def trained(world, tmp_path_factory):
  """(folder of the exported model, four states, metrics of the steps and of the evaluators).

  V and Q have a backbone of their own, and so have the targets, which move after the second step.
  """
  config = tiny.ilql(world, 'sea_snell')
  config.ilql.update({'target_every': 2, 'target_alpha': 0.3})
  config.microbatch_size = 8
  config.evals.sampled = {
    'kind': 'prompts',
    'path': f'{world}/prompts.jsonl',
    'count': 8,
    'sampling': {'max_new_tokens': 4, 'beta': 2.0, 'top_k': 20},
    'reward': {'function': 'tiny:good_words'},
  }
  build.validate(config, 1)
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    learner, state = ilql.create(config, mesh)
    states, history = [jax.tree.map(jnp.copy, state)], []
    for _ in range(3):
      batch, _ = learner.next_batch(state, timed=False)
      state, metrics = learner.train_step(state, *batch)
      states.append(jax.tree.map(jnp.copy, state))
      history.append(jax.device_get(metrics))
    evaluated = loop.evaluate(learner, state, list(learner.evaluators))
    folder = tmp_path_factory.mktemp('ilql') / 'model'
    learner.export(state, folder)
  return folder, states, history, evaluated


def test_targets_follow_the_critic_every_second_step(trained):
  _, states, _, _ = trained
  first, second, third, fourth = (state.extra['target'] for state in states)
  jax.tree.map(np.testing.assert_array_equal, first, second)
  jax.tree.map(np.testing.assert_array_equal, third, fourth)
  critic = states[2].params['critic']
  for name in ('q1', 'q2', 'backbone'):
    expected = jax.tree.map(lambda old, new: 0.7 * old + 0.3 * new, first[name], critic[name])
    jax.tree.map(close, third[name], expected)
  assert not np.array_equal(third['q1']['up']['kernel'], first['q1']['up']['kernel'])


def test_evaluators_and_folders_sample_with_the_q_functions(trained, world):
  folder, states, history, evaluated = trained
  assert all(np.isfinite(value).all() for step in history for value in step.values())
  assert {'held_out/loss', 'held_out/q_loss', 'sampled/score'} <= evaluated.keys()
  assert 'sampled/kl' not in evaluated
  policy = policy_lib.TextPolicy.load(folder)
  target = states[-1].extra['target']
  assert policy.q_functions.keys() == target.keys() == {'q1', 'q2', 'backbone'}
  jax.tree.map(np.testing.assert_array_equal, policy.q_functions, target)
  sample = lambda policy, **beta: policy.sample(['w1', 'w2 w3'], max_new_tokens=5, **beta).responses
  guided = sample(policy, beta=50.0)
  assert sample(policy) != guided
  policy.save(folder.parent / 'copy')
  copy = policy_lib.TextPolicy.load(folder.parent / 'copy', beta=50.0)
  assert sample(copy) == guided
  others = policy_lib.TextPolicy.load(world / 'model')
  with pytest.raises(errors.UserError, match='beta=1.0 needs Q functions'):
    sample(others, beta=1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
  'fields, changes',
  [
    (tiny.T5, {}),
    (tiny.T5, {'ilql.separate_critic': True}),
    (tiny.LLAMA, {'model.lora.targets': (('attention/', 2, 4.0),), 'ilql.pack': True}),
    (tiny.LLAMA, {'model.lora.targets': (('mlp/', 2, 4.0),), 'ilql.target_backbone': True}),
    (tiny.LLAMA, {'model.unfrozen_layers': 1, 'ilql.awac_coef': 0.0, 'microbatch_size': 4}),
    (tiny.LLAMA, {'reward.function': 'test_ilql:words'}),
  ],
  ids=['T5', 'T5, separate', 'LoRA, packed', 'LoRA, targets', 'frozen layers', 'scorer'],
)
def test_with_models_and_settings(fields, changes, world, tmp_path, monkeypatch):
  """It learns, and a folder's policy samples what the evaluator's model would."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  tiny.write_model(tmp_path / 'start', fields)
  config = tiny.ilql(world)
  config.model.path = str(tmp_path / 'start')
  config.update_from_flattened_dict(changes)
  build.validate(config, 1)
  learner, state, history, _ = tiny.train(ilql, config, 8)
  assert history[-1]['q/cql_loss'] < history[0]['q/cql_loss']
  learner.export(state, tmp_path / 'model')
  policy = policy_lib.TextPolicy.load(tmp_path / 'model', beta=3.0)
  samples = policy.sample(['w1', 'w2'], max_new_tokens=4)
  assert np.isfinite(samples.rollout.logprobs).all()
  if 'ilql.awac_coef' in changes:
    before = policy_lib.TextPolicy.load(tmp_path / 'start')
    jax.tree.map(close, policy.params, before.params)


def words(prompts, responses, *, response_tokens, metadata):
  """The number of words of each response."""
  del prompts, response_tokens, metadata
  return [len(response.split()) for response in responses]


def test_errors_name_the_key(world):
  def message(**changes):
    config = tiny.ilql(world)
    config.update_from_flattened_dict(changes)
    with pytest.raises(errors.UserError) as error:
      build.validate(config, 1)
    return str(error.value)

  assert 'config.ilql.tau=1.0 must be in (0, 1)' in message(**{'ilql.tau': 1.0})
  assert 'config.ilql.gamma=-0.1 must be in [0, 1]' in message(**{'ilql.gamma': -0.1})
  assert 'config.ilql.target_every=0 must be positive' in message(**{'ilql.target_every': 0})
  assert "config.ilql.awac_mean='sum' must be one of" in message(**{'ilql.awac_mean': 'sum'})
  assert 'config.optim.ema=0.9 must be None' in message(**{'optim.ema': 0.9})
  assert 'config.reward has keys (on_nan) but no model' in message(**{'reward.on_nan': 'skip'})
  both = {'reward.function': 'test_ilql:words', 'reward.model': 'x'}
  assert 'set exactly one of config.reward.model' in message(**both)
