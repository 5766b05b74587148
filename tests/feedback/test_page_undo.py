"""The annotators' pages after an undo, with dialogues, and with imported judgements."""

import time

import pytest

import labelling
from rlhf_jax.data import sources
from rlhf_jax.feedback import accounts
from rlhf_jax.feedback import transfer


@pytest.fixture
def site(tmp_path):
  """A labelling page with an empty project."""
  made = labelling.Page(tmp_path)
  yield made
  made.store.close()


def turn(site, name):
  """Returns the open lease of a turn of a dialogue."""
  person = site.store.annotator(name)
  dialogue = accounts.add_dialogue(site.store.database, site.project, person, 'red_team')
  messages = [{'role': 'user', 'content': 'Hi'}]
  prompt = site.store.add_prompt(site.project, 'Hi', messages, dialogue)
  both = [site.store.add_completion(prompt, text, policy=text) for text in 'xy']
  task = site.store.add_task(site.project, 'pair', prompt, both, annotator=person)
  return person, site.store.lease(site.project, task, person)


def test_an_undo_that_is_sent_twice_undoes_one(site):
  site.add(count=3)
  browser = site.browser('ann')
  for _ in range(3):
    browser.answer('a1')
  first, second, _ = site.judgements()
  browser.get('/')
  form = dict(browser.fields)
  for _ in range(2):
    assert browser.post('/undo', form).status_code == 303
  assert site.judgements() == [first, second]
  browser.get('/')
  browser.post('/undo')
  assert site.judgements() == [first]


def test_a_form_that_is_sent_again_after_its_undo_is_not_called_saved(site):
  site.add()
  browser = site.browser('ann')
  browser.get('/')
  old = dict(browser.fields)
  browser.post('/judge', {'answer': 'a1'})
  browser.get('/')
  browser.post('/undo')
  response = browser.post('/judge', old | {'answer': 'b2'})
  assert response.status_code == 400 and 'no longer' in response.text
  assert site.judgements() == []
  browser.answer('b2')
  assert [item.answer['strength'] for item in site.judgements()] == [2]


def test_turns_of_a_dialogue_belong_to_the_chat(site):
  """The chat turns a choice of a red-team dialogue round before it is stored."""
  person, lease = turn(site, 'ann')
  browser = site.browser('ann')
  browser.get('/progress')
  assert '0 of 0 judgements of 0 tasks' in browser.page
  form = {'lease': lease.lease_id, 'token': lease.token, 'answer': 'a1'}
  browser.get('/')
  for path in ('/judge', '/skip'):
    assert browser.post(path, form).status_code == 400
  assert site.judgements() == []
  site.store.judge(lease, person, {'tie': True}, token=lease.token)
  assert 'id="undo"' not in browser.get('/').text
  assert '1 of 1 judgements of 1 tasks' in browser.get('/progress').text


def test_imported_judgements_are_not_undone(site, tmp_path):
  path = str(tmp_path / 'pairs.jsonl')
  sources.write(path, [{'prompt': 'q', 'chosen': 'a', 'rejected': 'b', 'annotator': 'ann'}])
  transfer.add_comparisons(site.store, site.project, path)
  browser = site.browser('ann')
  assert 'id="undo"' not in browser.get('/').text
  assert site.store.undo(site.project, site.store.annotator('ann')) is None
  assert len(site.judgements()) == 1


def test_the_time_starts_again_with_the_lease(tmp_path, monkeypatch):
  site = labelling.Page(tmp_path, lease_seconds=600.0)
  site.add()
  now = time.time()
  browser = site.browser('ann')
  browser.get('/')
  monkeypatch.setattr(time, 'time', lambda: now + 30_000)  # the next day
  browser.get('/')
  monkeypatch.setattr(time, 'time', lambda: now + 30_020)
  browser.post('/judge', {'answer': 'a1'})
  [item] = site.judgements()
  site.store.close()
  assert item.seconds == pytest.approx(20, abs=1e-3)
