"""The reliability of annotators: the loss by hand, what is learned, files, and errors."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize
from scipy import stats

from rlhf_jax import errors
from rlhf_jax import loop
from rlhf_jax import losses
from rlhf_jax import models
from rlhf_jax import types
from rlhf_jax.algorithms import reliability
from rlhf_jax.algorithms import reward_model
from rlhf_jax.data import formats
from rlhf_jax.data import pipelines
from rlhf_jax.data import sources
from rlhf_jax.data import tokenizers
from rlhf_jax.evaluation import annotators
from rlhf_jax.evaluation import report
from rlhf_jax.models import heads
from rlhf_jax.models import hf
import tiny


def annotated_config(world):
  config = tiny.reward_model(world)
  config.data.path, config.preference.reliability = f'{world}/annotated.jsonl', True
  return config


def test_a_run_tells_annotators_apart_and_reports_it(world, tmp_path):
  config = annotated_config(world)
  config.data.held_out_path, config.data.held_out = f'{world}/comparisons.jsonl', None
  config.optim.learning_rate = 1e-2
  config.update({'steps': 40, 'log_every': 10, 'checkpoint_every': 20})
  loop.run(config, tmp_path)
  rows = json.loads((tmp_path / 'annotators.json').read_text())['annotators']
  assert [row['annotator'] for row in rows] == ['7', 'ann', 'coin', 'contrary']
  assert [row['comparisons'] for row in rows] == [20, 20, 20, 20]
  seven, ann, coin, contrary = (row['reliability'] for row in rows)
  assert min(seven, ann) > 1.2 > 0.8 > coin > contrary < -0.1
  assert np.mean([row['reliability'] for row in rows]) == pytest.approx(1, abs=1e-5)

  last = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[-1])
  assert last['held_out/accuracy'] > 0.9
  logged = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  final = [r for r in logged if 'reliability/lowest' in r][-1]
  assert final['reliability/lowest'] == pytest.approx(contrary, rel=1e-6)
  assert final['reliability/highest'] == pytest.approx(max(seven, ann), rel=1e-6)
  page = report.of_run(tmp_path, title='run').read_text()
  assert 'Reliability of the annotators' in page and f'<td>{contrary:.2f}</td>' in page

  # The data of a resumed run must have the same annotators.
  other = reliability.Panel(('7', 'ann'), (1, 1))
  with pytest.raises(errors.UserError, match='began with annotators 7, ann, coin, contrary'):
    other.check(tmp_path)

  # So must those of a fork, which starts from the reliabilities of the run.
  two = [row for row in tiny.annotated() if row.get('annotator') in ('ann', 7)]
  tiny.write_jsonl(tmp_path / 'two.jsonl', two)
  for changes, part in (
    ({'data.path': f'{tmp_path}/two.jsonl'}, 'learns the reliability of annotators 7, ann: use'),
    ({'preference.reliability': False}, 'learns no reliability: use'),
  ):
    fork = config.copy_and_resolve_references()
    fork.update_from_flattened_dict(changes)
    with pytest.raises(errors.UserError, match=f'coin, contrary, but --fork {part}'):
      loop.run(fork, tmp_path / 'fork', fork_of=tmp_path)


def test_a_run_that_has_a_model_has_its_reliabilities(world, tmp_path, monkeypatch):
  """A run is finished as soon as it has a model, so one that is killed then writes no more."""
  config = annotated_config(world)
  config.update({'steps': 2, 'checkpoint_every': 2})
  save = hf.save

  def killed(path, *arguments, **more):
    save(path, *arguments, **more)
    raise KeyboardInterrupt

  monkeypatch.setattr(hf, 'save', killed)
  with pytest.raises(KeyboardInterrupt):
    loop.run(config, tmp_path)
  assert loop.run(config, tmp_path) == tmp_path / 'model'
  assert set(annotators.learned(tmp_path)) == {'7', 'ann', 'coin', 'contrary'}


@pytest.mark.parametrize('several', [False, True])
def test_loss_and_gradient_of_a_train_step_by_a_loop(several):
  """Each annotator's beta scales the scores, and the prior counts once among all examples."""
  model = models.create(tiny.LLAMA)
  rng = np.random.default_rng(0)
  head = heads.init_scalar(
    jax.random.key(4), model.width, scale='normal', **({'count': 2} if several else {})
  )
  params = {
    'reward': {'backbone': model.init(jax.random.key(3)), 'head': head},
    'annotators': {'offsets': jnp.array([0.3, -0.9, 0.0])},
  }
  batch = types.Comparisons(
    tokens=rng.integers(4, tiny.VOCAB, (6, 3, 5)).astype(np.int32),
    mask=np.ones((6, 3, 5), bool),
    present=np.arange(3) < np.array([[3], [2], [3], [2], [3], [2]]),
    ranks=np.tile(np.array([0, 1, 1], np.int32), (6, 1)),
    ratings=np.zeros((6, 3), np.float32),
    margin=np.linspace(0, 0.5, 6, dtype=np.float32),
    annotator=np.array([0, 1, 2, -1, 1, 0], np.int32),
  )
  settings = reward_model.Settings(
    loss='pairwise', centering=0.0, label_smoothing=0.0, token_dropout=0.0, examples=20
  )
  steps = {}
  for size in (0, 2):
    train_step = functools.partial(
      reward_model.train_step, model=model, settings=settings, microbatch_size=size
    )
    steps[size] = tiny.one_step(train_step, params, {}, batch)
  for a, b in zip(*(jax.tree.leaves((state.params, metrics)) for state, metrics in steps.values())):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)

  _, _, scores = reward_model.comparison_loss(
    params['reward'], batch, model=model, settings=settings
  )
  scores = np.asarray(scores, float).reshape(6, 3, -1)

  def objective(offsets):
    beta = 1 + offsets - offsets.mean()
    total = 0.5 * np.sum((beta - 1) ** 2) / 20
    for b in range(6):
      own = 1.0 if batch.annotator[b] < 0 else beta[batch.annotator[b]]
      worse = np.flatnonzero(batch.present[b])[1:]
      gaps = own * (scores[b, :1] - scores[b, worse]) - batch.margin[b]
      total += np.mean(np.logaddexp(0, -gaps)) / 6
    return total

  offsets = np.array([0.3, -0.9, 0.0])
  prior = 0.5 * (0.5**2 + 0.7**2 + 0.2**2) / 20  # not part of the metric
  assert steps[0][1]['loss'] == pytest.approx(objective(offsets) - prior, rel=1e-5)
  unit = 1e-5 * np.eye(3)
  gradient = [(objective(offsets + u) - objective(offsets - u)) / 2e-5 for u in unit]
  norm = np.linalg.norm(gradient)
  assert steps[0][1]['annotators/grad_norm'] == pytest.approx(norm, rel=1e-3)


