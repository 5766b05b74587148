"""The owner's pages: their numbers against those worked out by hand in test_votes.py."""

import html.parser
import json
import re

import pytest

import jury
import labelling
from rlhf_jax.feedback import store as store_lib
from rlhf_jax.feedback.page import app as app_lib

PAGES = ('', '/annotators', '/agreement', '/elo', '/disagreement', '/export')


class _Tables(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.rows, self.inside = [], False

  def handle_starttag(self, tag, attrs):
    """Starts a row or a cell."""
    if tag == 'tr':
      self.rows.append([])
    if tag in ('td', 'th'):
      self.rows[-1].append('')
      self.inside = True

  def handle_endtag(self, tag):
    """Ends a cell."""
    self.inside = self.inside and tag not in ('td', 'th')

  def handle_data(self, data):
    """Adds to the text of a cell."""
    if self.inside:
      self.rows[-1][-1] += data


def rows(page):
  """Returns the texts of the cells of all rows of all tables of a page."""
  parser = _Tables()
  parser.feed(page)
  return [[' '.join(cell.split()) for cell in row] for row in parser.rows]


def starting(page, *cells):
  """Returns the rest of the only row that starts with some cells."""
  (row,) = [row for row in rows(page) if row[: len(cells)] == list(cells)]
  return row[len(cells) :]


def make(folder, fill):
  store = store_lib.Store.open(folder / 'feedback.db')
  project = fill(store)
  _, token = store.add_annotator('Olga', role='owner')
  app = app_lib.create(store, project, settings=labelling.SETTINGS)
  browser = labelling.Browser(app)
  browser.get(f'/sign-in/{token}')
  browser.post(f'/sign-in/{token}')
  return store, browser


@pytest.fixture(scope='module')
def olga(tmp_path_factory):
  """The browser of the owner of a project that no test changes."""
  store, browser = make(tmp_path_factory.mktemp('owner'), jury.fill)
  yield browser
  store.close()


@pytest.fixture
def site(tmp_path):
  """A store with an empty project, and its owner's browser."""
  store, browser = make(tmp_path, lambda store: store.add_project('empty'))
  yield store, browser
  store.close()


@pytest.mark.parametrize('path', PAGES)
def test_an_empty_project_has_all_pages(path, site):
  _, browser = site
  response = browser.get(f'/owner{path}')
  assert response.status_code == 200 and 'nan' not in response.text


@pytest.mark.parametrize('path', [*PAGES, '/export/pairs.jsonl'])
def test_only_owners_see_them(path, site):
  store, browser = site
  _, token = store.add_annotator('Ann')
  nobody = labelling.Browser(browser.app)
  assert nobody.get(f'/owner{path}').headers['location'] == '/sign-in'
  nobody.get(f'/sign-in/{token}')
  nobody.post(f'/sign-in/{token}')
  assert nobody.get('/').status_code == 200
  refused = nobody.get(f'/owner{path}')
  assert refused.status_code == 403 and 'Only owners' in refused.text


def test_overview(olga):
  page = olga.get('/owner').text
  # 12 + 1 + 3 + 3 answers of 3 annotators to 7 tasks; Ada also answered 4 other tasks.
  assert '19 of 21' in page and 'judgements of 7 tasks' in page
  # Of 21 answers and skips to tasks and 4 others, Robo gave 7.
  assert '7 of 25' in page
  assert starting(page, '0', 'comparison')[:3] == ['4', '12', '12']
  assert starting(page, '1', 'comparison')[:3] == ['1', '1', '3']
  assert starting(page, '1', 'rating')[:3] == ['1', '3', '3']


def test_annotators(olga):
  page = olga.get('/owner/annotators').text
  # Judged, median time, agreement 5.5 / 8, kappa, gold, repeats, skipped, flagged.
  ada = starting(page, 'Ada')
  assert ada[:3] == ['10', '2.0 s', '69 %'] and ada[4:8] == ['1 of 2', '1 of 2', '1', '1']
  bo = starting(page, 'Bo')
  assert bo[:3] == ['7', '4.0 s', '56 %'] and bo[4:8] == ['–', '–', '0', '1']
  assert starting(page, 'Robo simulated')[:2] == ['6', '9.0 s']
  assert starting(page, 'Olga owner')[:4] == ['0', '–', '–', '–']


def test_agreement(olga):
  page = olga.get('/owner/agreement').text
  # Items, agreement 2/3, Cohen's kappa 0.509, Fleiss' kappa 7/15, alpha 1 - 44/90.
  pairs = starting(page, 'Comparisons', 'nominal')
  assert pairs == ['4', '67 %', '0.51', '0.47', '0.51']
  # Ada: 4 items, 3/4 of the others; Cohen's kappa with Bo 5/9, with Robo 7/11.
  ada = [row for row in rows(page) if row[0] == 'Ada'][0]
  assert ada[1:3] == ['4', '75 %'] and ada[4:] == ['–', '0.56', '0.64']
  assert not any(row[0] == 'Comparisons' for row in rows(olga.get('/owner/agreement?round=1').text))


def test_elo(olga):
  page = olga.get('/owner/elo?round=0&ties=half').text
  # As in test_elo_command.py.
  ppo = starting(page, 'ppo')
  assert ppo[0] == '1041' and ppo[2:7] == ['12', '6', '3', '3', '0.62']
  assert '4 of them judged by simulated annotators' in page
  page = olga.get('/owner/elo').text
  assert 'Elo ratings over rounds' in page and '<svg role="img"' in page
  assert 'style=' not in page  # which the security policy forbids
  assert 'Lengths are controlled for, in characters' in olga.get('/owner/elo?style=1').text
  assert olga.get('/owner/elo?ties=no').status_code == 400
  assert olga.get('/owner/elo?round=x').status_code == 400


def test_policies_that_never_met_are_explained(site):
  store, browser = site
  project = store.project('empty')
  ann, _ = store.add_annotator('Ann')
  for pair in (('a', 'b'), ('c', 'd')):
    texts = [{'text': name, 'policy': name} for name in pair]
    store.add_tasks(project, [{'prompt': 'p', 'completions': texts}])
    lease = store.next_task(project, ann)
    store.judge(lease, ann, {'tie': True}, token=lease.token)
  page = browser.get('/owner/elo').text
  assert 'no chain of matches connects them' in page


def test_disagreement(olga):
  page = olga.get('/owner/disagreement').text
  order = re.findall(r'Question \d', page)
  assert order == ['Question 1', 'Question 2', 'Question 5', 'Question 4']
  assert 'disagreement 0.67' in page and 'disagreement 0.22' in page
  said = [row for row in rows(page) if row[0] == 'Ada'][0]
  assert said == ['Ada', 'B, strength 1', jury.REASON, jury.FLAG, '2.0 s']
  assert 'by <bdi>sft</bdi>' in page
  flagged = olga.get('/owner/disagreement', params={'flag': jury.FLAG}).text
  assert re.findall(r'Question \d', flagged) == ['Question 1', 'Question 4']
  nothing = olga.get('/owner/disagreement?flag=none').text
  assert 'No task has this flag' in nothing


def test_disagreement_in_pages(site, monkeypatch):
  store, browser = site
  project = store.add_project('empty')
  texts = [{'text': name, 'policy': name} for name in 'ab']
  tasks = [{'prompt': f'Query {i}', 'completions': texts, 'overlap': 2} for i in range(21)]
  store.add_tasks(project, tasks)
  for position, name in enumerate(('Ann', 'Ben')):
    person, _ = store.add_annotator(name)
    while lease := store.next_task(project, person):
      chosen = lease.task.completions[position].id
      store.judge(lease, person, {'chosen': chosen}, token=lease.token)
  page = browser.get('/owner/disagreement').text
  assert '1 to 20 of 21 tasks' in page and 'Back</a>' not in page
  assert re.findall(r'Query \d+', page) == [f'Query {i}' for i in range(20)]
  (after,) = re.findall(r'href="([^"]*)" rel="next"', page)
  last = browser.get(html.unescape(after)).text
  assert re.findall(r'Query \d+', last) == ['Query 20'] and 'More</a>' not in last
  # A new judgement shows at once.
  store.undo(project, store.annotator('Ben'))
  assert 'of 20 tasks' in browser.get('/owner/disagreement').text


def test_the_link_of_a_new_annotator_is_shown_once_and_works(site):
  store, browser = site
  browser.get('/owner/annotators')
  page = browser.post('/owner/annotators', {'name': 'Çağla', 'role': 'annotator'}).text
  (link,) = re.findall(r'value="http://localhost(/sign-in/[^"]+)"', page)
  assert 'sign-in/' not in browser.get('/owner/annotators').text
  guest = labelling.Browser(browser.app)
  guest.get(link)
  assert guest.post(link).status_code == 303 and guest.get('/').status_code == 200
  again = browser.post('/owner/annotators', {'name': 'Çağla', 'role': 'annotator'})
  assert again.status_code == 400 and 'already an annotator' in again.text
  assert store.annotator('Çağla').role == 'annotator'


def test_disabling_and_a_new_link(site):
  store, browser = site
  ann, old = store.add_annotator('Ann')
  guest = labelling.Browser(browser.app)
  guest.get(f'/sign-in/{old}')
  guest.post(f'/sign-in/{old}')
  browser.get('/owner/annotators')
  assert 'Ann is disabled.' in browser.post(f'/owner/annotators/{ann.id}/disable').text
  assert guest.get('/').headers['location'] == '/sign-in'  # the session ended
  assert store.annotator('Ann').disabled
  assert 'Ann is enabled.' in browser.post(f'/owner/annotators/{ann.id}/enable').text
  page = browser.post(f'/owner/annotators/{ann.id}/link').text
  (link,) = re.findall(r'value="http://localhost(/sign-in/[^"]+)"', page)
  assert guest.post(f'/sign-in/{old}', guest.fields).status_code == 404
  guest.get(link)
  assert guest.post(link).status_code == 303
  own = store.annotator('Olga').id
  assert browser.post(f'/owner/annotators/{own}/disable').status_code == 400
  assert browser.post('/owner/annotators/999/disable').status_code == 404
  assert browser.post(f'/owner/annotators/{ann.id}/promote').status_code == 404
  robot, _ = store.add_annotator('Robo', simulated=True)
  assert 'does not sign in' in browser.post(f'/owner/annotators/{robot.id}/link').text


def test_a_new_link_ends_the_password(site):
  """Who found an old link may have set it."""
  store, browser = site
  ann, old = store.add_annotator('Ann')
  thief = labelling.Browser(browser.app)
  thief.get(f'/sign-in/{old}')
  thief.post(f'/sign-in/{old}')
  thief.get('/account')
  assert thief.post('/account', {'password': "the thief's"}).status_code == 303
  browser.get('/owner/annotators')
  browser.post(f'/owner/annotators/{ann.id}/link')
  thief.get('/sign-in')
  again = thief.post('/sign-in', {'name': 'Ann', 'password': "the thief's"})
  assert again.status_code == 403 and store.annotator('Ann').password_hash is None


def test_the_address_of_a_form_leads_to_its_page(site):
  _, browser = site
  addresses = {'/instructions': '', '/annotators/1/link': '/annotators'}
  for address, page in addresses.items():
    assert browser.get(f'/owner{address}').headers['location'] == f'/owner{page}'
  browser.get('/owner')
  page = browser.post('/owner/instructions', {'instructions': 'x'}).text
  assert '<a href="/owner" aria-current="page">Overview' in page


def test_changes_need_the_token(site):
  store, browser = site
  ann, _ = store.add_annotator('Ann')
  browser.fields = {}
  for path in ('', f'/{ann.id}/disable', f'/{ann.id}/link'):
    assert browser.post(f'/owner/annotators{path}', {'name': 'x'}).status_code == 403
  assert browser.post('/owner/instructions', {'instructions': 'x'}).status_code == 403
  assert not store.annotator('Ann').disabled and store.annotator('x') is None


def test_instructions(site):
  store, browser = site
  browser.get('/owner')
  saved = browser.post('/owner/instructions', {'instructions': 'Be kind.\r\n\r\n<b>Be</b> true.'})
  assert 'The instructions are saved.' in saved.text
  assert store.project('empty').instructions == 'Be kind.\n\n<b>Be</b> true.'
  page = browser.get('/instructions').text
  assert '>Be kind.</p>' in page and '&lt;b&gt;Be&lt;/b&gt; true.</p>' in page


def test_export(olga):
  page = olga.get('/owner/export').text
  download = lambda path: [
    json.loads(line) for line in olga.get(f'/owner/export/{path}').text.splitlines()
  ]
  # Nine untied answers to tasks 0 to 2, one to task 6, and 3 + 2 + 3 pairs of the rankings.
  pairs = download('pairs.jsonl')
  assert len(pairs) == 18 and '18 records' in page
  assert len(download('pairs.jsonl?round=0&annotators=people')) == 6
  assert all(record['simulated'] for record in download('pairs.jsonl?annotators=simulated'))
  assert {
    'prompt': 'Question 0?',
    'chosen': ' Answer of ppo to 0 indeed',
    'rejected': ' Answer of sft to 0',
    'margin': 1.0,
    'annotator': 'Bo',
    'simulated': False,
  } in pairs
  assert [record['rating'] for record in download('ratings.jsonl')] == [6, 5, 2]
  response = olga.get('/owner/export/rankings.jsonl')
  assert response.headers['content-disposition'] == 'attachment; filename="rankings.jsonl"'
  # 12 answers to tasks 0 to 3, 3 rankings, 3 ratings, one answer to task 6.
  assert len(response.text.splitlines()) == 19
  assert olga.get('/owner/export/other.jsonl').status_code == 404
  assert olga.get('/owner/export/pairs.jsonl?annotators=x').status_code == 404


def test_names_of_policies_are_text_in_pages_and_pictures(site):
  store, browser = site
  project = store.project('empty')
  names = ['<script>alert(1)</script>', '"><img src=x style="color:red"> $x^2$ ]]> -->']
  ann, _ = store.add_annotator('Ann')
  for number in range(2):
    texts = [{'text': name, 'policy': name} for name in names]
    store.add_tasks(project, [{'prompt': 'p', 'completions': texts, 'round': number}])
    lease = store.next_task(project, ann)
    chosen = lease.task.completions[number].id
    store.judge(lease, ann, {'chosen': chosen}, token=lease.token)
  page = browser.get('/owner/elo').text
  assert '<img' not in page and '<script>' not in page
  # In the table, in the sentence about the picture, and in the picture's legend.
  assert page.count('&lt;script&gt;alert(1)') == 3
