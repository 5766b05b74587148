"""The security of the labelling page: sessions, CSRF, rates, headers, limits, logs."""

import dataclasses
import hashlib
import http.client
import logging
import re
import socket
import threading
import time

from fastapi import routing
import pytest
import uvicorn

import labelling
from rlhf_jax.feedback import accounts
from rlhf_jax.feedback.page import app as app_lib
from rlhf_jax.feedback.page import auth
from rlhf_jax.feedback.page import passwords
from rlhf_jax.feedback.page import serve

PASSWORD = 'correct horse battery'
PUBLIC = {'/sign-in', '/sign-in/{token}', '/static'}
SESSION = auth.COOKIE


@pytest.fixture(scope='module')
def shared_site(tmp_path_factory):
  """A labelling page whose tests do not answer tasks."""
  made = labelling.Page(tmp_path_factory.mktemp('page'))
  made.add(count=5)
  ann = made.store.annotator('ann')
  password_hash = passwords.hash_password(PASSWORD, labelling.SETTINGS)
  accounts.change(made.store.database, ann, password_hash=password_hash)
  yield made
  made.store.close()


@pytest.fixture
def site(shared_site):
  """The same page, with its rates at zero."""
  shared_site.app.state.limiter.storage.reset()
  yield shared_site
  shared_site.app.state.settings = labelling.SETTINGS


@pytest.fixture
def fresh(tmp_path):
  """A labelling page of its own."""
  made = labelling.Page(tmp_path)
  made.add(count=3)
  yield made
  made.store.close()


def by_password(site, name='ann', password=PASSWORD, browser=None):
  """Signs in by a password; returns (browser, response)."""
  browser = browser or site.browser()
  browser.get('/sign-in')
  return browser, browser.post('/sign-in', {'name': name, 'password': password})


def test_every_other_page_needs_a_session(site):
  found = [
    (method, route.path)
    for route in routing.iter_route_contexts(site.app.routes)
    for method in route.methods or {'GET'}
  ]
  assert {path for _, path in found} > PUBLIC | {'/', '/judge', '/undo', '/progress'}
  browser = site.browser()
  browser.get('/sign-in')
  for method, path in found:
    if path not in PUBLIC:
      data = browser.fields if method == 'POST' else None
      response = browser.request(method, re.sub(r'{\w+}', '1', path), data=data)
      assert response.status_code == 303, (method, path)
      assert response.headers['location'].partition('?')[0] == '/sign-in'
      assert not response.text


def test_opening_a_link_does_not_sign_in(site):
  browser = site.browser()
  response = browser.get(f'/sign-in/{site.links["ann"]}')
  assert response.status_code == 200 and SESSION not in browser.cookies
  assert 'Continue as <bdi>ann</bdi>' in browser.page
  assert browser.get('/').status_code == 303


def test_a_wrong_or_stopped_link_does_not_work(fresh):
  browser = fresh.browser('ben')
  fresh.store.disable(fresh.store.annotator('ben'))
  assert browser.get('/').status_code == 303  # the session ends as well
  for token in (fresh.links['ben'], fresh.links['ann'][:-1], 'x', '%00', "' OR 1=1 --"):
    other = fresh.browser()
    assert other.get(f'/sign-in/{token}').status_code == 404
    other.get('/sign-in')
    assert other.post(f'/sign-in/{token}').status_code == 404
    assert SESSION not in other.cookies


def test_links_have_256_bits_and_only_hashes_are_stored(site):
  token = site.links['ann']
  assert re.fullmatch(r'[\w-]{43}', token, re.ASCII)  # 43 characters of 6 bits
  browser = site.browser('ann')
  cookie = browser.cookies[SESSION]
  assert re.fullmatch(r'[\w-]{43}', cookie, re.ASCII)
  files = site.store.database.engine.url.database
  content = b''.join(open(files + end, 'rb').read() for end in ('', '-wal'))
  assert hashlib.sha256(token.encode()).hexdigest().encode() in content
  for secret in (token, cookie, PASSWORD):
    assert secret.encode() not in content


