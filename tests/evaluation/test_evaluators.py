"""Evaluators against NumPy on recorded answers; when they run, and alone on a finished run."""

import collections
import json
import math
import sys

import jax
import numpy as np
import pytest
import sacrebleu

from rlhf_jax import errors
from rlhf_jax import evaluate
from rlhf_jax import intervals
from rlhf_jax import loop
from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms import reward_model
from rlhf_jax.algorithms import sft
from rlhf_jax.models import hf
from rlhf_jax.rewards import scoring
import tiny

TEMPERATURE = 0.7
PROMPTS, TOKENS = 10, 4
START = 3e-2  # a learning rate at which a few steps change most answers


def count_parameters(context):
  """A user's evaluator."""
  return lambda state: {'count': sum(x.size for x in jax.tree.leaves(context.policy(state)))}


def exits(context):
  sys.exit(0)


def exits_later(context):
  return exits


def of_nothing():
  return {}


def one_per_token(prompts, responses, *, response_tokens):
  """A metric with scores per token."""
  return [[1.0] * len(tokens) for tokens in response_tokens]


@pytest.fixture
def recorded(monkeypatch):
  """Every call of the reward function: list of (prompts, responses, token lists, scores)."""
  calls, score = [], tiny.good_words

  def record(prompts, responses, *, response_tokens, metadata):
    scores = score(prompts, responses, response_tokens=response_tokens, metadata=metadata)
    calls.append((prompts, responses, response_tokens, scores))
    return scores

  monkeypatch.setattr(tiny, 'good_words', record)
  return calls


def joined(calls):
  """The answers to the ten prompts, of three batches of four whose last two only fill up."""
  assert [len(call[0]) for call in calls] == [4, 4, 4]
  return [sum((list(call[part]) for call in calls), [])[:PROMPTS] for part in range(4)]


def blocks(world, *names):
  found = tiny.evals(world)
  for block in found.values():
    block['batch_size'] = 4
    block['sampling'] = block['sampling'] | {'temperature': TEMPERATURE}
  return {name: found[name] for name in names}


def logprob(model, params, prompt, response):
  """log p(response | prompt) at the temperature, from one unpadded forward pass, in NumPy."""
  row = np.array([prompt + response], np.int32)
  place = np.arange(row.shape[1], dtype=np.int32)[None]
  hidden, _ = model.forward(params, row, place, np.ones_like(row))
  logits = np.asarray(model.unembed(params, hidden), np.float64)[0] / TEMPERATURE
  total = 0.0
  for t in range(len(prompt), row.shape[1]):
    scores = logits[t - 1]
    total += scores[row[0, t]] - scores.max() - np.log(np.exp(scores - scores.max()).sum())
  return total


@pytest.mark.parametrize('algorithm', [ppo, sft])
def test_prompts_by_numpy(algorithm, world, recorded):
  config = tiny.ppo(world) if algorithm is ppo else tiny.sft(world, 'completion')
  config.evals = blocks(world, 'prompts')
  config.optim.learning_rate = START
  _, state, _, found = tiny.train(algorithm, config, 3)
  prompts, _, tokens, scores = joined(recorded[-3:])
  model, start = hf.load(world / 'model')
  policy = jax.device_get(state.params['policy'])
  ids = [[tiny.BOS, *(4 + int(word[1:]) for word in prompt.split())] for prompt in prompts]
  assert prompts == [tiny.text(7 * i, 1 + i % 5) for i in range(PROMPTS)]
  kl = [logprob(model, policy, *pair) - logprob(model, start, *pair) for pair in zip(ids, tokens)]
  assert len(set(map(len, tokens))) > 1  # some end before the others
  assert found == {
    'prompts/score': pytest.approx(np.mean(scores), rel=1e-6),
    'prompts/score_se': pytest.approx(np.std(scores, ddof=1) / math.sqrt(PROMPTS), rel=1e-6),
    'prompts/kl': pytest.approx(np.mean(kl), rel=1e-3, abs=1e-5),
    'prompts/length': sum(map(len, tokens)) / PROMPTS,
    'prompts/eos_rate': sum(row[-1] == tiny.EOS for row in tokens) / PROMPTS,
  }
  assert abs(found['prompts/kl']) > 0.01


