"""Judges: their kinds, their results, and mistakes in them."""

import http.server
import json
import threading

import numpy as np
import pytest

from rlhf_jax import errors
from rlhf_jax import policy as policy_lib
from rlhf_jax import types
from rlhf_jax.data import shapes
from rlhf_jax.evaluation import judges

HERE = __name__


def samples(responses, prompts=None):
  """Returns Samples of responses whose token ids are the lengths of their words."""
  rows = [[len(word) for word in response.split()] for response in responses]
  tokens, mask = np.zeros((len(rows), 4), np.int32), np.zeros((len(rows), 4), bool)
  for i, row in enumerate(rows):
    tokens[i, : len(row)], mask[i, : len(row)] = row, True
  prompts = prompts or ['p'] * len(rows)
  return policy_lib.Samples(prompts, responses, types.Rollout(tokens, mask, mask, None))


def single(prompt, response):
  return len(prompt) + len(response)


def batch(prompts, responses, *, response_tokens, metadata):
  return [sum(row) + entry['bonus'] for row, entry in zip(response_tokens, metadata)]


def per_token(prompts, responses, *, response_tokens, metadata):
  return [[1.0] * len(row) for row in response_tokens]


def plural(prompts, responses):
  return [len(response) for response in responses]


def longer(prompts, responses_a, responses_b):
  return [np.sign(len(a) - len(b)) for a, b in zip(responses_a, responses_b)]


def first_is_better(prompts, responses_a, responses_b, metadata):
  return [0.5 + entry['bonus'] / 2 for entry in metadata]


def too_sure(prompts, responses_a, responses_b):
  return [3.0 for _ in prompts]


def of_nothing():
  return 0


@pytest.mark.parametrize(
  'name, expected',
  [
    ('single', [3, 5]),  # 'p' and 'ab', 'p' and 'a bc'
    ('batch', [2 + 10, 3 + 20]),
    ('per_token', [1, 2]),
    ('plural', [2, 4]),
  ],
)
def test_scores(name, expected):
  judge = judges.load(f'{HERE}:{name}')
  scores = judge.score(samples(['ab', 'a bc']), [{'bonus': 10}, {'bonus': 20}], None)
  assert scores.tolist() == expected and judge.prefer is None
  assert (judge.score_text is not None) == (name == 'single')


def test_a_function_may_be_passed_itself():
  judge = judges.load(lambda prompt, response: 2.0)
  assert judge.score(samples(['a']), [{}], None).tolist() == [2.0]
  assert judges.load(judge) is judge


def test_pairs_are_shown_in_both_orders():
  a, b = samples(['abc', 'a', 'x']), samples(['ab', 'abc', 'y'])
  assert judges.load(f'{HERE}:longer').prefer(a, b, [{}] * 3).tolist() == [1, -1, 0]
  # A judge that always prefers the first position prefers neither response.
  biased = judges.load(f'{HERE}:first_is_better')
  assert biased.prefer(a, b, [{'bonus': 1}, {'bonus': 0}, {'bonus': 1}]).tolist() == [0, 0, 0]


def test_exact_match_ignores_white_space_at_the_ends():
  judge = judges.load('exact_match:answer')
  found = judge.score(samples([' 4\n', '4 5', '5']), [{'answer': x} for x in ('4', '45', 5)], None)
  assert found.tolist() == [1, 0, 1]
  judge.check_examples([shapes.Prompt('p', {'answer': 1})])
  with pytest.raises(
    errors.UserError, match="record 2 of the prompts has no column 'answer'. Its other.* are anser"
  ):
    judge.check_examples([shapes.Prompt('p', {'answer': 1}), shapes.Prompt('p', {'anser': 1})])


@pytest.mark.parametrize(
  'judge, message',
  [
    (f'{HERE}:missing', "judge='.*:missing' cannot be loaded"),
    ('no_such_module:f', "judge='no_such_module:f' cannot be loaded"),
    (f'{HERE}:of_nothing', r"judge='.*:of_nothing' takes \(\): it must be one of f\(prompt, resp"),
    (f'{HERE}:HERE', "judge='.*:HERE' is of type str: it must be a function"),
    ('reviews.gold_score', "judge='reviews.gold_score' names neither a function nor a folder"),
    ('exact_match:', "judge='exact_match:' names no column. Set judge to module:function, "),
  ],
)
def test_mistakes_are_found_before_anything_runs(judge, message):
  for function in (judges.check, judges.load):
    with pytest.raises(errors.UserError, match=message):
      function(judge)