def test_passwords_are_hashed_by_argon2id_and_again_when_the_cost_rises(site):
  before = site.store.annotator('ann').password_hash
  assert before.startswith('$argon2id$v=19$m=8,t=1,p=1$')
  site.app.state.settings = dataclasses.replace(labelling.SETTINGS, hash_passes=2)
  assert by_password(site)[1].headers['location'] == '/'
  after = site.store.annotator('ann').password_hash
  assert after.startswith('$argon2id$v=19$m=8,t=2,p=1$')
  assert passwords.verify(PASSWORD, after, site.app.state.settings) == (True, None)


def test_wrong_sign_ins_look_the_same(site, monkeypatch):
  hashes = []
  verify = passwords.verify
  monkeypatch.setattr(
    passwords, 'verify', lambda *values: hashes.append(values[1]) or verify(*values)
  )
  answers = []
  for name in ('ann', 'ben', 'nobody', "x' OR '1'='1", '\0'):  # ben has no password
    browser, response = by_password(site, name, 'wrong')
    assert response.status_code == 403 and SESSION not in browser.cookies
    answers.append(re.sub(r'value="[^"]*"|X-CSRF[^}]*}', '', response.text))
  assert len(set(answers)) == 1
  assert len(hashes) == 5  # each took the time of one hash


def test_the_cookie(site):
  browser = site.browser()
  path = f'/sign-in/{site.links["ann"]}'
  browser.get(path)
  plain = browser.post(path).headers['set-cookie'].lower()
  assert plain.startswith('rlhf_session=')
  assert {'httponly', 'samesite=lax', 'path=/'} <= set(plain.split('; '))
  assert 'secure' not in plain and 'domain' not in plain
  browser = labelling.Browser(site.app, 'https://localhost')
  browser.get(path)
  secure = browser.post(path).headers['set-cookie'].lower()
  assert secure.startswith('__host-rlhf_session=')
  assert {'httponly', 'samesite=lax', 'path=/', 'secure'} <= set(secure.split('; '))
  assert 'domain' not in secure
  assert browser.get('/').status_code == 200


def test_the_token_of_a_session_changes_at_sign_in_and_dies_at_sign_out(site):
  browser = site.browser()
  browser.cookies.set(SESSION, 'chosen-by-an-attacker', domain='localhost.local')
  by_password(site, browser=browser)
  first = browser.cookies[SESSION]
  assert first != 'chosen-by-an-attacker'
  path = f'/sign-in/{site.links["ann"]}'
  browser.get(path)
  browser.post(path)
  second = browser.cookies[SESSION]
  assert second != first
  browser.get('/')
  assert browser.post('/sign-out').status_code == 303
  assert SESSION not in browser.cookies
  for token in (first, second, 'chosen-by-an-attacker'):
    other = site.browser()
    other.cookies.set(SESSION, token)
    assert other.get('/').status_code == 303


def test_the_pages_to_sign_in_have_no_bar(fresh):
  """Its form to sign out would have the token of the sign-in form."""
  browser = fresh.browser('ann')
  for token in (fresh.links['ann'], 'unknown'):
    browser.get(f'/sign-in/{token}')
    assert '/sign-out' not in browser.page and 'aria-label="Pages"' not in browser.page
  browser.get('/')
  assert browser.post('/sign-out').headers['location'] == '/sign-in'


def test_sessions_expire(site, monkeypatch):
  site.app.state.settings = dataclasses.replace(
    labelling.SETTINGS, idle_seconds=1000.0, session_seconds=2500.0
  )
  start = time.time()
  at = lambda seconds: monkeypatch.setattr(time, 'time', lambda: start + seconds)
  at(0)
  idle, busy = site.browser('ben'), site.browser('ben')
  for seconds in (900, 1800, 2400):
    at(seconds)
    assert busy.get('/progress').status_code == 200
  assert idle.get('/progress').status_code == 303
  at(2501)  # in use, but the longest time is over
  assert busy.get('/progress').status_code == 303


