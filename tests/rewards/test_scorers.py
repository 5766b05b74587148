"""Weighted sums and ensembles of rewards against NumPy, and in a run of PPO."""

import time

from absl import flags
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np
import pytest

from rlhf_jax import errors
from rlhf_jax import loop
from rlhf_jax import metrics as metrics_lib
from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.data import formats
from rlhf_jax.data import tokenizers
from rlhf_jax.models import heads
from rlhf_jax.models import hf
from rlhf_jax.rewards import host
from rlhf_jax.rewards import scorers
from rlhf_jax.rewards import scoring
import tiny

B, P, R = 5, 3, 4


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh({}, devices=jax.devices()[:1])


@pytest.fixture(scope='module')
def reward_models(world, tmp_path_factory):
  """Returns three folders of reward models with different seeds; the first is the world's."""
  folders = [str(world / 'reward')]
  for seed in (21, 22):
    folders.append(str(tmp_path_factory.mktemp(f'reward_{seed}')))
    model, keys = models.create(tiny.LLAMA), jax.random.split(jax.random.key(seed))
    hf.save(
      folders[-1],
      model,
      model.init(keys[0]),
      tokenizer=tiny.write_tokenizer(folders[-1]),
      head=heads.init_scalar(keys[1], model.width, scale='normal'),
    )
  return folders