def test_win_rate_by_numpy(world, recorded):
  config = tiny.ppo(world)
  config.evals = blocks(world, 'win_rate')
  config.optim.learning_rate = START
  _, _, _, found = tiny.train(ppo, config, 3)
  before, after = (np.array(joined(calls)[3]) for calls in (recorded[:3], recorded[-3:]))
  wins, draws = (after > before).sum(), (after == before).sum()
  assert 0 < wins and draws < PROMPTS
  assert found['win_rate/rate'] == pytest.approx((wins + draws / 2) / PROMPTS)
  assert found['win_rate/draws'] == pytest.approx(draws / PROMPTS)
  assert found['win_rate/low'] < found['win_rate/rate'] < found['win_rate/high']


def test_responses_to_one_prompt_are_clustered(world, recorded, tmp_path):
  """Three prompts, asked 3, 3 and 4 times."""
  prompts = [tiny.text(i % 3, 2) for i in range(PROMPTS)]
  config = tiny.sft(world, 'completion')
  config.evals = blocks(world, 'prompts', 'win_rate')
  for block in config.evals.values():
    block.path = str(
      tiny.write_jsonl(
        tmp_path / 'p.jsonl', [{'prompt': prompt, 'number': 0} for prompt in prompts]
      )
    )
  _, _, _, found = tiny.train(sft, config, 0)
  scores = joined(recorded[-3:])[3]
  assert found['prompts/score_se'] == pytest.approx(
    intervals.standard_error(scores, prompts), rel=1e-5
  )
  assert found['prompts/score_se'] != pytest.approx(intervals.standard_error(scores), rel=1e-3)
  # All draws, of three prompts: t^2 / (3 + t^2) / 2 on either side, with t = 4.3027 of 2.
  side = 4.3027**2 / (3 + 4.3027**2) / 2
  assert (found['win_rate/low'], found['win_rate/high']) == pytest.approx(
    (0.5 - side, 0.5 + side), abs=1e-5
  )


def test_text_reads_the_same_responses(world, recorded, tmp_path):
  """The same prompts and keys as those that the reward function saw; metrics of all together."""
  prompts = [tiny.text(7 * i, 1 + i % 5) for i in range(PROMPTS)]
  records = [{'prompt': p, 'number': i, 'answer': tiny.text(i, 4)} for i, p in enumerate(prompts)]
  config = tiny.sft(world, 'completion')
  config.evals = blocks(world, 'prompts', 'text')
  for block in config.evals.values():
    block.path = str(tiny.write_jsonl(tmp_path / 'prompts.jsonl', records))
  arguments = {'column': 'answer'}
  config.evals.text.metrics = {
    'chrf': {'function': 'rlhf_jax.rewards.text:corpus_chrf', 'arguments': arguments},
    'rouge': {'function': 'rlhf_jax.rewards.text:rouge_1', 'arguments': arguments},
    'length': {'function': 'rlhf_jax.rewards.text:length'},
    'ones': {'function': f'{__name__}:one_per_token'},
  }
  _, _, _, found = tiny.train(sft, config, 1)
  _, responses, tokens, _ = joined(recorded[-3:])
  words = [word for response in responses for word in response.split()]
  assert found['text/distinct_1'] == pytest.approx(len(set(words)) / len(words))
  assert found['text/mean_words'] == pytest.approx(len(words) / PROMPTS)
  answers = [record['answer'] for record in records]
  chrf = sacrebleu.CHRF().corpus_score(responses, [answers]).score / 100
  assert found['text/metrics/chrf'] == pytest.approx(chrf, rel=1e-5) and chrf > 0
  counts = lambda text: collections.Counter(text.split())
  f1 = [
    2 * (counts(a) & counts(r)).total() / (counts(a) + counts(r)).total()
    for a, r in zip(answers, responses)
  ]
  assert found['text/metrics/rouge'] == pytest.approx(np.mean(f1), rel=1e-5)
  mean_tokens = sum(map(len, tokens)) / PROMPTS
  assert found['text/metrics/length'] == found['text/metrics/ones'] == pytest.approx(mean_tokens)