def test_a_password_is_set_and_other_sessions_end(fresh):
  browser, other = fresh.browser('ann'), fresh.browser('ann')
  browser.get('/account')
  assert browser.post('/account', {'password': 'too short'}).status_code == 400
  assert browser.post('/account', {'password': PASSWORD}).status_code == 303
  assert browser.get('/account?saved').status_code == 200
  assert other.get('/account').status_code == 303
  assert by_password(fresh)[1].headers['location'] == '/'
  changed = {'present': 'wrong', 'password': PASSWORD + '2'}
  assert browser.post('/account', changed).status_code == 403
  assert by_password(fresh, password=PASSWORD + '2')[1].status_code == 403


@pytest.mark.parametrize('token', [None, '', 'wrong', 'of another session', 'of the sign-in form'])
def test_a_post_needs_the_token_of_the_session(site, token):
  browser = site.browser('ann')
  browser.get('/')
  if token == 'of another session':
    other = site.browser('ben')
    other.get('/')
    token = other.fields['csrf']
  if token == 'of the sign-in form':
    token = browser.cookies[auth.FORM_COOKIE]
  for path in ('/judge', '/skip', '/undo', '/account', '/sign-out'):
    fields = browser.fields | {'answer': 'a1', 'csrf': token}
    if token is None:
      del fields['csrf']
    response = labelling.testclient.TestClient.post(browser, path, data=fields)
    assert response.status_code == 403, path
    if token is not None:
      header = {'X-CSRF-Token': token}
      response = labelling.testclient.TestClient.post(browser, path, data=fields, headers=header)
      assert response.status_code == 403, path
  assert not site.judgements()
  assert browser.get('/').status_code == 200


@pytest.mark.parametrize('path', ['/judge', '/skip', '/undo', '/sign-out', '/account'])
def test_only_a_lost_answer_is_called_lost(site, path):
  to = '/sign-in?ended' if path in ('/judge', '/skip') else '/sign-in'
  assert site.browser().post(path).headers['location'] == to


def test_the_sign_in_form_has_a_token_too(site):
  browser = site.browser()
  browser.get('/sign-in')
  for fields in ({'csrf': 'x'}, {'csrf': ''}):
    response = browser.post('/sign-in', {'name': 'ann', 'password': PASSWORD} | fields)
    assert response.status_code == 403 and SESSION not in browser.cookies
  path = f'/sign-in/{site.links["ann"]}'
  assert site.browser().post(path).status_code == 403


def test_a_header_carries_the_token_of_htmx(fresh):
  browser = fresh.browser('ann')
  browser.get('/')
  token = browser.fields.pop('csrf')
  assert f'{{&#34;X-CSRF-Token&#34;: &#34;{token}&#34;}}' in browser.page
  response = browser.post('/judge', {'answer': 'a1'}, headers={'X-CSRF-Token': token})
  assert response.status_code == 303 and len(fresh.judgements()) == 1


@pytest.mark.parametrize(
  'headers, status',
  [
    ({'Origin': 'http://localhost'}, 303),
    ({'Origin': 'https://localhost'}, 303),  # a proxy may add TLS
    ({'Origin': 'https://localhost:444'}, 403),
    ({'Origin': 'http://localhost:8000'}, 403),
    ({'Origin': 'http://evil.example'}, 403),
    ({'Origin': 'http://localhost.evil.example'}, 403),
    ({'Origin': 'null'}, 403),
    ({'Origin': 'http://localhost:x'}, 403),
    ({'Referer': 'http://evil.example/localhost'}, 403),
    ({'Referer': 'http://localhost/x'}, 303),
  ],
)
def test_a_post_from_another_site_is_refused(site, headers, status):
  browser = site.browser('ben')
  browser.get('/')
  response = browser.post('/undo', headers=headers)
  assert response.status_code == status


def test_one_annotator_cannot_answer_the_task_of_another(fresh):
  ann, ben = fresh.browser('ann'), fresh.browser('ben')
  ann.get('/')
  ben.get('/')
  lease = {name: ann.fields[name] for name in ('lease', 'token')}
  for path in ('/judge', '/skip'):
    assert ben.post(path, lease | {'answer': 'a1'}).status_code == 400
  assert not fresh.judgements()
  ann.post('/judge', {'answer': 'a1'})
  assert ben.post('/judge', lease | {'answer': 'b1'}).status_code == 400  # nor after it is stored
  ben.post('/undo')  # undoes what ben did, which is nothing
  (item,) = fresh.judgements()
  assert item.annotator.name == 'ann'


