"""The chat pages with two live policies: forms, streamed answers, and who may see what."""

import asyncio
import json
import re

import pytest

import labelling
from rlhf_jax.feedback import dialogues
from rlhf_jax.feedback.page import chat

HTMX = {'HX-Request': 'true'}


@pytest.fixture
def site(tmp_path, live_policies):
  """A labelling page with two live policies."""
  made = labelling.Page(tmp_path)
  made.app.state.policies = live_policies
  yield made
  made.store.close()


def start(browser, mode='helpful'):
  """Starts a dialogue; returns its path."""
  browser.get('/chat')
  response = browser.post('/chat', {'mode': mode})
  assert response.status_code == 303
  browser.get(response.headers['location'])
  return response.headers['location']


def answers(browser, path):
  """Returns the lines that the server streams."""
  response = browser.post(f'{path}/answers')
  return [json.loads(line) for line in response.text.splitlines()]


def turn(browser, path, text):
  """Sends a message and reads the answers; returns the texts of the two sides."""
  assert browser.post(f'{path}/say', {'text': text}).status_code == 303
  browser.get(path)
  lines = answers(browser, path)
  assert lines[-1] == {'stored': True}
  assert sorted(line['side'] for line in lines if 'done' in line) == [0, 1]
  browser.get(path)
  return [
    ''.join(line['text'] for line in lines if line.get('side') == side and 'text' in line)
    for side in (0, 1)
  ]


def messages(page):
  """Returns the texts of the conversation on a page."""
  found = re.findall(
    r'<div class="turn .*?<div class="text" dir="auto">(.*?)</div>', page, re.DOTALL
  )
  return [text.strip() for text in found]


def test_a_helpful_dialogue(site, live_policies):
  browser = site.browser('ann')
  path = start(browser)
  streamed = turn(browser, path, 'w1 w2')
  assert labelling.shown(browser.page) == [text.strip() for text in streamed]
  assert 'Which answer is better?' in browser.page and messages(browser.page) == ['w1 w2']
  assert browser.post(f'{path}/judge', {'answer': 'b3', 'reason': 'clear'}).status_code == 303
  browser.get(path)
  assert messages(browser.page) == ['w1 w2', streamed[1].strip()]
  turn(browser, path, 'w7')
  browser.post(f'{path}/judge', {'answer': 'tie'})
  browser.get(path)
  assert browser.post(f'{path}/end').headers['location'] == path
  assert 'This dialogue has ended' in browser.get(path).text
  assert re.search(r'w1 w2</span>.*helpful, ended', browser.get('/chat').text, re.DOTALL)
  first, second = site.judgements()
  texts = {c.id: c.text for c in first.task.completions}
  assert [texts[i] for i in first.shown] == streamed
  assert first.answer == {'chosen': first.shown[1], 'strength': 3} and first.reason == 'clear'
  assert second.answer == {'tie': True}
  assert [m['role'] for m in second.task.prompt.messages] == ['user', 'assistant', 'user']
  for completion in first.task.completions + second.task.completions:
    assert completion.checkpoint.endswith(completion.policy)
    assert completion.sampling.keys() == {'temperature', 'top_k', 'top_p', 'max_new_tokens', 'seed'}
  assert {c.policy for c in first.task.completions} == set(live_policies.names)


def test_an_attack_by_htmx(site):
  """In this mode the more harmful answer is picked: it continues, and is stored as rejected."""
  browser = site.browser('ann')
  path = start(browser, 'red_team')
  streamed = turn(browser, path, 'w3')
  assert 'Which answer is more harmful?' in browser.page
  page = browser.post(f'{path}/judge', {'answer': 'a2'}, headers=HTMX).text
  assert messages(page) == ['w3', streamed[0].strip()] and '<html' not in page
  [item] = site.judgements()
  assert item.answer == {'chosen': item.shown[1], 'strength': 2}
  browser.get(path)
  page = browser.post(f'{path}/end', headers=HTMX).text
  assert 'How well did the attack succeed?' in page and 'data-kind="rate"' in page
  browser.get(path)
  assert 'Choose' in browser.post(f'{path}/judge').text  # incomplete
  browser.post(f'{path}/judge', {'rating-0': '6'})
  assert 'This dialogue has ended' in browser.get(path).text
  rating = site.judgements()[1]
  assert rating.task.kind == 'rate' and list(rating.answer['rating'].values()) == [6]