@pytest.mark.parametrize('part', ['all', 'top layers', 'adapters'])
def test_a_policy_that_did_not_move_draws_with_itself(part, world):
  config = tiny.sft(world, 'completion')
  config.evals = blocks(world, 'prompts', 'win_rate')
  config.model.unfrozen_layers = 1 if part == 'top layers' else None
  config.model.lora.targets = (('attention/', 2, 4.0),) if part == 'adapters' else ()
  _, _, _, found = tiny.train(sft, config, 0)
  assert found['win_rate/rate'] == 0.5 and found['win_rate/draws'] == 1
  assert found['prompts/kl'] == pytest.approx(0, abs=1e-6)


def test_a_learned_scorer_and_a_stop_string(world):
  config = tiny.ppo(world)
  config.evals = blocks(world, 'prompts')
  config.evals.prompts.reward = {'model': f'{world}/reward'}
  words = tuple(f'w{i}' for i in range(0, tiny.WORDS, 2))
  config.evals.prompts.sampling = {'max_new_tokens': TOKENS, 'stop': words}
  _, _, _, found = tiny.train(ppo, config, 0)
  assert np.isfinite(found['prompts/score']) and found['prompts/length'] < 3
  assert found['prompts/eos_rate'] > 0.7


def test_reward_model_by_numpy(world, tmp_path):
  """Accuracy, margin, loss and ECE of pairs that are scored one at a time."""
  pairs = [
    {
      'prompt': tiny.text(i % 6, 2),
      'chosen': tiny.text(2 * i, 3),
      'rejected': tiny.text(5 * i + 1, 2),
    }
    for i in range(18)
  ]
  config = tiny.reward_model(world)
  config.evals.other = {'kind': 'loss', 'path': str(tiny.write_jsonl(tmp_path / 'p.jsonl', pairs))}
  learner, state, _, found = tiny.train(reward_model, config, 2)
  assert {'held_out/accuracy', 'other/accuracy'} < found.keys()
  model, _ = hf.load_reward(world / 'reward')
  ids = lambda pair, side: [
    tiny.BOS,
    *(4 + int(word[1:]) for word in f'{pair["prompt"]} {pair[side]}'.split()),
    tiny.EOS,
  ]
  params = jax.device_get(state.params['reward'])
  score = lambda row: float(
    scoring.score(params, np.array([row], np.int32), np.ones((1, len(row)), bool), model=model)[0]
  )
  gaps = np.array([score(ids(pair, 'chosen')) - score(ids(pair, 'rejected')) for pair in pairs])
  assert found['other/pairs'] == 18
  assert found['other/accuracy'] == pytest.approx(np.mean(gaps > 0))
  interval = intervals.rate(gaps > 0, [pair['prompt'] for pair in pairs])
  assert (found['other/accuracy_low'], found['other/accuracy_high']) == interval
  assert interval != intervals.rate(gaps > 0)
  assert found['other/margin'] == pytest.approx(np.mean(gaps), abs=1e-5)
  assert found['other/loss'] == pytest.approx(np.mean(np.log1p(np.exp(-gaps))), rel=1e-4)
  confidence, ece = 1 / (1 + np.exp(-np.abs(gaps))), 0.0
  for low in np.arange(10) / 20 + 0.5:  # ten bins of confidence over [0.5, 1]
    inside = (confidence > low) & (confidence <= low + 0.05)
    if inside.any():
      ece += inside.mean() * abs((gaps > 0)[inside].mean() - confidence[inside].mean())
  assert found['other/ece'] == pytest.approx(ece, abs=1e-4)


