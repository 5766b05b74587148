"""The chat pages with two live policies: forms, streamed answers, and who may see what."""

import asyncio
import json
import re

import pytest

import labelling
from rlhf_jax.feedback import accounts
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
  return ['' if 'class="empty"' in text else text.strip() for text in found]


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


def lines_of(site, name='ann', text='w1'):
  """Starts a dialogue with a message; returns the lines of its answers, which nobody has read."""
  user = site.store.annotator(name)
  dialogue = accounts.add_dialogue(site.store.database, site.project, user, 'helpful')
  dialogues.say(site.store, site.project, dialogue, text)
  prompt = dialogues.state(site.store, dialogue).prompt
  return lambda: chat._lines(site.app.state, user, prompt)


def test_no_side_tells_which_policy_answers(site, live_policies):
  """Over the turns each policy is on both sides, and the first piece is of the one or the other."""

  async def turns():
    return [[json.loads(line) async for line in lines_of(site)()] for _ in range(16)]

  sides, firsts, found = set(), set(), asyncio.run(turns())
  for lines, task in zip(found, site.store.tasks(site.project), strict=True):
    texts = [line['side'] for line in lines if line.get('text')]
    shorter = 2 * min(texts.count(0), texts.count(1))
    assert all(texts[i] != texts[i + 1] for i in range(0, shorter, 2))
    assert sorted(line.get('side', 2) for line in lines[-3:]) == [0, 1, 2]  # both ends, and stored
    shown = site.store.lease(site.project, task, site.store.annotator('ann')).shown
    sides.add(shown[0].policy)
    firsts |= {shown[side].policy for side in texts[:1]}
  assert sides == firsts == set(live_policies.names)


def test_both_sides_have_one_pace():
  """Nothing comes before both have a piece; the rest of the faster one comes as slowly."""

  async def main():
    queue, clock, found = asyncio.Queue(), asyncio.get_running_loop().time, []

    async def write():
      for piece in [*'abcdef', None]:
        queue.put_nowait((1, piece))
      for piece in [*'xyz', None]:
        await asyncio.sleep(0.05)
        queue.put_nowait((0, piece))

    async def read():
      async for side, piece in chat._paired(queue):
        found.append((clock() - start, side, piece))

    start = clock()
    await asyncio.gather(write(), read())
    return found

  found = asyncio.run(main())
  assert [{found[i][2], found[i + 1][2]} for i in (0, 2, 4)] == [set('ax'), set('by'), set('cz')]
  assert [entry[2] for entry in found[6:]] == ['d', 'e', 'f', None, None]
  times = [entry[0] for entry in found]
  pace = (times[4] - times[0]) / 2
  assert times[0] >= 0.05 and pace >= 0.04
  assert times[8] - times[5] > 1.5 * pace  # three pauses


def test_errors_end_the_lines(site, live_policies, monkeypatch):
  """Also those of the machine, and those of the database."""

  def fail(*_):
    raise OSError(24, 'Too many open files')

  async def read(lines):
    return [json.loads(line) async for line in lines]

  with monkeypatch.context() as patch:
    patch.setattr(live_policies, '_begin', fail)
    lines = asyncio.run(asyncio.wait_for(read(lines_of(site)()), 60))
  assert lines == [{'error': chat.BROKEN}]
  lines = lines_of(site)()
  accounts.change(site.store.database, site.store.annotator('ann'), disabled=True)
  assert asyncio.run(read(lines))[-1] == {'error': chat.NOT_STORED}
  assert not site.store.tasks(site.project)


def test_an_annotator_has_few_answers_written_at_a_time(site, live_policies):
  first, second, third = lines_of(site), lines_of(site), lines_of(site)
  other = lines_of(site, 'ben')

  async def main():
    replaced = asyncio.create_task(anext(first()))
    await asyncio.sleep(0)
    opened = [lines() for lines in (first, second, other)]
    for lines in opened:
      assert 'side' in json.loads(await anext(lines))
    assert json.loads(await replaced) == {'error': chat.REPLACED}
    assert len(live_policies._answers) <= 6
    assert [json.loads(line) async for line in third()] == [{'error': chat.BUSY}]
    for lines in opened:
      assert json.loads([line async for line in lines][-1]) == {'stored': True}
    assert json.loads([line async for line in third()][-1]) == {'stored': True}

  asyncio.run(main())


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
