"""Over-optimization: labels by a gold model, best-of-n by loops, runs read back, and the page."""

import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import identity
from rlhf_jax import metrics
from rlhf_jax.evaluation import fits
from rlhf_jax.evaluation import overoptimization
from rlhf_jax.evaluation import reward_models
from rlhf_jax.models import heads
from rlhf_jax.models import hf
from rlhf_jax.rewards import scoring
import tiny


def words(prompt, response):
  """Number of words."""
  del prompt
  return float(len(response.split()))


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def ids_of(text):
  return [4 + int(word[1:]) for word in text.split()]


def score_of(folder):
  """[token ids] -> score of a reward model of the tiny world, one sequence at a time."""
  model, params = hf.load_reward(folder)
  score = jax.jit(functools.partial(scoring.score, model=model))

  def apply(ids):
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(score(params, tokens, np.arange(16)[None] < len(ids)))[0]

  return apply


@pytest.fixture
def sampled(monkeypatch):
  """The Samples that gold models score, which hold the tokens; it grows."""
  kept, score = [], reward_models.RewardModel.score_samples

  def spy(self, samples, tokenizer):
    kept.append(samples)
    return score(self, samples, tokenizer)

  monkeypatch.setattr(reward_models.RewardModel, 'score_samples', spy)
  return kept


def rows_of(samples):
  """The token ids of prompts and responses; sampled special tokens are not in the texts."""
  prompts = ([tiny.BOS] + ids_of(prompt) for prompt in samples.prompts)
  return [prompt + response for prompt, response in zip(prompts, samples.response_tokens)]


@pytest.fixture(scope='module')
def folders(world, tmp_path_factory):
  """A gold model, and a proxy with two heads."""
  folder = tmp_path_factory.mktemp('proxy')
  model, params = hf.load_reward(world / 'reward')
  head = heads.init_scalar(jax.random.key(3), model.width, scale='normal', count=2)
  tokenizer = tiny.write_tokenizer(folder / 'tokenizer')
  hf.save(folder / 'proxy', model, params['backbone'], tokenizer=tokenizer, head=head)
  return str(world / 'reward'), str(folder / 'proxy')


def test_labels_are_the_gold_models_and_flipped_at_random(world, folders, sampled, tmp_path):
  for name, noise in (('exact', 0.0), ('flipped', 0.5)):
    (tmp_path / name).mkdir()
    overoptimization.label(
      tmp_path / name,
      policy=str(world / 'model'),
      prompts=str(world / 'prompts.jsonl'),
      pairs=30,
      subsets=(4, 100),
      held_out=6,
      max_new_tokens=3,
      temperature=1.0,
      gold=folders[0],
      annotator_temperature=0.0,
      label_noise=noise,
      seed=0,
    )
  score, samples = score_of(folders[0]), sampled[0]
  texts = list(zip(samples.prompts, samples.responses))
  gold = {text: score(ids) for text, ids in zip(texts, rows_of(samples)) if texts.count(text) == 1}
  agree = {'exact': [], 'flipped': []}
  for name in agree:
    for record in rows(tmp_path / name / 'comparisons.jsonl'):
      pair = [(record['prompt'], record[key]) for key in ('chosen', 'rejected')]
      if all(text in gold for text in pair):
        agree[name].append(gold[pair[0]] > gold[pair[1]])
  assert len(agree['exact']) > 15 and all(agree['exact'])
  assert 0.15 < np.mean(agree['flipped']) < 0.85
  records = rows(tmp_path / 'exact' / 'comparisons.jsonl')
  assert rows(tmp_path / 'exact' / 'first_4.jsonl') == records[:4]
  assert rows(tmp_path / 'exact' / 'first_100.jsonl') == records


def test_best_of_n_by_loops(world, folders, sampled, tmp_path):
  """The proxy selects by the smaller of its two heads; all subsets of n samples are listed."""
  overoptimization.best_of_n(
    tmp_path,
    policy=str(world / 'model'),
    prompts=str(world / 'prompts.jsonl'),
    count=3,
    samples=5,
    max_new_tokens=3,
    temperature=1.0,
    rewards={'worst': {'model': folders[1], 'ensemble': 'min'}},
    gold=folders[0],
    hidden=f'{__name__}:words',
    seed=1,
  )
  (samples,) = sampled
  curve = json.loads((tmp_path / 'best_of_n.json').read_text())['worst']
  grid = lambda values: np.array(list(values)).reshape(3, 5)
  gold = grid(map(score_of(folders[0]), rows_of(samples)))
  proxy = grid(map(np.min, map(score_of(folders[1]), rows_of(samples))))
  count = grid(len(response.split()) for response in samples.responses)
  for n, point in zip((1, 2, 4, 5), curve, strict=True):
    best = [
      (p, subset[int(np.argmax(proxy[p, list(subset)]))])
      for p in range(3)
      for subset in itertools.combinations(range(5), n)
    ]
    assert point['n'] == n and point['kl'] == pytest.approx(math.log(n) - (n - 1) / n)
    for name, scores in (('proxy', proxy), ('gold', gold), ('hidden', count)):
      expected = np.mean([scores[index] for index in best])
      assert point[name] == pytest.approx(expected, abs=1e-5), (name, n)