def test_the_folder_of_a_reward_model_must_exist_when_it_is_loaded(tmp_path):
  judges.check(f'{tmp_path}/reward/model')  # an earlier stage may write it
  with pytest.raises(errors.UserError, match='gold=.*there is no such folder'):
    judges.load(f'{tmp_path}/reward/model', key='gold')


def test_a_preference_must_lie_between_minus_one_and_one():
  judge = judges.load(f'{HERE}:too_sure')
  with pytest.raises(errors.UserError, match='too_sure returned 3 for example 0.* from -1 '):
    judge.prefer(samples(['a']), samples(['b']), [{}])


def maker(path):
  """Returns a score that depends on data."""
  return lambda prompt, response: float(len(path))


def test_a_report_describes_the_judge():
  assert judges.load(f'{HERE}:maker', path='data').description == (
    f'{HERE}:maker: Returns a score that depends on data.'
  )
  assert judges.load(f'{HERE}:single').description == f'{HERE}:single'


class Lengths(http.server.BaseHTTPRequestHandler):
  """Scores a response by its length plus the bonus of its prompt."""

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
    pairs = zip(body['responses'], body['metadata'], strict=True)
    text = json.dumps({'scores': [len(text) + entry['bonus'] for text, entry in pairs]})
    self.send_response(200)
    self.send_header('Content-Length', str(len(text)))
    self.end_headers()
    self.wfile.write(text.encode())

  def log_message(self, *_):
    pass


def test_a_server_scores_responses():
  pytest.importorskip('httpx')
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Lengths)
  threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
  url = f'http://127.0.0.1:{server.server_port}'
  judge = judges.load(url)
  scores = judge.score(samples(['ab', 'a bc']), [{'bonus': 1}, {'bonus': 3}], None)
  server.shutdown()
  server.server_close()
  np.testing.assert_array_equal(scores, [3, 7])
  assert judge.description == f'{url}: The score of a server.'
  with pytest.raises(errors.UserError, match="judge='http://' must be an address"):
    judges.check('http://')


def test_people_are_asked_once_and_their_judgements_count(tmp_path):
  store_lib = pytest.importorskip('rlhf_jax.feedback.store')
  path = f'feedback:{tmp_path}/feedback.db#eval'
  judge = judges.load(path)
  answers = {
    'sft': samples(['bad', 'same', 'fine'], ['p', 'q', 'r']),
    'ppo': samples(['good', 'same', 'good'], ['p', 'q', 'r']),
  }
  with store_lib.Store.open(tmp_path / 'feedback.db') as store:
    with pytest.raises(errors.UserError, match="no project 'eval'"):
      judge.outcomes(answers)
    project = store.add_project('eval', overlap=2)
    with pytest.raises(errors.UserError, match='2 pairs .* of which 2 are new tasks'):
      judge.outcomes(answers)
    with pytest.raises(errors.UserError, match='2 pairs .* of which 0 are new tasks'):
      judge.outcomes(answers)
    # Ann prefers ppo to both prompts; Ben prefers it to p, and has a tie for r.
    for name in ('Ann', 'Ben'):
      person, _ = store.add_annotator(name)
      while lease := store.next_task(project, person):
        best = {c.text: c.id for c in lease.task.completions}['good']
        tie = name == 'Ben' and lease.task.prompt.text == 'r'
        store.judge(lease, person, {'tie': True} if tie else {'chosen': best}, token=lease.token)
    assert len(store.tasks(project)) == 2
    won = judge.outcomes(answers)
    np.testing.assert_array_equal(won['sft', 'ppo'], [0, 0.5, 0.25])
    # The same pairs the other way round.
    won = judge.outcomes({'ppo': answers['ppo'], 'sft': answers['sft']})
    np.testing.assert_array_equal(won['ppo', 'sft'], [1, 0.5, 0.75])
  with pytest.raises(errors.UserError, match='options round and simulated only'):
    judges.load(f'{path}?form=pairs').outcomes(answers)
  with pytest.raises(errors.UserError, match='name a store and a project'):
    judges.check('feedback:x.db')