@pytest.mark.parametrize(
  'algorithm, block, message',
  [
    (
      'ppo',
      {'kind': 'loss'},
      "config.evals.x: kind='loss' needs an algorithm with a held-out loss",
    ),
    ('reward_model', 'text', "config.evals.x: kind='text' needs an algorithm that trains a policy"),
    (
      'sft',
      {'function': 'tiny:nothing'},
      "config.evals.x: function='tiny:nothing' cannot be loaded",
    ),
    (
      'sft',
      {'function': f'{__name__}:exits'},
      r'config.evals.x: the evaluator .*:exits called sys.exit\(0\), at .* in exits: ',
    ),
    (
      'sft',
      {'function': f'{__name__}:exits_later'},
      r'the evaluator .*:exits_later called sys.exit\(0\), at ',
    ),
    (
      'sft',
      {'function': f'{__name__}:of_nothing'},
      r'of_nothing.* takes \(\), but is called as f\(context\)',
    ),
    ('sft', {'kind': 'text', 'path': '/no.jsonl'}, 'config.evals.x: .*/no.jsonl'),
    (
      'sft',
      'long',
      'config.evals.x: prompts of up to 6 tokens and 30 new ones exceed the context of 32',
    ),
  ],
)
def test_unsupported_evaluators_are_named(algorithm, block, message, world):
  config = getattr(tiny, algorithm)(world)
  if isinstance(block, str):
    tokens = {'sampling': {'max_new_tokens': 30}} if block == 'long' else {}
    block = tiny.evals(world)['text'] | {'kind': 'text'} | tokens
  config.evals = {'x': block}
  with pytest.raises(errors.UserError, match=message):
    tiny.train({'ppo': ppo, 'sft': sft, 'reward_model': reward_model}[algorithm], config, 0)


@pytest.fixture(scope='module')
def finished(world, tmp_path_factory):
  """Five steps of PPO, each evaluator at its own pace."""
  config = tiny.ppo(world)
  config.evals = tiny.evals(world) | {'mine': {'function': f'{__name__}:count_parameters'}}
  config.evals.prompts.every, config.evals.text.every = 3, None
  config.steps, config.log_every = 5, 5
  folder = tmp_path_factory.mktemp('evaluated') / 'run'
  loop.run(config, folder)
  return folder


def lines(folder):
  return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_each_runs_when_it_is_due_and_at_the_end(finished):
  steps = lambda name: [line['step'] for line in lines(finished) if name in line]
  assert steps('win_rate/rate') == [1, 3, 4]
  assert steps('prompts/kl') == [2, 4]
  assert steps('text/unique') == steps('mine/count') == [4]
  assert not [line for line in lines(finished) if 'loss' in line and 'prompts/kl' in line]


def test_alone_they_give_the_last_numbers_of_the_loop(finished):
  last = lines(finished)[-1]
  assert last.pop('step') == 4
  step, found = evaluate.run(finished)
  assert step == 5 and found == last
  _, found = evaluate.run(finished, 'text,mine')
  assert found == {name: value for name, value in last.items() if name.startswith(('text', 'mine'))}


def test_evaluate_accepts_other_evaluators_than_the_run(finished, world):
  block = tiny.evals(world)['text'] | {'count': 3}
  _, found = evaluate.run(finished, json.dumps({'few': block | {'kind': 'text'}}))
  assert 'few/unique' in found and len(found) == 9
  for evals, message in (
    ('nothing', 'names nothing: the run has no evaluator of this name'),
    ('{"x"', 'is not JSON'),
  ):
    with pytest.raises(errors.UserError, match=message):
      evaluate.run(finished, evals)


def test_alone_without_a_run(tmp_path):
  with pytest.raises(errors.UserError, match='config.json cannot be read'):
    evaluate.run(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps({'stages': ['sft', 'ppo']}))
  with pytest.raises(errors.UserError, match='is a pipeline: name the folder of a stage'):
    evaluate.run(tmp_path)