def test_guessing_passwords_is_limited_by_name_and_by_address(site):
  site.app.state.settings = dataclasses.replace(
    labelling.SETTINGS, name_rate='3 per 5 minutes', address_rate='8 per 5 minutes'
  )
  attempt = lambda name, password: by_password(site, name, password)[1]
  assert [attempt('ann', f'wrong {number}').status_code for number in range(3)] == 3 * [403]
  response = attempt('ann', PASSWORD)  # the right one does not help any more
  assert response.status_code == 429 and 0 < int(response.headers['retry-after']) <= 300
  assert attempt(' Ann', PASSWORD).status_code == 429
  assert [attempt(f'name {number}', 'x').status_code for number in range(3)] == 3 * [403]
  assert attempt('ben', 'x').status_code == 429  # the ninth from this address
  assert site.browser('ann').get('/').status_code == 200  # a link still works


def test_guessing_links_is_limited(site):
  site.app.state.settings = dataclasses.replace(labelling.SETTINGS, address_rate='2 per 5 minutes')
  browser = site.browser()
  assert [browser.get(f'/sign-in/x{number}').status_code for number in range(3)] == [404, 404, 429]


def test_the_rate_of_a_session_is_limited(site):
  site.app.state.settings = dataclasses.replace(labelling.SETTINGS, post_rate='3 per minute')
  browser, other = site.browser('ben'), site.browser('ben')
  browser.get('/')
  other.get('/')
  assert [browser.post('/undo').status_code for _ in range(4)] == [303, 303, 303, 429]
  assert other.post('/undo').status_code == 303


@pytest.mark.parametrize('path', ['/', '/sign-in', '/nothing', '/static/app.js', '/static/nothing'])
def test_headers(site, path):
  response = site.browser().get(path)
  policy = {
    name: values
    for name, *values in map(str.split, response.headers['content-security-policy'].split(';'))
  }
  assert policy == {
    'default-src': ["'none'"],
    'script-src': ["'self'"],
    'style-src': ["'self'"],
    'connect-src': ["'self'"],
    'img-src': ["'self'", 'data:'],
    'form-action': ["'self'"],
    'frame-ancestors': ["'none'"],
    'base-uri': ["'none'"],
  }
  assert response.headers['x-content-type-options'] == 'nosniff'
  assert response.headers['referrer-policy'] == 'no-referrer'
  assert response.headers['cross-origin-opener-policy'] == 'same-origin'
  assert 'camera=()' in response.headers['permissions-policy']
  stays = 'no-cache' if path == '/static/app.js' else 'no-store'
  assert response.headers['cache-control'] == stays


def test_pages_have_no_inline_script_style_or_address_elsewhere(site):
  browser = site.browser('olga')
  for path in ('/', '/progress', '/instructions', '/account', '/nothing'):
    text = browser.get(path).text
    assert not re.search(r'<style|<script(?![^>]* src="/static/)|\sstyle=|\son\w+=', text), path
    assert not re.search(r'(?:href|src|action)="(?!/|data:,"|#)', text), path


@pytest.mark.parametrize('host', ['evil.example', 'localhost.evil.example', '', '[::1'])
def test_other_hosts_are_refused(site, host):
  assert site.browser().get('/sign-in', headers={'Host': host}).status_code == 400


@pytest.mark.parametrize(
  'path',
  [
    '/static/../auth.py',
    '/static/..%2fauth.py',
    '/static/%2e%2e/auth.py',
    '/static//etc/passwd',
    '/static/..\\auth.py',
    '/static/templates/base.html',
    '/docs',
    '/redoc',
    '/openapi.json',
    '/static/',
  ],
)
def test_nothing_else_is_served(site, path):
  assert site.browser().get(path).status_code == 404


@pytest.mark.parametrize('chunked', [False, True])
@pytest.mark.parametrize('path', ['/judge', '/nothing', '/sign-in'])
def test_large_bodies_are_refused(site, path, chunked):
  browser = site.browser('ann')
  body = b'csrf=' + b'x' * labelling.SETTINGS.body_bytes
  content = iter([body[:1000], body[1000:]]) if chunked else body
  response = browser.request(
    'POST', path, content=content, headers={'content-type': 'application/x-www-form-urlencoded'}
  )
  if path == '/nothing' and chunked:  # nobody reads the body, and the connection closes
    assert (response.status_code, response.headers['connection']) == (404, 'close')
  else:
    assert response.status_code == 413


