"""Reports of online RLHF: Elo of rankings and accuracies by hand, and the page of the rounds."""

import json
import math
import os
import re
import signal
import time

import pytest

from rlhf_jax import config_files
from rlhf_jax import pipeline
from rlhf_jax.evaluation import online
from rlhf_jax.evaluation import reward_models
from rlhf_jax.feedback import store as store_lib
import runs

ROUNDS = 2
DEBUG = f'online:debug,rounds={ROUNDS}'


def rank(store, project, prompt, order):
  """Adds a task that ranks the responses of two policies, and an answer: names, best first."""
  completions = [{'text': f'{name} says', 'policy': name} for name in ('sft', 'round_1')]
  row = {'kind': 'rank', 'prompt': prompt, 'completions': completions, 'round': 2}
  (task,) = store.add_tasks(project, [row])
  person = store.annotator(name='ann') or store.add_annotator('ann')[0]
  assignment = store.next_task(project, person)
  assert assignment.task.id == task.id
  ids = {completion.policy: completion.id for completion in task.completions}
  answer = {'ranking': [[ids[name]] for name in order]} if order else {'skip': True}
  store.judge(assignment, person, answer, token=assignment.token)


def calibrated(accuracy):
  return {'accuracy': accuracy, 'accuracy_low': accuracy - 0.1, 'accuracy_high': accuracy + 0.1}


def stage(name, gold, kl):
  return {'stage': name, 'gold': gold, 'gold_se': 0.05, 'kl': kl, 'proxy': gold + 1}


@pytest.fixture
def finished(tmp_path):
  """The results of a round and of one-shot RLHF; those of round 2 are not there yet."""
  for folder, policy, count, gold in (
    ('round_1', 'round_1', 10, 0.5),
    ('one_shot', 'one_shot', 20, 0.75),
  ):
    results = {
      'policy': policy,
      'judgements': count,
      'stages': [stage('sft', -0.25, 0.0), stage(policy, gold, 4.0)],
      'before': None,
    }
    (tmp_path / folder).mkdir()
    (tmp_path / folder / online.RESULTS).write_text(json.dumps(results))
  return tmp_path


def test_the_page_shows_the_finished_rounds(finished):
  reports = 'round_1', 'round_2', 'one_shot'
  online.write_page(finished, reports)
  page = (finished / online.PAGE).read_text()
  assert 'round_1' in page and 'round_2' not in page and '<h2>Elo and accuracy</h2>' not in page
  results = {
    'elo': {'sft': {'elo': 1000.0, 'low': 1000.0, 'high': 1000.0}}
    | {'round_1': {'elo': 1080.0, 'low': 1050.0, 'high': 1110.0}},
    'rankings': 7,
    'accuracy': {'1': {'after': calibrated(0.75), 'one_shot': calibrated(0.5)}},
  }
  found = online.read(finished, reports)
  assert online.table_rows(found, results) == [
    ['sft', '0', '-0.25 ± 0.05', '1000 [1000, 1000]', '0', '0.75', '–', '–'],
    ['round_1', '10', '0.50 ± 0.05', '1080 [1050, 1110]', '4', '1.50', '–', '0.75 [0.65, 0.85]'],
    ['one_shot', '20', '0.75 ± 0.05', '–', '4', '1.75', '–', '–'],
  ]
  online.write_page(finished, reports, results)
  page = (finished / online.PAGE).read_text()
  assert (
    '<h2>Elo and accuracy</h2>' in page
    and 'From 7 rankings.' in page
    and '0.50 [0.40, 0.60]' in page
  )


@pytest.mark.parametrize('rounds', [1, 2, 3, 20])
def test_rounds_and_judgements_have_whole_ticks(rounds, finished):
  accuracy = {str(i): {'after': calibrated(0.75)} for i in range(1, rounds + 1)}
  elo = {'sft': {'elo': 1000.0, 'low': 1000.0, 'high': 1000.0}}
  results = {'elo': elo, 'rankings': 1, 'accuracy': accuracy}
  online.write_page(finished, ('round_1', 'one_shot'), results)
  found = {}
  for svg in re.findall('<svg.*?</svg>', (finished / online.PAGE).read_text(), re.DOTALL):
    texts = re.findall('<text[^>]*>([^<]*)</text>', svg)  # the ticks of x come first, then its name
    for name in {'judgements', 'round'} & set(texts):
      found[name] = texts[: texts.index(name)]
      assert all(re.fullmatch(r'\d+', tick) for tick in found[name]), found
  assert set(found) == {'judgements', 'round'}
  assert found['round'] == [str(i) for i in range(1, rounds + 1)] or rounds == 20


def test_the_page_without_a_gold_score(finished):
  path = finished / 'round_1' / online.RESULTS
  results = json.loads(path.read_text())
  for row in results['stages']:
    del row['gold'], row['gold_se']
  path.write_text(json.dumps(results))
  online.write_page(finished, ('round_1',))
  page = (finished / online.PAGE).read_text()
  assert 'Gold score of the policies' not in page and 'KL from the initial policy' in page


