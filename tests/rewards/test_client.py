"""Rewards over HTTP from real servers on this machine: slow, broken, restarted, and wrong."""

import http.server
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from rlhf_jax import errors
from rlhf_jax.models import heads
from rlhf_jax.models import hf
from rlhf_jax.rewards import client
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import server
import tiny

pytest.importorskip('httpx')
PROMPTS, RESPONSES = ['p', 'q', 'r', 'p', 'q'], ['a', 'b b', 'c', 'd d d', '']
METADATA = [{'number': i, 'nested': {'x': [i]}} for i in range(5)]
ROOT = pathlib.Path(__file__).resolve().parents[2]


class Scripted(http.server.ThreadingHTTPServer):
  """A server that gives some answers first, each (status, body) or seconds, and then scores.

  A score is the length of the response plus 10 times the number in the metadata. `requests` are the
  bodies that it received.
  """

  def __init__(self, *first):
    self.first, self.requests, self.lock = list(first), [], threading.Lock()
    super().__init__(('127.0.0.1', 0), Handler)
    self.url = f'http://127.0.0.1:{self.server_port}/score'
    threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
    with self.server.lock:
      self.server.requests.append(body)
      answer = self.server.first.pop(0) if self.server.first else None
    if answer == 'closes':
      self.connection.close()
      return
    if isinstance(answer, float):
      time.sleep(answer)
      answer = None
    scores = [
      len(response) + 10 * entry['number']
      for response, entry in zip(body['responses'], body['metadata'], strict=True)
    ]
    status, text = answer or (200, json.dumps({'scores': scores}))
    promised = len(text) + 9 * (status == 299)  # a body that ends too early
    self.send_response(200 if status == 299 else status)
    self.send_header('Content-Length', str(promised))
    self.end_headers()
    self.wfile.write(text.encode())

  def log_message(self, *_):
    pass


def score(url, *, limit=functions.Limit(), **settings):
  """Computes the scores of five responses, as in a run."""
  settings = {'first_pause': 0.01, 'timeout': 30.0} | settings
  return functions.call(
    client.reward(url, client.Settings(**settings)),
    PROMPTS,
    RESPONSES,
    response_tokens=[[1]] * 5,
    metadata=METADATA,
    response_length=3,
    limit=limit,
  )


EXPECTED = [1, 13, 21, 35, 40]


@pytest.mark.parametrize('size, requests', [(None, 1), (2, 3), (5, 1)])
def test_requests_hold_the_batch_in_order(size, requests):
  with Scripted() as site:
    assert score(site.url, size=size).tolist() == EXPECTED
    assert len(site.requests) == requests
    for name, values in (('prompts', PROMPTS), ('responses', RESPONSES), ('metadata', METADATA)):
      assert [value for request in site.requests for value in request[name]] == values
    site.shutdown()


def test_a_request_without_an_answer_is_repeated_and_no_example_is_scored_twice(caplog):
  """Late, broken, busy, absent or truncated answers; the late answer is never used."""
  first = [4.0, (500, 'oh'), (429, ''), 'closes', (299, '{"scores": [1, '), (503, '<html>')]
  with Scripted(*first) as site:
    assert score(site.url, size=3, timeout=2.0).tolist() == EXPECTED
    assert len(site.requests) == len(first) + 2
    assert all(request == site.requests[0] for request in site.requests[:-1])
    site.shutdown()
  assert 'try 1 of 8: no answer within 2 seconds' in caplog.text
  assert "try 2 of 8: status 500, 'oh'" in caplog.text


WRONG = {
  'too few': ((200, '{"scores": [1, 2]}'), ['answered 2 scores for 5 responses']),
  'no JSON': ((200, '<html>'), ["answered '<html>', but {", '5 numbers', 'JSONDecodeError']),
  'no scores': ((200, '{"score": [1]}'), ['"score": [1]', "KeyError: 'scores'"]),
  'a list': ((200, '[1, 2, 3, 4, 5]'), ['[1, 2, 3, 4, 5]', 'TypeError']),
  'a number': ((200, '{"scores": 5}'), ['scores is not a list']),
  'NaN': (
    (200, '{"scores": [1, 2, null, 4, 5]}'),
    ['returned nan for example 2, prompt', "config.reward.on_nan='skip'"],
  ),
  'a text': (
    (200, '{"scores": [1, "2", 3, 4, 5]}'),
    ["returned '2' for example 1, prompt 'q', response 'b b'", 'is a str'],
  ),
  'infinity': ((200, '{"scores": [1, 2, 3, 1e999, 5]}'), ['inf for example 3', 'finite']),
  'lists': ((200, '{"scores": [[1], [2], [3], [4], [5, 6]]}'), ['[5, 6] for example 4']),
  'refused': ((404, 'Not Found'), ["refused the request: status 404, 'Not Found'", 'POST']),
  'moved': ((302, ''), ['refused the request: status 302']),
}