def test_an_error_shows_no_trace(fresh, monkeypatch):
  browser = fresh.browser('ann')

  def fail(*arguments):
    raise ValueError('a secret of the server')

  monkeypatch.setattr(fresh.store, 'next_task', fail)
  response = browser.get('/')
  assert response.status_code == 500
  assert 'Something went wrong' in response.text
  assert 'secret' not in response.text and 'Traceback' not in response.text
  assert response.headers['content-security-policy']


def test_a_full_database_is_an_error_that_the_annotator_sees(fresh):
  browser = fresh.browser('ann')
  browser.get('/')
  with fresh.store.database.engine.connect() as connection:
    pages = connection.exec_driver_sql('PRAGMA page_count').scalar()
  limit = lambda connection, *_: connection.execute(f'PRAGMA max_page_count = {pages}')
  app_lib.sa.event.listen(fresh.store.database.engine, 'checkout', limit)
  reason = {'answer': 'a1', 'reason': 'x' * 5000}  # more than a page of the file
  stored = 0
  while (response := browser.post('/judge', reason)).status_code == 303:
    stored += 1
    if browser.get('/').status_code != 200 or not browser.fields.get('lease'):
      break
  assert response.status_code == 503 and 'Not saved' in response.text
  assert 'feedback.db' not in response.text
  assert len(fresh.judgements()) == stored


@pytest.fixture
def served(fresh, caplog):
  """A page of its own, served on a free port; yields (page, port)."""
  caplog.set_level(logging.INFO)
  fresh.app.user_middleware.clear()
  settings = dataclasses.replace(labelling.SETTINGS, body_seconds=0.4)
  app = app_lib.create(fresh.store, fresh.project, settings=settings)
  config = serve.config(app, host='127.0.0.1', port=0, log_level='info')
  server = uvicorn.Server(config)
  listener = socket.socket()
  listener.bind(('127.0.0.1', 0))
  listener.listen()
  thread = threading.Thread(target=server.run, args=([listener],))
  thread.start()
  yield fresh, listener.getsockname()[1]
  server.should_exit = True
  thread.join()


def test_slow_clients_are_cut_off_and_logs_hide_links(served, caplog, monkeypatch):
  site, port = served
  monkeypatch.setattr(serve.Protocol, 'head_seconds', 0.4)
  for logger in ('uvicorn.access', 'uvicorn.error'):
    logging.getLogger(logger).addHandler(caplog.handler)
  slow = {
    'head': b'GET / HTTP/1.1\r\nHost: localhost\r\n',
    'body': b'POST /sign-in HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n'
    b'Content-Type: application/x-www-form-urlencoded\r\n\r\ncsrf=',
    'nothing': b'',
  }
  sockets = {}
  for name, data in slow.items():
    sockets[name] = socket.create_connection(('127.0.0.1', port), timeout=20)
    sockets[name].sendall(data)
  received = {name: read_all(item) for name, item in sockets.items()}
  assert received['head'] == received['nothing'] == b''
  assert received['body'].startswith(b'HTTP/1.1 408 ') and b'connection: close' in received['body']

  connection = http.client.HTTPConnection('127.0.0.1', port, timeout=20)
  token = site.links['ann']
  for path in (f'/sign-in/{token}', f'/Sign%2Din/{token}', f'//sign-in/{token}', f'/x?t={token}'):
    connection.request('GET', path)
    connection.getresponse().read()
  lines = [record.getMessage() for record in caplog.records if record.name == 'uvicorn.access']
  assert len(lines) == 5 and not any(token in line for line in lines)
  assert '"GET /sign-in/… HTTP/1.1" 200' in lines[1]


def read_all(connection):
  """Returns what a server sends until it closes the connection."""
  parts = []
  with connection:
    while part := connection.recv(4096):
      parts.append(part)
  return b''.join(parts)
