"""The glossary has every metric that a run writes, and none that no run writes."""

import re

import jax
import pytest

from rlhf_jax import loop
from rlhf_jax import metrics as metrics_lib
from rlhf_jax import sharding
from rlhf_jax.algorithms import build
from rlhf_jax.algorithms import online_dpo
from rlhf_jax.algorithms import reinforce
from rlhf_jax.algorithms import trpo
from rlhf_jax.evaluation import glossary
import tiny


def sft(world, folder):
  """Language modelling with a held-out loss."""
  del folder
  config = tiny.sft(world)
  config.data.held_out = 0.2
  return config


def reward_model(world, folder):
  """Comparisons, some of them held out."""
  del folder
  return tiny.reward_model(world)


def ratings(world, folder):
  """A reward model of ratings."""
  completions = lambda i: [tiny.text(i, 3), tiny.text(i + 1, 2)]
  records = [
    {'prompt': tiny.text(i, 2), 'completions': completions(i), 'ratings': [i % 3, 1]}
    for i in range(48)
  ]
  config = tiny.reward_model(world)
  config.data.path = str(tiny.write_jsonl(folder / 'ratings.jsonl', records))
  config.preference.loss = 'rating'
  return config


def ilql(world, folder):
  """Episodes, some of them held out."""
  del folder
  return tiny.ilql(world)


def ppo(world, folder):
  """All options of PPO that add metrics: pretraining examples, parts, an ensemble, evaluators."""
  del folder
  config = tiny.ppo(world)
  tiny.mix_in_pretraining(config, world)
  config.reward.update({'function': None, 'on_nan': 'skip'})
  config.reward.parts = {
    'good': {'function': 'tiny:good_words'},
    'learned': {'weight': 0.5, 'models': (f'{world}/reward', f'{world}/reward')},
  }
  config.evals = tiny.evals(world)
  config.evals['text']['metrics'] = {'good': {'function': 'tiny:good_words'}}
  return config


def written(config, folder):
  """The names of the metrics that a run of one step writes."""
  config.steps = 1
  loop.run(config, folder)
  return {name for record in metrics_lib.read(folder) for name in record} - {'step'}


def traced(config):
  """The names of the metrics of a train step, which is traced and not run."""
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    learner, state = build.load(config.algorithm).create(config, mesh)
    batch, on_host = learner.next_batch(state, timed=True)
    metrics = jax.eval_shape(learner.train_step, state, *batch)[1]
  return {name for name in metrics | on_host if not name.startswith('samples/')}


def kto(world, folder):
  """KTO on comparisons, some of them held out."""
  del folder
  return tiny.dpo(world, 'kto')


def variants(world):
  """Configs with other models or losses than those of the runs above."""
  trunk, groups, free = tiny.ppo(world), tiny.grpo(world), tiny.grpo(world, 'dapo')
  trunk.critic.kind = 'trunk'
  trunk.rl.kl_estimator = 'full'
  free.rl.minibatches, free.rl.importance_cap = 2, 2.0
  heads = tiny.reward_model(world)
  heads.preference.heads = 2
  heads.data.path, heads.preference.reliability = f'{world}/annotated.jsonl', True
  return {
    'reward model, two heads and annotators': heads,
    'ppo, critic on the trunk': trunk,
    'grpo': groups,
    'grpo, no reference': free,
    'reinforce': tiny.on_policy(reinforce.config(), world),
    'nlpo': tiny.nlpo(world),
    'distillation': tiny.distillation(world),
    'rejection_sampling': tiny.rejection_sampling(world),
    'dpo': tiny.dpo(world, 'rpo'),
    'online_dpo': tiny.on_policy(online_dpo.config(), world),
    'trpo': tiny.on_policy(trpo.config(), world),
  }


@pytest.fixture(scope='module')
def names(world, tmp_path_factory):
  """{run: the names of its metrics}."""
  found = {}
  for make in (sft, reward_model, ratings, ppo, kto, ilql):
    folder = tmp_path_factory.mktemp(make.__name__)
    found[make.__name__] = written(make(world, folder), folder / 'run')
  return found | {run: traced(config) for run, config in variants(world).items()}


def test_every_metric_of_every_run_has_an_entry(names):
  missing = {run: sorted(filter(lambda name: not glossary.find(name), names[run])) for run in names}
  assert missing == {run: [] for run in names}


def test_every_entry_is_of_a_metric_that_some_run_writes(names):
  entries = {glossary.find(name) for found in names.values() for name in found}
  assert [metric.name for metric in glossary.METRICS if metric not in entries] == []


@pytest.mark.parametrize(
  'name, entry',
  [
    ('objective/kl', 'objective/kl'),
    ('loss', 'loss'),
    ('held_out/loss', 'EVAL/loss'),
    ('my evaluator/rate', 'EVAL/rate'),
    ('text/metrics/bleu', 'EVAL/metrics/METRIC'),
    ('value/loss', 'value/loss'),
    ('reward/helpful', 'reward/PART'),
    ('reward/learned/member_1', 'reward/PART'),
    ('reward/grad_norm', 'MODEL/grad_norm'),
    ('critic/param_norm', 'MODEL/param_norm'),
  ],
)
def test_find(name, entry):
  assert glossary.find(name).name == entry


@pytest.mark.parametrize('name', ['objective/kI', 'policy/score', 'mine/count', 'step', ''])
def test_find_nothing(name):
  assert glossary.find(name) is None and glossary.link(name) == ''


def test_links():
  assert glossary.link('objective/kl_se') == 'docs/metrics.md#objective-kl-se'
  assert len({metric.anchor for metric in glossary.METRICS}) == len(glossary.METRICS)


def test_metrics_and_keys_in_the_texts_exist():
  """Names in backticks are metrics, keys of a config, or evaluators."""
  keys = {'loss', 'prompts', 'win_rate', 'text', 'low', 'high', 'member_0', 'failed'}
  keys.add('evals.NAME.metrics')
  for algorithm in build.names():
    config = build.load(algorithm).config().to_dict()
    blocks = {name: block for name, block in config.items() if isinstance(block, dict)}
    keys |= config.keys() | {key for block in blocks.values() for key in block}
    keys |= {f'{name}.{key}' for name, block in blocks.items() for key in block}
  for metric in glossary.METRICS:
    for name in re.findall('`([^`]+)`', ' '.join(metric)):
      key = name.removeprefix('config.').split('=')[0]
      assert key in keys or glossary.find(name), f'{metric.name}: {name}'