def test_without_the_option_the_batches_have_no_annotators(world):
  tokenizer = tokenizers.load(world / 'tokenizer')
  examples, _ = formats.comparisons(sources.read(world / 'annotated.jsonl'))
  assert [e.annotator for e in examples[:5]] == ['ann', '7', 'coin', 'contrary', None]
  sizes = dict(batch_size=5, max_length=12, seed=0)
  iterator, _ = pipelines.comparison_iterator(examples[:5], tokenizer, **sizes)
  assert next(iterator).annotator is None
  named, _ = pipelines.comparison_iterator(
    examples[:5], tokenizer, annotators=('7', 'ann', 'coin', 'contrary'), **sizes
  )
  assert sorted(next(named).annotator.tolist()) == [-1, 0, 1, 2, 3]


def test_errors_say_what_to_do(world):
  config = annotated_config(world)
  config.preference.loss = 'rating'
  with pytest.raises(errors.UserError, match="use 'pairwise' or 'pick_best'"):
    reward_model.validate(config, 1)
  examples = [formats.Comparison('q', ('a', 'b'), (0, 1))]
  with pytest.raises(errors.UserError, match="config.data.columns='annotator=COLUMN'"):
    reliability.find(examples)


def test_scores_and_reliabilities_are_those_of_maximum_likelihood():
  """A table of 12 items, 6 annotators who flip labels, and the optimum of a NumPy loss by SciPy."""
  rng = np.random.default_rng(0)
  flips = np.array([0.02, 0.12, 0.22, 0.32, 0.5, 0.95])
  count, quality = 3000, rng.normal(size=12)
  items = np.array([rng.choice(12, 2, replace=False) for _ in range(count)])
  annotator = np.arange(count) % 6
  gap = quality[items[:, 0]] - quality[items[:, 1]]
  first = (rng.random(count) < 1 / (1 + np.exp(-2 * gap))) ^ (rng.random(count) < flips[annotator])
  ordered = np.where(first[:, None], items, items[:, ::-1])
  ranks, present = np.tile(np.array([0, 1]), (count, 1)), np.ones((count, 2), bool)

  def loss(params):
    beta = losses.reliabilities(params['offsets'], annotator)
    scores = params['scores'][ordered]
    return losses.pairwise_loss(scores, ranks, present, np.zeros(count), reliability=beta)[0].mean()

  def likelihood(x):
    """Scores x[:12], and the betas of all but the last annotator, whose beta makes the mean 1."""
    betas = np.append(x[12:], 6 - x[12:].sum())
    gaps = betas[annotator] * (x[ordered[:, 0]] - x[ordered[:, 1]])
    return np.mean(np.logaddexp(0, -gaps))

  best = optimize.minimize(likelihood, np.append(np.zeros(12), np.ones(5)))
  betas = np.append(best.x[12:], 6 - best.x[12:].sum())
  params = {'scores': jnp.array(best.x[:12]), 'offsets': jnp.array(betas - 1)}
  value, gradients = jax.jit(jax.value_and_grad(loss))(params)
  assert value == pytest.approx(best.fun, rel=1e-5)
  for gradient in jax.tree.leaves(gradients):
    np.testing.assert_allclose(gradient, 0.0, atol=3e-5)
  assert np.argsort(-betas).tolist() == [0, 1, 2, 3, 4, 5]
  assert abs(betas[4]) < 0.5 and betas[5] < -2
  assert stats.spearmanr(best.x[:12], quality).statistic > 0.95