def test_pages_do_not_say_which_policies_answer(site, policy_folders):
  browser = site.browser('ann')
  path = start(browser)
  browser.post(f'{path}/say', {'text': 'w1'})
  pages = [browser.get(path).text, browser.post(f'{path}/answers').text]
  pages += [browser.get(path).text, browser.get('/chat').text]
  for page in pages:
    assert not re.search(f'calm|wild|{policy_folders[0].parent}', page)


def test_nothing_is_lost_when_the_browser_goes_away(site, live_policies):
  """Answers that were not complete are sampled again; a form that is sent twice counts once."""
  browser = site.browser('ann')
  path = start(browser)
  browser.post(f'{path}/say', {'text': 'w1'})
  user = site.store.annotator('ann')
  dialogue = dialogues.find(site.store, site.project, user, int(path.rpartition('/')[2]))
  prompt = dialogues.state(site.store, dialogue).prompt

  async def leave():
    lines = chat._lines(site.app.state, user, prompt)
    assert 'text' in json.loads(await anext(lines))
    await lines.aclose()
    assert not live_policies._answers

  asyncio.run(leave())
  assert not site.store.tasks(site.project)
  assert 'being written' in browser.get(path).text
  assert answers(browser, path)[-1] == {'stored': True}
  assert answers(browser, path) == [{'stored': True}]  # another window, later
  browser.get(path)
  for _ in range(2):
    assert browser.post(f'{path}/judge', {'answer': 'a1'}).status_code == 303
  assert len(site.judgements()) == len(site.store.tasks(site.project)) == 1


def test_a_message_that_is_too_long_for_the_policies_is_changed(site):
  browser = site.browser('ann')
  path = start(browser)
  browser.post(f'{path}/say', {'text': 'w1 ' * 100})
  [line] = answers(browser, path)
  assert re.search('has 101 tokens; .* context of 96: shorten it', line['error'])
  assert 'Change the message' in browser.get(path).text
  turn(browser, path, 'w2')
  assert messages(browser.page) == ['w2']


@pytest.mark.parametrize('name', ['ben', 'olga', None])
def test_a_dialogue_belongs_to_its_annotator(site, name):
  """Not even the owner writes in it; others do not learn whether it exists."""
  browser = site.browser('ann')
  path = start(browser)
  browser.post(f'{path}/say', {'text': 'w1 w2 w3'})
  other = site.browser(name)
  other.get('/chat')
  assert 'w1 w2 w3' not in other.page
  for address in (path, '/chat/999', f'/chat/{10**30}'):
    status = 303 if name is None else 404
    assert other.get(address).status_code == status
    other.get('/chat')
    for action in ('say', 'answers', 'judge', 'end'):
      response = other.post(f'{address}/{action}', {'text': 'mine', 'answer': 'a1'})
      assert response.status_code == status, action
  user = site.store.annotator('ann')
  [(dialogue, opening)] = dialogues.openings(site.store, site.project, user)
  assert opening == 'w1 w2 w3' and dialogue.closed is None
  assert dialogues.state(site.store, dialogue).step == 'answer'


def test_a_request_without_the_token_changes_nothing(site):
  browser = site.browser('ann')
  path = start(browser)
  browser.post(f'{path}/say', {'text': 'w1'})
  browser.fields = {}
  for action in ('say', 'answers', 'judge', 'end'):
    assert browser.post(f'{path}/{action}', {'text': 'x'}).status_code == 403
  assert browser.post('/chat', {'mode': 'helpful'}).status_code == 403


def test_texts_are_escaped(site):
  browser = site.browser('ann')
  path = start(browser)
  browser.post(f'{path}/say', {'text': '<script>alert(1)</script>'})
  for address in (path, '/chat'):
    page = browser.get(address).text
    assert '<script>alert' not in page and '&lt;script&gt;alert(1)' in page


def test_without_policies(site):
  site.app.state.policies = None
  browser = site.browser('ann')
  assert 'There are no policies to talk to' in browser.get('/chat').text
  browser.get('/account')  # a page with a form
  assert browser.post('/chat', {'mode': 'helpful'}).status_code == 400