def rollout():
  """Returns B random responses of different lengths, and their prompts."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(4, tiny.VOCAB, (B, P + R)).astype(np.int32)
  response_mask = np.arange(R)[None] < np.array([4, 1, 3, 2, 4])[:, None]
  mask = np.concatenate([np.ones((B, P), bool), response_mask], axis=1)
  made = types.Rollout(
    jnp.asarray(np.where(mask, tokens, tiny.PAD)),
    jnp.asarray(mask),
    jnp.asarray(response_mask),
    None,
  )
  return made, [formats.Prompt(tiny.text(i, 2), {'number': i}) for i in range(B)]


def random_scores(count, by_token, seed=1):
  """Returns `count` arrays of scores, with garbage after the ends of responses."""
  shape = (B, R) if by_token else (B,)
  return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def fixed(scores):
  """Returns a Scorer of known scores."""
  return lambda rollout, examples: jnp.asarray(scores)


def total_of(scores, rollout):
  """Computes the total score of each response in a loop."""
  mask = np.asarray(rollout.response_mask)
  return [
    sum(score[t] for t in range(R) if mask[i, t]) if np.ndim(score) else score
    for i, score in enumerate(scores)
  ]


@pytest.mark.parametrize('by_token', [False, True])
def test_weighted_sum(by_token):
  batch, examples = rollout()
  weights, values = {'b': 2.0, 'a': -0.5, 'c': 1.0}, random_scores(3, by_token)
  parts = {name: (weights[name], fixed(value)) for name, value in zip(weights, values)}
  scores = scorers.weighted(parts)(batch, examples)
  assert scores.total.dtype == jnp.float32 and scores.total.shape == values[0].shape
  for index in np.ndindex(values[0].shape):
    expected = sum(weight * value[index] for weight, value in zip(weights.values(), values))
    assert float(scores.total[index]) == pytest.approx(expected, abs=1e-6)
  assert set(scores.parts) == set(weights)
  for (name, weight), value in zip(weights.items(), values):
    np.testing.assert_allclose(
      scores.parts[name], [weight * x for x in total_of(value, batch)], rtol=0, atol=1e-6
    )
  np.testing.assert_allclose(
    sum(scores.parts.values()), total_of(np.asarray(scores.total), batch), rtol=0, atol=1e-5
  )


@pytest.mark.parametrize('by_token', [False, True])
@pytest.mark.parametrize(
  'how, coef', [('mean', 0.7), ('min', 0.7), ('variance', 0.0), ('variance', 0.7)]
)
def test_ensemble(how, coef, by_token):
  batch, examples = rollout()
  values = random_scores(4, by_token)
  scores = scorers.ensemble([fixed(value) for value in values], how, coef=coef)(batch, examples)
  assert scores.total.dtype == jnp.float32 and scores.total.shape == values[0].shape
  for index in np.ndindex(values[0].shape):
    members = [float(value[index]) for value in values]
    mean = sum(members) / 4
    expected = {
      'mean': mean,
      'min': min(members),
      'variance': mean - coef * sum((m - mean) ** 2 for m in members) / 4,
    }[how]
    assert float(scores.total[index]) == pytest.approx(expected, abs=1e-6)
  for i, value in enumerate(values):
    np.testing.assert_allclose(
      scores.parts[f'member_{i}'], total_of(value, batch), rtol=0, atol=1e-6
    )


def test_ensemble_by_hand():
  # Members 1, 2 and 6: mean 3, squared deviations 4, 1, 9, variance 14 / 3. 3 - 0.3 * 14 / 3 = 1.6.
  batch, examples = rollout()
  members = [fixed(np.full(B, value, np.float32)) for value in (1, 2, 6)]
  for how, expected in (('mean', 3.0), ('min', 1.0), ('variance', 1.6)):
    scores = scorers.ensemble(members, how, coef=0.3)(batch, examples)
    np.testing.assert_allclose(scores.total, np.full(B, expected), rtol=1e-6)


def test_parts_of_a_part_keep_their_names():
  batch, examples = rollout()
  one, two, other = random_scores(3, False)
  scores = scorers.weighted(
    {
      'quality': (2.0, scorers.ensemble([fixed(one), fixed(two)], 'min')),
      'length': (1.0, fixed(other)),
    }
  )(batch, examples)
  assert set(scores.parts) == {'quality', 'quality/member_0', 'quality/member_1', 'length'}
  np.testing.assert_allclose(scores.parts['quality'], 2 * np.minimum(one, two), rtol=1e-6)
  np.testing.assert_array_equal(scores.parts['quality/member_1'], two)
  np.testing.assert_allclose(scores.total, 2 * np.minimum(one, two) + other, rtol=1e-6)


@pytest.mark.parametrize('holes', [False, True])
def test_scores_of_responses_are_added_to_the_last_tokens(holes):
  batch, examples = rollout()
  mask = np.array(batch.response_mask)
  if holes:
    mask[0, 1] = False
    batch = batch.replace(response_mask=jnp.asarray(mask))
  response, tokens = random_scores(1, False)[0], random_scores(1, True)[0]
  scores = scorers.weighted({'dense': (2.0, fixed(tokens)), 'sparse': (0.5, fixed(response))})(
    batch, examples
  )
  for i in range(B):
    last = max(t for t in range(R) if mask[i, t])
    for t in range(R):
      expected = 2 * tokens[i, t] + (0.5 * response[i] if t == last else 0)
      assert float(scores.total[i, t]) == pytest.approx(expected, abs=1e-6)
  np.testing.assert_allclose(scores.parts['sparse'], 0.5 * response, rtol=1e-6)
  np.testing.assert_allclose(
    sum(scores.parts.values()), total_of(np.asarray(scores.total), batch), rtol=0, atol=1e-5
  )


def test_an_ensemble_does_not_combine_scores_of_responses_and_of_tokens():
  batch, examples = rollout()
  response, tokens = fixed(random_scores(1, False)[0]), fixed(random_scores(1, True)[0])
  with pytest.raises(errors.UserError, match='member_1 score tokens, but member_0 score responses'):
    scorers.ensemble([response, tokens], 'mean')(batch, examples)


def make(config_reward, world, mesh):
  return scorers.make(
    config_reward, tokenizers.load(world / 'tokenizer'), mesh, load={}, check=lambda model: None
  )


@pytest.mark.parametrize('how', scorers.ENSEMBLES)
def test_an_ensemble_of_reward_models(how, world, reward_models, mesh, compiled):
  reward = scorers.config()
  reward.update({'models': tuple(reward_models), 'ensemble': how, 'ensemble_coef': 0.5})
  scorers.validate(reward)
  batch, examples = rollout()
  with jax.set_mesh(mesh):
    scorer, start = make(reward, world, mesh)
    before = len(compiled)
    found = scorer(batch, examples)
  # Members of the same architecture share one program.
  assert compiled[before:].count('jit(score)') <= 1
  members = []
  for folder in reward_models:
    model, params = hf.load_reward(folder, mesh=mesh)
    score = jax.jit(scoring.score, static_argnames='model')
    members.append(np.asarray(score(params, batch.tokens, batch.mask, model=model)))
  assert np.std(members, axis=0).min() > 1e-3, 'the members differ'
  expected = {
    'mean': np.mean(members, axis=0),
    'min': np.min(members, axis=0),
    'variance': np.mean(members, axis=0) - 0.5 * np.var(members, axis=0),
  }[how]
  np.testing.assert_allclose(found.total, expected, rtol=0, atol=1e-5)
  for i, member in enumerate(members):
    np.testing.assert_allclose(found.parts[f'member_{i}'], member, rtol=0, atol=1e-5)
  # A critic can start from the first member.
  first = hf.load_reward(reward_models[0], mesh=mesh)[1]
  jax.tree.map(np.testing.assert_array_equal, start[1], first)


@pytest.mark.parametrize('how', scorers.ENSEMBLES)
def test_heads_of_one_reward_model(how, world, mesh, tmp_path):
  model = models.create(tiny.LLAMA)
  head = heads.init_scalar(jax.random.key(5), model.width, scale='normal', count=3)
  head['bias'] = jnp.array([0.3, -0.2, 0.1])
  backbone = model.init(jax.random.key(6))
  hf.save(
    tmp_path / 'heads',
    model,
    backbone,
    tokenizer=tiny.write_tokenizer(tmp_path / 'heads'),
    head=head,
  )
  reward = scorers.config()
  reward.update({'model': str(tmp_path / 'heads'), 'ensemble': how, 'ensemble_coef': 0.5})
  batch, examples = rollout()
  with jax.set_mesh(mesh):
    scorer, (_, critic) = make(reward, world, mesh)
    found = scorer(batch, examples)
  summary = jax.jit(model.summary)(backbone, batch.tokens, batch.mask)
  members = np.asarray(summary) @ np.asarray(head['kernel']) + np.asarray(head['bias'])
  assert np.std(members, axis=1).min() > 1e-3, 'the heads differ'
  expected = {
    'mean': np.mean(members, axis=1),
    'min': np.min(members, axis=1),
    'variance': np.mean(members, axis=1) - 0.5 * np.var(members, axis=1),
  }[how]
  np.testing.assert_allclose(found.total, expected, rtol=0, atol=1e-5)
  for i in range(3):
    np.testing.assert_allclose(found.parts[f'head_{i}'], members[:, i], rtol=0, atol=1e-5)
  # A critic starts from the mean of the heads.
  values = np.asarray(summary) @ np.asarray(critic['head']['kernel']) + float(
    critic['head']['bias']
  )
  np.testing.assert_allclose(values, members.mean(axis=1), rtol=0, atol=1e-5)


def test_a_weighted_sum_from_a_config(world, reward_models, mesh):
  reward = scorers.config()
  reward.parts = {
    'good': {'weight': 3.0, 'function': 'tiny:good_words'},
    'learned': {'weight': 0.5, 'models': tuple(reward_models[:2]), 'ensemble': 'min'},
    'plain': {'model': reward_models[2]},
  }  # with weight 1
  scorers.validate(reward)
  batch, examples = rollout()
  with jax.set_mesh(mesh):
    scorer, start = make(reward, world, mesh)
    found = scorer(batch, examples)
  assert start is not None
  alone = {}
  sources = {
    'good': {'function': 'tiny:good_words'},
    'plain': {'model': reward_models[2]},
    'a': {'model': reward_models[0]},
    'b': {'model': reward_models[1]},
  }
  for name, source in sources.items():
    one = scorers.config()
    one.update(source)
    with jax.set_mesh(mesh):
      alone[name] = np.asarray(make(one, world, mesh)[0](batch, examples))
  expected = 3 * alone['good'] + 0.5 * np.minimum(alone['a'], alone['b']) + alone['plain']
  np.testing.assert_allclose(found.total, expected, rtol=0, atol=1e-5)
  assert set(found.parts) == {'good', 'learned', 'learned/member_0', 'learned/member_1', 'plain'}


def test_keys_can_be_changed_on_the_command_line(monkeypatch):
  def parse(parts, *arguments):
    config, values = scorers.config(), flags.FlagValues()
    config.parts = parts
    monkeypatch.setattr('sys.argv', ['main', *arguments])
    holder = config_flags.DEFINE_config_dict('reward', config, flag_values=values)
    values(['main', *arguments])
    return holder.value

  found = parse(
    {'good': {'weight': 1.0, 'function': 'tiny:good_words'}},
    '--reward.parts.good.weight=0.5',
    '--reward.max_length=7',
  )
  assert found.parts.good.to_dict() == {'weight': 0.5, 'function': 'tiny:good_words'}
  assert found.max_length == 7
  for arguments in (["--reward.models=('a', 'b')"], ['--reward.models=a', '--reward.models=b']):
    found = parse({}, *arguments, '--reward.ensemble=min')
    assert (found.models, found.ensemble) == (('a', 'b'), 'min')


def test_arguments_on_the_command_line(monkeypatch):
  config, values = scorers.config(), flags.FlagValues()
  text = "--reward.arguments={'column': 'summary', 'n': 2}"
  monkeypatch.setattr('sys.argv', ['main', text])
  holder = config_flags.DEFINE_config_dict('reward', config, flag_values=values)
  values(['main', text])
  assert holder.value.arguments.to_dict() == {'column': 'summary', 'n': 2}


def scaled(prompts, responses, *, metadata, column, factor=1.0):
  """A number of the record, times a factor."""
  return [factor * entry[column] for entry in metadata]


def test_arguments_of_a_function_and_of_a_part(world, mesh):
  function = f'{__name__}:scaled'
  reward = scorers.config()
  reward.parts = {
    'half': {'function': function, 'arguments': {'column': 'number', 'factor': 0.5}},
    'one': {'weight': 3.0, 'function': function, 'arguments': {'column': 'number'}},
  }
  for key in ('config.reward', 'config.evals.prompts.reward'):
    scorers.validate(reward, key)
  with jax.set_mesh(mesh):
    found = make(reward, world, mesh)[0](*rollout())
  numbers = np.arange(B)
  np.testing.assert_allclose(found.total, 3.5 * numbers, rtol=1e-6)
  np.testing.assert_allclose(found.parts['half'], 0.5 * numbers, rtol=1e-6)


WRONG_ARGUMENTS = {
  'misspelt': ({'colum': 'number'}, r"arguments.colum .*Did you mean 'column'\?"),
  'missing': ({'factor': 2.0}, "missing a required .*argument: 'column'"),
  'of the call': ({'column': 'number', 'metadata': 1}, "sets 'metadata', which every call sets"),
}


@pytest.mark.parametrize('arguments, message', WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_wrong_arguments_name_their_key(arguments, message):
  reward = scorers.config()
  reward.parts = {'a': {'function': f'{__name__}:scaled', 'arguments': arguments}}
  with pytest.raises(errors.UserError, match=r'config.reward.parts.a.*' + message):
    scorers.validate(reward)


def test_a_function_that_cannot_be_loaded_names_its_key(world, mesh):
  reward = scorers.config()
  reward.parts = {'mine': {'function': 'no_such_module:f'}}
  with pytest.raises(
    errors.UserError, match="reward.parts.mine.function='no_such_module:f' cannot"
  ):
    make(reward, world, mesh)


def sleeps(prompts, responses, **_):
  time.sleep(30)


def test_a_function_has_its_time_limit_in_parts_too(world, mesh):
  reward = scorers.config()
  assert reward.timeout == 600
  reward.parts = {'slow': {'function': f'{__name__}:sleeps', 'timeout': 0.2}}
  scorers.validate(reward)
  with jax.set_mesh(mesh):
    scorer, _ = make(reward, world, mesh)
    with pytest.raises(
      errors.UserError,
      match='sleeps did not return within 0.2 seconds, at .*`time.sleep'
      '.*raise config.reward.parts.slow.timeout',
    ):
      scorer(*rollout())
  reward.parts.slow.timeout = None
  scorers.validate(reward)
  reward.parts.slow.timeout = 0.0
  with pytest.raises(
    errors.UserError, match='config.reward.parts.slow.timeout=0.0 must be positive, or None'
  ):
    scorers.validate(reward)


def test_ppo_logs_the_parts_of_its_reward(world, tmp_path):
  config = tiny.ppo(world)
  config.steps, config.samples_every = 3, 3
  config.reward.function = None
  config.reward.parts = {
    'good': {'weight': 2.0, 'function': 'tiny:good_words'},
    'learned': {'weight': 0.25, 'model': f'{world}/reward'},
  }
  config.rl.update({'missing_eos': 'replace', 'missing_eos_value': -5.0})
  loop.run(config, tmp_path)
  records = metrics_lib.read(tmp_path)
  assert len(records) == 3
  for record in records:
    assert record['reward/good'] + record['reward/learned'] == pytest.approx(
      record['objective/scores'], abs=1e-5
    )
    # Hardly any response of six tokens ends by itself.
    assert record['objective/postprocessed_scores'] < record['objective/scores'] - 1
  samples = metrics_lib.read_samples(tmp_path)
  assert len(samples) == config.batch_size
  for sample in samples:
    assert sum(sample['parts'].values()) == pytest.approx(sample['score'], abs=1e-5)
    good = tiny.good_words(
      [sample['prompt']], [sample['response']], response_tokens=None, metadata=[{'number': 0}]
    )
    assert sample['parts']['good'] == pytest.approx(2 * good[0], abs=1e-6)
  assert np.mean([sample['score'] for sample in samples]) == pytest.approx(
    records[-1]['objective/scores'], abs=1e-5
  )
  postprocessed = [sample['postprocessed_score'] for sample in samples]
  assert np.mean(postprocessed) == pytest.approx(
    records[-1]['objective/postprocessed_scores'], abs=1e-5
  )
  assert all(
    sample['postprocessed_score'] in (-5.0, pytest.approx(sample['score'])) for sample in samples
  )
  assert -5.0 in postprocessed


def numbers(prompts, responses, *, response_tokens, metadata):
  """Returns each row's number if all its arguments belong to that row."""
  found = [entry['number'] for entry in metadata]
  assert list(prompts) == [tiny.text(i, 2) for i in found]
  words, tokens = [len(text.split()) for text in responses], list(map(len, response_tokens))
  assert words == tokens == [4, 1, 3, 2, 4]
  return found


def test_a_function_sees_each_rows_own_prompt_response_and_metadata(world, mesh):
  with jax.set_mesh(mesh):
    scorer = host.function_scorer(numbers, tokenizers.load(world / 'tokenizer'), mesh)
    scores = scorer(*rollout())
  np.testing.assert_array_equal(scores, np.arange(B))


def test_a_reward_model_of_another_tokenizer_reads_max_length(world, tmp_path, mesh):
  """BOS, two words of the prompt and four of the first response exceed five tokens."""
  own = tiny.write_tokenizer(tmp_path, words=61)
  model = models.create(tiny.LLAMA | {'vocab_size': tiny.VOCAB + 1})
  hf.save(
    tmp_path,
    model,
    model.init(jax.random.key(0)),
    tokenizer=own,
    head=heads.init_scalar(jax.random.key(1), model.width, scale='normal'),
  )
  reward = scorers.config()
  reward.update({'model': str(tmp_path), 'max_length': 5})
  with jax.set_mesh(mesh):
    scorer, _ = make(reward, world, mesh)
    with pytest.raises(errors.UserError, match='reads 5 tokens, but .* number 0 have 7'):
      scorer(*rollout())