def test_the_last_stage_rates_the_policies_by_hand(finished, world):
  """round_1 beats sft in 3 of 4 rankings; a fifth is skipped.

  With one virtual draw, the odds of round_1 are 3.5 to 1.5, which are 400 log10(7 / 3) points.
  """
  url, folder = str(finished / 'feedback.db'), finished / 'page'
  folder.mkdir()
  with store_lib.Store.open(url) as store:
    project = store.add_project('evaluation')
    for number in range(3):
      rank(store, project, f'w{number}', ('round_1', 'sft'))
    rank(store, project, 'w3', ())
    rank(store, project, 'w4', ('sft', 'round_1'))
    words = [{'text': text, 'policy': 'sft'} for text in ('w1 w2', 'w40 w41')]
    store.add_tasks(project, [{'prompt': 'w9', 'completions': words, 'round': 1}])
    person = store.annotator(name='ann')
    assignment = store.next_task(project, person)
    better = assignment.task.completions[0].id
    store.judge(assignment, person, {'chosen': better}, token=assignment.token)
  model = str(world / 'reward')
  online.run(
    folder,
    workdir=finished,
    store=url,
    project='evaluation',
    rounds=1,
    reward_models=(model,),
    one_shot='',
    reports=('round_1', 'one_shot'),
  )
  results = json.loads((folder / online.RESULTS).read_text())
  elo = results['elo']
  assert elo['sft']['elo'] == 1000 and results['rankings'] == 4
  assert elo['round_1']['elo'] == pytest.approx(1000 + 400 * math.log10(7 / 3), abs=0.01)
  scores = reward_models.RewardModel.load(model).score(['w9', 'w9'], ['w1 w2', 'w40 w41'])
  assert list(results['accuracy']['1']) == ['after']
  assert results['accuracy']['1']['after']['accuracy'] == float(scores[0] > scores[1])
  assert 'From 4 rankings.' in (finished / online.PAGE).read_text()


@pytest.mark.parametrize('arg', ['', 'people', 'one_shot=False,rounds=1', 'debug'])
def test_the_stages_can_run(arg, tmp_path):
  config = config_files.read(config_files.find('online'), arg)
  for name in pipeline.stage_names(config):
    pipeline.check(name, pipeline.resolve(config[name], tmp_path, 0))


def test_one_shot_has_as_many_judgements_and_steps_as_all_rounds():
  config = config_files.read(config_files.find('online'), 'rounds=3')
  rounds = [config[f'collect_{i}'] for i in (1, 2, 3)]
  first, others = rounds[0], config.collect_one_shot
  assert sum(stage['count'] for stage in rounds) == first['count'] + others['count']
  assert config.ppo_one_shot.steps == sum(config[f'ppo_{i}'].steps for i in (1, 2, 3))
  assert [name for name, _ in others.policies] == ['sft']
  block = config.reward_model_one_shot.data.mixture
  weights = {name: source.weight for name, source in block.items()}
  assert weights['others'] / weights['round_1'] == others['count'] / first['count']


KILLED = (  # stage in which the run is killed, and what it has done by then
  ('collect_1', lambda workdir: (workdir / 'collect_1').exists()),
  ('judge_1', lambda workdir: len(judged(workdir)) > 3),
  ('reward_model_1', lambda workdir: runs.lines(workdir / 'reward_model_1') > 2),
  ('ppo_1', lambda workdir: runs.lines(workdir / 'ppo_1') > 2),
  ('round_1', lambda workdir: (workdir / 'round_1').exists()),
  ('judge_2', lambda workdir: (workdir / 'judge_2').exists()),
  ('collect_evaluation', lambda workdir: (workdir / 'collect_evaluation').exists()),
  ('judge_evaluation', lambda workdir: (workdir / 'judge_evaluation').exists()),
  ('page', lambda workdir: (workdir / 'page').exists()),
)


def judged(workdir):
  """Returns the ids of all judgements in the store of a run, and of their tasks."""
  path = workdir / 'feedback.db'
  if not path.exists():
    return []
  with store_lib.Store.open(str(path)) as store:
    found = [store.judgements(project, include_undone=True) for project in store.projects()]
  return sorted((item.id, item.task.id) for items in found for item in items)


@pytest.mark.slow
def test_killed_in_every_kind_of_stage_it_asks_nobody_twice(tmp_path):
  workdir = tmp_path / 'run'
  longer = [
    f'--config.{stage}.{key}={value}'
    for stage in ('reward_model_1', 'ppo_1')
    for key, value in (('steps', 12), ('log_every', 1), ('checkpoint_every', 2))
  ]
  before = []
  for stage, reached in KILLED:
    process = runs.start(DEBUG, workdir, *longer)
    while not reached(workdir):
      assert process.poll() is None, (stage, (tmp_path / 'run.log').read_text())
      time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (workdir / stage / pipeline.DONE).exists(), stage
    assert set(before) <= set(found := judged(workdir))
    before = found
  assert runs.start(DEBUG, workdir, *longer).wait() == 0, (tmp_path / 'run.log').read_text()
  found = judged(workdir)
  assert set(before) <= set(found)
  with store_lib.Store.open(str(workdir / 'feedback.db')) as store:
    tasks = [task.id for project in store.projects() for task in store.tasks(project)]
  assert sorted(task for _, task in found) == sorted(tasks)  # every task once
  assert len(tasks) == len(set(tasks)) > 5 * 12
  assert all((workdir / f'round_{i}' / 'report.html').exists() for i in (1, 2))
  assert 'From ' in (workdir / online.PAGE).read_text()
