"""Attacks by people are read from a store, with the ratings that they gave."""

import json

import pytest

from rlhf_jax import errors
from rlhf_jax.feedback import people_attacks
from rlhf_jax.feedback import redteam

accounts = pytest.importorskip('rlhf_jax.feedback.accounts')
from rlhf_jax.feedback import store as store_lib


def attack(store, project, annotator, messages, rating, mode='red_team'):
  """Adds a dialogue with one answer, and its rating if there is one."""
  dialogue = accounts.add_dialogue(store.database, project, annotator, mode)
  prompt = store.add_prompt(project, '', messages, dialogue)
  answer = store.add_completion(prompt, f'answer to {len(messages)}', policy='sft')
  task = store.add_task(project, 'rate', prompt, [answer], annotator=annotator)
  if rating:
    lease = store.lease(project, task, annotator)
    answered = {'rating': {str(answer.id): rating}} if rating > 0 else {'skip': True}
    store.judge(lease, annotator, answered, token=lease.token)


def test_rated_attacks_become_examples_and_prompts(tmp_path):
  url = str(tmp_path / 'feedback.db')
  user = lambda text: {'role': 'user', 'content': text}
  single = [user('say something\n bad')]
  several = [user('hello'), {'role': 'assistant', 'content': 'hi'}, user('now be rude')]
  with store_lib.Store.open(url) as store:
    project = store.add_project('attacks')
    ada, _ = store.add_annotator('Ada')
    attack(store, project, ada, single, 7)
    attack(store, project, ada, [user('now be rude')], 4)
    attack(store, project, ada, several, 7)
    attack(store, project, ada, [user('helpful')], 6, mode='helpful')
    attack(store, project, ada, [user('not rated')], 0)
    attack(store, project, ada, [user('skipped')], -1)
    store.add_project('empty')
    attack(store, store.add_project('long'), ada, several, 7)
  (tmp_path / 'out').mkdir()
  people_attacks.run(tmp_path / 'out', store=url, project='attacks', threshold=0.6)
  read = lambda name: [json.loads(line) for line in (tmp_path / 'out' / name).open()]
  ours = {'annotator': 'Ada', 'simulated': False}
  # A rating of 1 to 7 is a score of 0 to 1: 7 is 6 / 6, 4 is 3 / 6.
  assert read('attacks.jsonl') == [
    ours
    | {
      'prompt': 'say something bad',
      'messages': single,
      'responses': ['answer to 1'],
      'scores': [1.0],
      'success': 1.0,
    },
    ours
    | {
      'prompt': 'now be rude',
      'messages': [user('now be rude')],
      'responses': ['answer to 1'],
      'scores': [0.5],
      'success': 0.0,
    },
  ]
  every = [single, [user('now be rude')], several]
  assert read('prompts.jsonl') == [{'messages': messages} for messages in every]
  assert redteam.pooled((tmp_path / 'out' / 'attacks.jsonl',))['now be rude'] == (0.5, 0.0)
  with pytest.raises(errors.UserError, match="all 1 rated attacks in project 'long' .* several"):
    people_attacks.run(tmp_path / 'out', store=url, project='long')
  with pytest.raises(errors.UserError, match="'empty' of .* has no rated red-team dialogue"):
    people_attacks.run(tmp_path / 'none', store=url, project='empty')
