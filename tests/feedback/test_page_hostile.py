"""A hostile client of a real server: SQL in parameters, other people's work, secrets in the log."""

import forms
import httpx
import pytest
import served

SQL = (
  "' OR '1'='1",
  "'; DROP TABLE judgements; --",
  '" OR ""="',
  "1' UNION SELECT link_hash FROM annotators --",
  '1; SELECT pg_sleep(30)',
  "admin'/*",
  '%27%20OR%201=1--',
  '\\',
  '1e309',
  '-1',
  '9' * 40,
)
PASSWORD = 'a long secret password'


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """Yields a server with two annotators and an owner."""
  with served.serve(tmp_path_factory.mktemp('hostile')) as page:
    for name, role in (('ann', 'annotator'), ('ben', 'annotator'), ('olga', 'owner')):
      page.add_annotator(name, role=role)
      page.add_tasks(name, ['pair'] * 3)
    yield page


def browser(world, name):
  """Returns a client that is signed in, and the form of its task."""
  client = httpx.Client(
    base_url=world.origin, headers={'Origin': world.origin}, follow_redirects=True, timeout=60
  )
  path = f'/sign-in/{world.links[name]}'
  form = forms.to(client.get(path).text, path)
  page = client.post(path, data=form.fields).text
  return client, forms.to(page, '/judge')


def test_sql_in_parameters_changes_nothing(world):
  client, form = browser(world, 'olga')
  before = world.judgements('olga'), world.store.annotators()
  for text in SQL:
    for path in ('/owner/elo', '/owner/agreement', '/owner/disagreement', '/sign-in'):
      response = client.get(path, params={'round': text, 'flag': text, 'ties': text, 'page': text})
      assert response.status_code < 500, (path, text)
    for field in ('lease', 'token', 'answer', 'flag'):
      response = client.post('/judge', data=form.fields | {'answer': 'tie', field: text})
      assert response.status_code < 500, (field, text)
      assert response.status_code >= 400, (field, text)
    for path in (f'/owner/annotators/{text}/disable', f'/chat/{text}/say', f'/sign-in/{text}'):
      response = client.post(path, data=form.fields)
      assert 400 <= response.status_code < 500, (path, text)
    for cookie in ({'rlhf_session': text}, {'rlhf_form': text}):
      response = httpx.get(world.origin, cookies=cookie, timeout=60)
      assert response.status_code == 303
  assert (world.judgements('olga'), world.store.annotators()) == before


def test_sql_as_a_name_or_password_does_not_sign_in(world):
  client = httpx.Client(base_url=world.origin, timeout=60)
  form = forms.to(client.get('/sign-in').text, '/sign-in')
  for text in SQL:
    data = form.fields | {'name': f'ann{text}', 'password': text}
    response = client.post('/sign-in', data=data)
    assert response.status_code == 403, text
    assert 'rlhf_session' not in client.cookies


def test_the_form_of_one_annotator_is_useless_to_another(world):
  _, stolen = browser(world, 'ann')
  client, own = browser(world, 'ben')
  for csrf in (stolen.fields['csrf'], own.fields['csrf']):
    for path in ('/judge', '/skip'):
      response = client.post(path, data=stolen.fields | {'csrf': csrf, 'answer': 'a1'})
      assert response.status_code in (400, 403)
  assert world.judgements('ann') == world.judgements('ben') == []
  assert client.get('/owner').status_code == 403
  assert client.get('/owner/export/pairs.jsonl').status_code == 403


def test_secrets_are_never_in_the_log(world):
  client, form = browser(world, 'ann')
  data = form.fields | {'answer': 'tie', 'reason': 'a private reason'}
  assert client.post('/judge', data=data).status_code == 200
  form = forms.to(client.get('/account').text, '/account')
  client.post('/account', data=form.fields | {'password': PASSWORD})
  client.get('/', params={'token': 'in-a-query'})
  client.get(f'/sign-in/{"x" * 43}')
  forms_page = httpx.Client(base_url=world.origin, timeout=60)
  form = forms.to(forms_page.get('/sign-in').text, '/sign-in')
  forms_page.post('/sign-in', data=form.fields | {'name': 'ann', 'password': 'a wrong secret'})
  log = world.log.read_text()
  assert 'POST /judge' in log  # requests are logged
  secrets = [
    *world.links.values(),
    client.cookies['rlhf_session'],
    form.fields['csrf'],
    PASSWORD,
    'a wrong secret',
    'a private reason',
    'in-a-query',
    'x' * 43,
  ]
  assert not [secret for secret in secrets if secret in log]