@pytest.fixture
def pipeline(folders, tmp_path):
  """A finished best-of-n and two PPO runs of 3 logged steps, one of them with a penalty."""
  curve = [
    {'n': n, 'kl': math.log(n) - (n - 1) / n, 'gold': n**0.5, 'proxy': float(n), 'hidden': 2.0}
    for n in (1, 2, 4, 8)
  ]
  identity.write_json(tmp_path / 'bon' / 'best_of_n.json', {'one': curve})
  for name in ('ppo', 'ppo_penalty'):
    writer = metrics.Writer(tmp_path / name)
    identity.write_json(tmp_path / name / 'config.json', {'sampling': {'max_new_tokens': 3}})
    for step, kl in enumerate((0.5, 1.5, 3.0)):
      writer.write(step, {'objective/kl': jnp.float32(kl)})
      for i in range(4):
        response = tiny.text(step + 5 * i, 1 + i % 3)
        writer.samples(
          step, [{'prompt': tiny.text(i, 2), 'response': response, 'score': 1.0 + step + i}]
        )
    writer.write(9, {'objective/kl': jnp.float32(4.0)})  # no samples
    writer.close()
  return tmp_path


def test_a_run_is_read_back(pipeline, folders):
  gold = reward_models.RewardModel.load(folders[0])
  points = overoptimization.read_run(pipeline / 'ppo', gold, words)
  score = score_of(folders[0])
  assert [point['step'] for point in points] == [0, 1, 2]
  assert [point['kl'] for point in points] == [0.5, 1.5, 3.0]
  assert [point['proxy'] for point in points] == [2.5, 3.5, 4.5]  # mean of i is 1.5
  for step, point in enumerate(points):
    # Of 1 + i % 3 words, those of 3 were cut off at the limit.
    responses = [ids_of(tiny.text(step + 5 * i, 1 + i % 3)) for i in range(4)]
    scores = [
      score([tiny.BOS] + ids_of(tiny.text(i, 2)) + ids + [tiny.EOS] * (len(ids) < 3))
      for i, ids in enumerate(responses)
    ]
    assert point['gold'] == pytest.approx(np.mean(scores), abs=1e-5)
    assert point['hidden'] == (1 + 2 + 3 + 1) / 4


def test_scores_are_relative_and_shifts_by_hand():
  start = {'gold': 1.0, 'proxy': 2.0, 'hidden': -1.0, 'kl': 0.0}
  points = lambda shift: [
    {'kl': d * d, 'gold': 1 + shift + d * (2 - d), 'proxy': 2 + 3 * d, 'hidden': d - 1}
    for d in (0.5, 1.0, 1.5)
  ]
  line = overoptimization.make_line('best_of_n', points(0.0), start)
  assert [point['proxy'] for point in line.points] == [1.5, 3.0, 4.5]
  assert (line.gold.alpha, line.gold.beta, line.gold.peak) == pytest.approx((2, 1, 1))
  assert (line.proxy.alpha, line.proxy.beta) == pytest.approx((3, 0), abs=1e-9)
  assert (line.hidden.alpha, line.hidden.beta) == pytest.approx((1, 0), abs=1e-9)
  above = overoptimization.make_line('best_of_n', points(0.25), start)
  mean, error = overoptimization.shift(above, line)
  assert mean == pytest.approx(0.25) and error == pytest.approx(0, abs=1e-9)


def test_the_page_has_all_figures_and_fits(pipeline, folders, capsys):
  overoptimization.run(
    pipeline / 'page',
    workdir=str(pipeline),
    best_of_n='bon',
    runs={'one': 'ppo', 'more': 'ppo_penalty'},
    penalties={'more': 'one'},
    plots=(('A <figure>', ('one', 'more')),),
    gold=folders[0],
    hidden=f'{__name__}:words',
  )
  results = json.loads((pipeline / 'page' / 'results.json').read_text())
  assert set(results) == {'best of n, one', 'PPO, one', 'PPO, more', 'shifts'}
  assert results['PPO, one']['points'] == results['PPO, more']['points']
  distances = [math.sqrt(math.log(n) - (n - 1) / n) for n in (2, 4, 8)]
  expected = fits.fit('best_of_n', distances, [n**0.5 - 1 for n in (2, 4, 8)])
  assert results['best of n, one']['gold']['beta'] == pytest.approx(expected.beta)
  assert results['best of n, one']['gold']['peak'] == pytest.approx(expected.peak)
  # The same points, so the mean gap is that of the fit's own residuals.
  gaps = [p['gold'] for p in results['PPO, one']['points']]
  fit = results['PPO, one']['gold']
  gaps = [
    gap - d * (fit['alpha'] - fit['beta'] * math.log(d))
    for gap, d in zip(gaps, map(math.sqrt, (0.5, 1.5, 3.0)))
  ]
  assert results['shifts']['more'][0] == pytest.approx(np.mean(gaps), abs=1e-6)
  page = (pipeline / overoptimization.PAGE).read_text()
  assert page.count('<svg') == 3 and 'A &lt;figure&gt;' in page and '<figure>:' not in page
  assert 'Number of words.' in page and f'{expected.beta:.2f}' in page
  assert 'PPO, more' in capsys.readouterr().out
