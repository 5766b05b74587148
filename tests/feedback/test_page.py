"""The annotators' pages: every kind of task, by plain forms and by htmx, and what is stored."""

import html
import re
import time

import pytest

import labelling
from rlhf_jax.feedback.page import forms

HTMX = {'HX-Request': 'true'}


@pytest.fixture
def site(tmp_path):
  """A labelling page with an empty project."""
  made = labelling.Page(tmp_path)
  yield made
  made.store.close()


def texts(judgement, answer):
  """Returns the texts of the completions with some ids."""
  known = {completion.id: completion.text for completion in judgement.task.completions}
  return [known[i] for i in answer]


@pytest.mark.parametrize('wanted', ['good', 'bad'])
def test_a_comparison_is_stored_for_the_answer_that_was_displayed(site, wanted):
  site.add(count=8)
  browser, sides = site.browser('ann'), set()
  for number in range(8):
    browser.get('/')
    side = 'ab'[labelling.shown(browser.page).index(wanted)]
    sides.add(side)
    response = browser.post('/judge', {'answer': f'{side}{number % 4 + 1}'})
    assert (response.status_code, response.headers['location']) == (303, '/')
  found = site.judgements()
  assert sides == {'a', 'b'}  # the order is random
  assert [texts(item, [item.answer['chosen']]) for item in found] == 8 * [[wanted]]
  assert [item.answer['strength'] for item in found] == 2 * [1, 2, 3, 4]
  assert 'No tasks left' in browser.get('/').text


def test_a_tie_and_a_skip(site):
  site.add(count=2)
  browser = site.browser('ann')
  browser.answer('tie')
  browser.get('/')
  browser.post('/skip')
  assert [item.answer for item in site.judgements()] == [{'tie': True}, {'skip': True}]


def test_flags_and_the_reason_are_stored(site):
  site.add()
  site.browser('ann').answer('a2', flag=['false', 'prompt'], reason=' one\r\ntwo é\n ')
  (item,) = site.judgements()
  assert (item.flags, item.reason) == (['false', 'prompt'], 'one\ntwo é')


def test_a_ranking_with_a_tie(site):
  site.add('rank', texts=('w', 'x', 'y', 'z'))
  browser = site.browser('ann')
  browser.get('/')
  wanted = {'y': 1, 'w': 2, 'z': 2, 'x': 4}
  ranks = {
    f'rank-{position}': wanted[text] for position, text in enumerate(labelling.shown(browser.page))
  }
  assert browser.post('/judge', ranks).status_code == 303
  (item,) = site.judgements()
  assert [sorted(texts(item, group)) for group in item.answer['ranking']] == [
    ['y'],
    ['w', 'z'],
    ['x'],
  ]


@pytest.mark.parametrize('kind', ['rank', 'best', 'rate'])
def test_a_task_may_have_more_answers_than_the_alphabet_has_letters(site, kind):
  completions = [{'text': f'text {i}', 'policy': 'x'} for i in range(28)]
  site.store.add_tasks(site.project, [{'prompt': 'q', 'kind': kind, 'completions': completions}])
  browser = site.browser('ann')
  page = browser.get('/')
  assert page.status_code == 200 and len(labelling.shown(page.text)) == 28
  titles = re.findall(r'<h2 id="title-\d+">([^<]*)</h2>', page.text)
  assert titles[0] == 'A' and titles[25:] == ['Z', '27', '28']


def test_the_best_of_four(site):
  site.add('best', texts=('w', 'x', 'y', 'z'))
  browser = site.browser('ann')
  browser.get('/')
  browser.post('/judge', {'answer': labelling.shown(browser.page).index('y')})
  (item,) = site.judgements()
  assert texts(item, [item.answer['best']]) == ['y']


def test_ratings(site):
  site.add('rate', texts=('w', 'x'))
  browser = site.browser('ann')
  browser.get('/')
  wanted = {'w': 7, 'x': 2}
  ratings = {
    f'rating-{position}': wanted[text]
    for position, text in enumerate(labelling.shown(browser.page))
  }
  browser.post('/judge', ratings)
  (item,) = site.judgements()
  known = {str(completion.id): completion.text for completion in item.task.completions}
  assert {known[i]: rating for i, rating in item.answer['rating'].items()} == wanted


@pytest.mark.parametrize(
  'kind, fields',
  [
    ('pair', {}),
    ('pair', {'answer': 'a5'}),
    ('pair', {'answer': 'c1'}),
    ('best', {'answer': '4'}),
    ('best', {'answer': '-1'}),
    ('rank', {'rank-0': '1', 'rank-1': '2', 'rank-2': '3'}),
    ('rank', {f'rank-{position}': '5' for position in range(4)}),
    ('rate', {'rating-0': '8', 'rating-1': '1', 'rating-2': '1', 'rating-3': '1'}),
    ('rate', {'rating-0': '٣', 'rating-1': '1', 'rating-2': '1', 'rating-3': '1'}),
    ('pair', {'answer': 'a1', 'flag': 'unknown'}),
    ('pair', {'answer': 'a1', 'reason': 'x' * (forms.MAX_REASON + 1)}),
    ('pair', {'answer': 'a1', 'reason': 'nul \0'}),
    ('pair', {'answer': 'a1', 'lease': 'one'}),
  ],
)
def test_a_wrong_form_is_refused_and_the_task_stays(site, kind, fields):
  site.add(kind, texts='wxyz' if kind != 'pair' else 'wx')
  browser = site.browser('ann')
  browser.get('/')
  lease = browser.fields['lease']
  response = browser.post('/judge', fields)
  assert response.status_code == 400
  assert not site.judgements()
  browser.get('/')
  assert browser.fields['lease'] == lease