@pytest.mark.parametrize('answer, parts', WRONG.values(), ids=WRONG)
def test_a_wrong_answer_stops_the_run_and_says_what_it_was(answer, parts):
  with Scripted(answer) as site:
    with pytest.raises(errors.UserError) as caught:
      score(site.url)
    assert len(site.requests) == 1
    site.shutdown()
  for part in [site.url, *parts]:
    assert part in str(caught.value), str(caught.value)


def test_null_is_nan_if_that_is_allowed():
  with Scripted((200, '{"scores": [1, 2, null, 4, 5]}')) as site:
    scores = score(site.url, limit=functions.Limit(allow_nan=True))
    np.testing.assert_array_equal(scores, [1, 2, np.nan, 4, 5])
    site.shutdown()


def test_a_server_that_never_answers_is_named_with_its_last_error():
  with Scripted(*[(500, 'no memory')] * 3) as site:
    with pytest.raises(
      errors.UserError,
      match=f"server {site.url} gave no answer in 3 tries; the last: status 500, 'no memory'. Once "
      'it runs, the same command resumes; config.reward.attempts and',
    ):
      score(site.url, attempts=3)
    site.shutdown()
  with pytest.raises(errors.UserError, match='in 2 tries; the last: ConnectError'):
    score(f'http://127.0.0.1:{free_port()}', attempts=2)


def test_metadata_that_is_no_json_is_named():
  with pytest.raises(errors.UserError, match='cannot be sent .* as JSON .*NaN|not JSON compliant'):
    client.encode(['p'], ['r'], [{'x': float('nan')}], 'http://a')
  with pytest.raises(errors.UserError, match='bytes is not JSON serializable'):
    client.encode(['p'], ['r'], [{'x': b'1'}], 'http://a')


# The reference server.


def free_port():
  with socket.socket() as one:
    one.bind(('127.0.0.1', 0))
    return one.getsockname()[1]


SOURCE = """
def grade(prompts, responses, *, metadata):
  if 'fails' in responses:
    raise ValueError('no reward')
  nan = float('nan')
  return [nan if r == '' else len(r) + 10 * m['number'] for r, m in zip(responses, metadata)]
"""


def test_the_reference_server_scores_survives_errors_and_is_awaited_while_it_restarts(tmp_path):
  (tmp_path / 'mine_for_server.py').write_text(SOURCE)
  port = free_port()

  def start():
    return subprocess.Popen(
      [
        *(sys.executable, '-m', 'rlhf_jax.rewards.server'),
        *('--function=mine_for_server:grade', f'--port={port}'),
      ],
      cwd=tmp_path,
      env=os.environ | {'PYTHONPATH': str(ROOT)},
    )

  running = start()
  reward = client.reward(f'http://127.0.0.1:{port}', client.Settings(attempts=20))
  ask = lambda responses: reward(
    PROMPTS[: len(responses)],
    responses,
    response_tokens=None,
    metadata=METADATA[: len(responses)],
  )
  try:
    assert ask(['a', 'b b']) == [1.0, 13.0]  # waits until the server has started
    assert np.isnan(ask([''])).all()
    impatient = client.reward(f'http://127.0.0.1:{port}', client.Settings(attempts=1))
    with pytest.raises(errors.UserError, match='status 500.*grade raised ValueError: no reward'):
      impatient(['p'], ['fails'], response_tokens=None, metadata=[{}])
    running.kill()
    running.wait()
    running = start()
    assert ask(['c']) == [1.0]
  finally:
    running.kill()
    running.wait()


@pytest.mark.slow
def test_a_reward_model_behind_the_server_gives_its_scores(world):
  """Compares with the reward model itself; the application runs without a socket."""
  testclient = pytest.importorskip('fastapi.testclient')
  from rlhf_jax.evaluation import reward_models

  site = testclient.TestClient(server.make(server.of_model(f'{world}/reward')))
  texts = {'prompts': ['w1', 'w2 w3'], 'responses': ['w4 w5', 'w6']}
  answer = site.post('/', json=texts | {'metadata': [{}, {}]})
  expected = reward_models.RewardModel.load(f'{world}/reward').score(*texts.values())
  np.testing.assert_allclose(answer.json()['scores'], expected, atol=1e-5)
  answer = site.post('/', json=texts | {'metadata': [{}]})
  assert answer.status_code == 422 and 'different lengths' in answer.text


def test_the_server_of_a_model_with_several_heads_gives_their_mean(world, tmp_path):
  model, params = hf.load_reward(world / 'reward')
  head = heads.init_scalar(jax.random.key(5), model.width, scale='normal', count=3)
  save = lambda head: hf.save(
    tmp_path / 'model',
    model,
    params['backbone'],
    tokenizer=tiny.write_tokenizer(tmp_path / 'model'),
    head=head,
  )
  save(head)
  of_heads = server.of_model(tmp_path / 'model')
  save(heads.mean(head))
  data = {'response_tokens': [[]] * 2, 'metadata': [{}] * 2}
  texts = ['w1', 'w2 w3'], ['w4 w5', 'w6']
  found, expected = of_heads(*texts, **data), server.of_model(tmp_path / 'model')(*texts, **data)
  assert found.shape == (2,)
  np.testing.assert_allclose(found, expected, atol=1e-6)
