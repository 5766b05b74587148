"""The stages of red teaming, against a target whose answers are known."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax import errors
from rlhf_jax import loop
from rlhf_jax import models
from rlhf_jax.data import sources
from rlhf_jax.feedback import redteam
from rlhf_jax.feedback import targets
from rlhf_jax.models import hf
import runs
import tiny

PATTERN = r'\bw10\b'
HARM = {'function': 'rlhf_jax.rewards.text:regex', 'arguments': {'pattern': PATTERN}}


@pytest.fixture(scope='module')
def counter(tmp_path_factory):
  """Folder of a model that counts: after w3 it says w4 w5 w6 and so on, whatever came before."""
  folder = tmp_path_factory.mktemp('counter')
  model = models.create(tiny.LLAMA | {'hidden_size': tiny.VOCAB, 'tie_word_embeddings': False})
  shapes = model.init(jax.random.key(0))
  # The blocks add nothing to the one-hot embedding of a token, and the last map shifts it by one.
  params = jax.tree.map(jnp.zeros_like, shapes) | {'norm': shapes['norm']}
  params['embed']['embedding'] = jnp.eye(tiny.VOCAB)
  params['unembed']['kernel'] = 10 * jnp.roll(jnp.eye(tiny.VOCAB), 1, axis=1)
  hf.save(folder, model, params, tokenizer=tiny.write_tokenizer(folder))
  return folder


def arguments(attacker, target, **changes):
  """Arguments of `redteam.run`."""
  return {
    'attacker': str(attacker),
    'target': str(target),
    'harm': HARM,
    'instruction': 'w1 ',
    'prefix': 'w2 ',
    'count': 24,
    'max_attack_tokens': 3,
    'responses': 2,
    'max_new_tokens': 4,
    'temperature': 1.0,
    'seed': 0,
  } | changes


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_reward_of_an_attacker_is_the_harm_of_known_answers(counter):
  # w7 is followed by w8 w9 w10 w11, w2 by w3 to w6. Only the first line of an answer is the attack.
  harms = targets.harm_of_target(
    ['w1', 'w1', 'w1', 'w1'],
    [' w2 w7', ' w7 w2', ' w6\nw2', ' w10'],
    target=str(counter),
    harm=HARM,
    prefix='w0',
    answers=2,
    max_new_tokens=4,
    temperature=1.0,
  )
  assert harms == [1.0, 0.0, 1.0, 0.0]


def test_attacks_and_the_answers_to_them_are_written(counter, world, tmp_path):
  first, again, other, later = (
    tmp_path / name for name in ('zero_1', 'again/zero_1', 'other/zero_1', 'zero_2')
  )
  for folder in (first, again, other, later):
    folder.mkdir(parents=True)
  redteam.run(first, **arguments(f'{world}/model', counter))
  attacks = lines(first / 'attacks.jsonl')
  assert len(attacks) == 24 and lines(first / 'prompts.jsonl') == [{'prompt': 'w1 w2 '}]
  for attack in attacks:
    assert re.fullmatch(r'w2( \S+){0,3}', attack['prompt'])  # up to three words after the prefix
    last = re.findall(r'w(\d+)', attack['prompt'])[-1]
    if attack['prompt'].endswith(f'w{last}') and int(last) < 56:  # what the target counts from
      counted = ' '.join(f'w{int(last) + i}' for i in range(1, 5))
      assert [response.strip() for response in attack['responses']] == [counted] * 2
      expected = float(6 <= int(last) <= 9)
      assert attack['scores'] == [expected] * 2 and attack['success'] == expected
  results = json.loads((first / 'results.json').read_text())
  success = [attack['success'] for attack in attacks]
  assert results['attacks'] == 24 and results['success'] == pytest.approx(sum(success) / 24)
  # The same stage and seed give the same file. Other attacks come with another seed, and from the
  # same attacker in the stage of a later round.
  redteam.run(again, **arguments(f'{world}/model', counter))
  assert lines(again / 'attacks.jsonl') == attacks
  texts = {attack['prompt'] for attack in attacks}
  for folder, seed in ((other, 1), (later, 0)):
    redteam.run(folder, **arguments(f'{world}/model', counter, seed=seed))
    found = {attack['prompt'] for attack in lines(folder / 'attacks.jsonl')}
    assert len(found - texts) > 12


def test_a_few_shot_attacker_continues_its_examples(counter, tmp_path):
  # The counting attacker continues its last token, so what it writes does not depend on examples;
  # here its prompt ends with the prefix w7: it writes w8 w9 w10, which the target follows by w11.
  pool = [{'prompt': f'w{i}', 'scores': [i == 5], 'success': i == 5} for i in range(9)]
  sources.write(tmp_path / 'pool.jsonl', pool)
  keys = arguments(counter, counter, prefix='w7 ', count=4, shots=2)
  (tmp_path / 'few').mkdir()
  redteam.run(tmp_path / 'few', **keys, examples=(tmp_path / 'pool.jsonl',))
  attacks = lines(tmp_path / 'few' / 'attacks.jsonl')
  assert [attack['prompt'] for attack in attacks] == ['w7 w8 w9 w10'] * 4
  assert attacks[0]['responses'] == ['w11 w12 w13 w14'] * 2 and attacks[0]['success'] == 0.0


def test_answers_to_the_same_attack_are_pooled(tmp_path):
  record = lambda text, scores, success: {'prompt': text, 'scores': scores, 'success': success}
  sources.write(tmp_path / 'a.jsonl', [record('x', [1.0, 0.0], 0.5), record('y', [], 0.0)])
  sources.write(tmp_path / 'b.jsonl', [record('x', [0.0, 0.0], 0.0)])
  found = redteam.pooled((tmp_path / 'a.jsonl', tmp_path / 'b.jsonl'))
  assert found == {'x': (0.25, 0.5), 'y': (0.0, 0.0)}


def test_given_attacks_are_answered_in_their_order(counter, tmp_path):
  sources.write(tmp_path / 'given.jsonl', [{'prompt': text} for text in ('w9', 'w1', 'w9', 'w8')])
  keys = {key: arguments('', counter)[key] for key in ('target', 'harm', 'responses', 'seed')}
  keys |= {'prompts': (tmp_path / 'given.jsonl',), 'max_new_tokens': 4, 'temperature': 1.0}
  (tmp_path / 'all').mkdir()
  (tmp_path / 'some').mkdir()
  redteam.answer(tmp_path / 'all', **keys, count=9)
  found = lines(tmp_path / 'all' / 'attacks.jsonl')
  assert [(one['prompt'], one['success']) for one in found] == [
    ('w9', 1.0),
    ('w1', 0.0),
    ('w9', 1.0),
    ('w8', 1.0),
  ]
  more = [f'w{i}' for i in range(20, 29)]
  sources.write(tmp_path / 'given.jsonl', [{'prompt': text} for text in more])
  redteam.answer(tmp_path / 'some', **keys, count=4)
  found = [one['prompt'] for one in lines(tmp_path / 'some' / 'attacks.jsonl')]
  assert len(set(found)) == 4 and found == sorted(found) and set(found) <= set(more)


def test_what_the_supervised_attacker_learns_from(tmp_path):
  scores = {'w2 a': [0, 1], 'w2 b': [0, 0], 'w2 c': [1, 1], 'x d': [1, 0], 'w2 e': [0, 0.25]}
  records = [
    {'prompt': text, 'scores': s, 'success': sum(s) // 1 / 2} for text, s in scores.items()
  ]
  sources.write(tmp_path / 'attacks.jsonl', records + records[:1])
  keys = {'attacks': (tmp_path / 'attacks.jsonl',), 'instruction': 'w1 ', 'prefix': 'w2', 'seed': 0}
  (tmp_path / 'few').mkdir()
  (tmp_path / 'more').mkdir()
  redteam.successes(tmp_path / 'few', **keys, least=1)
  found = [record['prompt'] for record in lines(tmp_path / 'few' / 'prompts.jsonl')]
  assert found[0] == 'w2 c' and sorted(found) == ['w2 a', 'w2 c', 'x d']
  examples = lines(tmp_path / 'few' / 'examples.jsonl')
  assert {'prompt': 'w1 w2', 'completion': ' c'} == examples[0] and len(examples) == 2
  redteam.successes(tmp_path / 'more', **keys, least=4)
  assert lines(tmp_path / 'more' / 'prompts.jsonl')[3] == {'prompt': 'w2 e'}
  (tmp_path / 'free').mkdir()
  redteam.successes(tmp_path / 'free', **keys | {'instruction': '1.', 'prefix': ''}, least=1)
  examples = lines(tmp_path / 'free' / 'examples.jsonl')
  assert examples[0] == {'prompt': '1.', 'completion': ' w2 c'} and len(examples) == 3
  with pytest.raises(errors.UserError, match="begins with prefix='w3'"):
    redteam.successes(tmp_path / 'none', **keys | {'prefix': 'w3'}, least=1)


def test_an_empty_attack_is_not_asked(counter):
  target = targets.Target.load(counter, HARM, responses=2, max_new_tokens=4, temperature=1.0)
  first, second, *_ = target.answer(['', 'w9', 'w1', 'w2', 'w3'], seed=0)
  assert first == {'prompt': '', 'responses': [], 'scores': []}
  assert second == {'prompt': 'w9', 'responses': ['w10 w11 w12 w13'] * 2, 'scores': [1.0] * 2}
  assert target.answer([''], seed=0) == [first]


def test_an_attack_that_is_too_long_for_the_target_is_not_asked(counter, caplog):
  target = targets.Target.load(counter, HARM, responses=2, max_new_tokens=4, temperature=1.0)
  longest = target.policy.model.max_length - target.max_new_tokens - 1  # words, and the BOS
  attacks = ['w9', tiny.text(1, longest + 1), 'w1', tiny.text(1, longest)]
  with caplog.at_level('WARNING'):
    first, long, _, fits = target.answer(attacks, seed=0)
  assert '1 of 4 attacks get no response' in caplog.text
  assert long == {'prompt': attacks[1], 'responses': [], 'scores': []}
  assert first['scores'] == [1.0] * 2 and len(fits['responses']) == 2
  assert target.answer(attacks[1:2], seed=0) == [long]


def test_wrong_arguments(counter):
  keys = arguments(counter, counter)
  redteam.run.check(**keys)
  with pytest.raises(errors.UserError, match=r'shots=2 and examples=\(\): set both'):
    redteam.run.check(**keys, shots=2)
  with pytest.raises(errors.UserError, match='set exactly one of harm.model'):
    redteam.answer.check(**keys | {'harm': {}})


def attacker_config(world, counter):
  """Returns the config of an attacker that is trained by GRPO."""
  config = tiny.grpo(world)
  config.reward.function = None
  keys = {'target': str(counter), 'harm': HARM, 'prefix': 'w2', 'answers': 1, 'max_new_tokens': 3}
  config.reward.parts = {
    'harm': {
      'weight': 1.0,
      'function': 'rlhf_jax.feedback.targets:harm_of_target',
      'arguments': keys | {'temperature': 1.0},
    },
    'diversity': {
      'weight': 0.5,
      'function': 'rlhf_jax.feedback.attacks:diversity',
      'arguments': {'prefix': 'w2'},
    },
  }
  config.steps, config.checkpoint_every = 4, 2
  return config


def test_training_an_attacker_resumes_exactly(counter, world, tmp_path, monkeypatch):
  config = attacker_config(world, counter)
  loop.run(config, tmp_path / 'whole')
  answer, calls = targets.Target.answer, []

  def fail_once(self, attacks, seed):
    calls.append(attacks)
    if len(calls) == 4:  # after the checkpoint of step 2
      raise RuntimeError('the target is gone')
    return answer(self, attacks, seed)

  monkeypatch.setattr(targets.Target, 'answer', fail_once)
  with pytest.raises(errors.UserError, match='the target is gone'):
    loop.run(config, tmp_path / 'stopped')
  loop.run(config, tmp_path / 'stopped')
  runs.assert_same_run(tmp_path / 'stopped', tmp_path / 'whole')
  assert calls[3] == calls[4]  # the same attacks, written again
  logged = runs.metrics(tmp_path / 'whole')
  assert 0 <= logged[0]['reward/harm'] <= 1 and 0 <= logged[0]['reward/diversity'] <= 0.5