def test_undo_shows_the_task_again_in_the_same_order(site):
  site.add(count=3)
  browser = site.browser('ann')
  browser.get('/')
  first = browser.page.partition('<section class="prompt"')[2].partition('<form')[0]
  browser.post('/judge', {'answer': 'a1'})
  browser.get('/')
  assert first not in browser.page
  assert browser.post('/undo').status_code == 303
  browser.get('/')
  assert first in browser.page
  assert not site.judgements()
  browser.post('/judge', {'answer': 'b4'})
  rows = site.store.judgements(site.project, include_undone=True)
  assert [row.answer.get('strength') for row in rows] == [1, None, 4]
  assert rows[1].undoes == rows[0].id


def test_a_form_that_is_sent_twice_counts_once(site):
  site.add(count=2)
  browser = site.browser('ann')
  browser.get('/')
  assert browser.post('/judge', {'answer': 'a1'}).status_code == 303
  assert browser.post('/judge', {'answer': 'b3'}).status_code == 303
  (item,) = site.judgements()
  assert item.answer['strength'] == 1


def test_an_old_form_does_not_answer_another_task(site):
  site.add(count=2)
  browser = site.browser('ann')
  browser.get('/')
  old = dict(browser.fields)
  browser.post('/judge', {'answer': 'a1'})
  browser.get('/')
  for wrong in ({'token': 'x'}, {'token': ''}, {'lease': old['lease'], 'token': 'x'}):
    assert browser.post('/judge', {'answer': 'b1'} | wrong).status_code == 400
  assert browser.post('/judge', {'answer': 'b1', 'token': old['token']}).status_code == 303
  assert [item.answer['strength'] for item in site.judgements()] == [1]
  browser.get('/')
  assert browser.fields['token'] != old['token']  # the second task still waits


def test_htmx_gets_the_next_task_alone(site):
  site.add(count=2)
  browser = site.browser('ann')
  browser.get('/')
  response = browser.post('/judge', {'answer': 'a1'}, headers=HTMX)
  assert response.status_code == 200
  assert 'data-announce="Saved. Which answer is better? 1 judged so far."' in response.text
  assert '<html' not in response.text and '<nav' not in response.text
  again = labelling.fields(response.text)
  assert again['token'] != browser.fields['token']
  response = browser.post('/judge', again | {'answer': 'a1'}, headers=HTMX)
  assert 'No tasks left' in response.text and len(site.judgements()) == 2
  undone = browser.post('/undo', labelling.fields(response.text), headers=HTMX)
  undone = browser.post('/undo', labelling.fields(undone.text), headers=HTMX)
  assert labelling.fields(undone.text).keys() == {'csrf', 'lease', 'token'}


def test_htmx_shows_errors_beside_the_form(site):
  site.add()
  browser = site.browser('ann')
  browser.get('/')
  response = browser.post('/judge', headers=HTMX)
  assert response.status_code == 400
  assert response.text.startswith('<p><b>This does not work.</b>')
  browser.cookies.clear()
  response = browser.post('/judge', {'answer': 'a1'}, headers=HTMX)
  assert response.headers['hx-redirect'] == '/sign-in?ended'
  assert not site.judgements()
  assert 'Your last answer was not saved' in browser.get('/sign-in?ended').text


def test_the_server_measures_the_time_from_the_display(site, monkeypatch):
  site.add(count=2)
  browser, start = site.browser('ann'), time.time()
  monkeypatch.setattr(time, 'time', lambda: start)
  browser.get('/')
  monkeypatch.setattr(time, 'time', lambda: start + 20)
  browser.get('/')  # a second look does not start it again
  monkeypatch.setattr(time, 'time', lambda: start + 33)
  browser.post('/judge', {'answer': 'a1', 'seconds': '1'})
  assert site.judgements()[0].seconds == pytest.approx(33, abs=1e-3)
  browser.answer('tie')
  text = html.unescape(browser.get('/progress').text)
  assert '<b>2</b><span>judged by you' in text
  assert '<b>16</b><span>seconds' in text or '<b>17</b><span>seconds' in text  # median of 33 and 0
  assert '2 of 2 judgements of 2 tasks' in text


def test_pages_are_blind(site):
  for kind, answers in (('pair', 'ab'), ('rank', 'abcd'), ('best', 'abcd'), ('rate', 'a')):
    site.add(kind, texts=answers, prompt=kind)
  browser = site.browser('ann')
  pages = [browser.get(path).text for path in ('/progress', '/instructions', '/account')]
  for _ in range(4):
    pages += [browser.get('/').text]
    browser.post('/skip')
  kinds = {kind for kind in ('pair', 'rank', 'best', 'rate') for text in pages if kind in text}
  assert kinds == {'pair', 'rank', 'best', 'rate'}
  assert not any('secret-policy' in text for text in pages)


def test_messages_are_shown_as_turns(site):
  messages = [
    {'role': 'system', 'content': 'Be <brief>.'},
    {'role': 'user', 'content': 'مرحبا'},
    {'role': 'assistant', 'content': 'Hello.'},
    {'role': 'user', 'content': 'Bye.'},
  ]
  completions = [{'text': '', 'policy': 'x'}, {'text': ' b', 'policy': 'y'}]
  site.store.add_tasks(site.project, [{'prompt': messages, 'completions': completions}])
  text = site.browser('ann').get('/').text
  positions = [text.index(part) for part in ('Be &lt;brief&gt;.', 'مرحبا', 'Hello.', 'Bye.')]
  assert positions == sorted(positions)
  assert '(an empty answer)' in text
  assert text.count('dir="auto"') >= 6


def test_the_instructions_are_those_of_the_project(site):
  assert 'Prefer the kinder answer.' in site.browser('ann').get('/instructions').text
