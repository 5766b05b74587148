"""The comparison of policies, judges, and cross-validated baselines."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import errors
from rlhf_jax import intervals
from rlhf_jax import metrics
from rlhf_jax import models
from rlhf_jax import policy as policy_lib
from rlhf_jax import types
from rlhf_jax.data import shapes
from rlhf_jax.data import sources
from rlhf_jax.data import tokenizers
from rlhf_jax.evaluation import comparison
from rlhf_jax.evaluation import judges
from rlhf_jax.evaluation import policies
from rlhf_jax.evaluation import reward_models
from rlhf_jax.models import heads
from rlhf_jax.models import hf
from rlhf_jax.rewards import scoring
from rlhf_jax.tasks import hh
from rlhf_jax.tasks import polarity
import tiny


def answers(gold, *, proxy=None, kl=0.0, lengths=None):
  n = len(gold)
  mask = np.ones((n, 4), bool) if lengths is None else np.arange(4) < np.array(lengths)[:, None]
  rollout = types.Rollout(None, None, mask, None)
  samples = policy_lib.Samples(['p'] * n, ['a b c'] * n, rollout)
  return comparison.ScoredSamples(samples, proxy, np.array(gold, float), kl)


def test_rows_and_ratings_by_hand():
  rows, ratings = comparison.compare(
    {
      'base': answers([0, 0, 0, 0]),
      'new': answers(
        [1, 1, 1, -1], proxy=np.array([2.0, 4.0, 0.0, 2.0]), kl=6.0, lengths=[4, 4, 2, 2]
      ),
    },
    'base',
  )
  new = rows[1]
  assert new['gold'] == 0.5 and new['proxy'] == 2.0 and new['win_rate'] == 0.75
  assert new['gold_se'] == pytest.approx(1.0 / math.sqrt(4))  # s = 1 with n - 1
  assert new['kl_per_token'] == 2.0  # 6 nats over 3 tokens
  assert rows[0]['proxy'] is None
  # Three wins, a loss and a virtual draw: odds 3.5 to 1.5.
  assert ratings['base'].elo == pytest.approx(1000)
  assert ratings['new'].elo == pytest.approx(1000 + 400 * math.log10(3.5 / 1.5), abs=1e-3)


def test_errors_are_clustered_by_prompt():
  found = {'base': answers([0.0] * 4), 'new': answers([1, 3, 4, -4])}
  for answer in found.values():
    answer.samples.prompts = ['a', 'a', 'b', 'b']
  rows, ratings = comparison.compare(found, 'base')
  # Mean 1; sums of deviations 2 and -2: sqrt(2 / 1 * (4 + 4)) / 4 = 1.
  assert rows[1]['gold_se'] == pytest.approx(1.0)
  # Prompt b wins half, prompt a all: sums of deviations 1/2 and -1/2, so the variance of the rate
  # is 2 / 1 * (1/4 + 1/4) / 16 = 1/16 where that of 4 samples is 3/16 / 4: 3/4 of them count.
  assert intervals.effective_size(np.array([1, 1, 1, 0]), np.array([0, 0, 1, 1])) == pytest.approx(
    3
  )
  assert (rows[1]['win_low'], rows[1]['win_high']) == intervals.rate(
    [1, 1, 1, 0], ['a', 'a', 'b', 'b']
  )
  # t of one degree of freedom is 12.7.
  assert ratings['new'].high - ratings['new'].elo == pytest.approx(
    12.706 * ratings['new'].se, rel=1e-3
  )


def test_the_kl_of_greedy_responses_is_at_temperature_one(world):
  """Division of logits by temperature 0 would give infinity minus infinity."""
  old, new = (policy_lib.TextPolicy.load(world / 'model') for _ in range(2))
  new.params = jax.tree.map(lambda x: 1.5 * x, old.params)
  asked = comparison.ask(
    {'base': old, 'new': new},
    [shapes.Prompt('w7', {})],
    judges.load(lambda prompt, response: 0.0),
    comparison.Settings(baseline='base', max_new_tokens=4, temperature=0.0),
  )

  rollout = asked['new'].samples.rollout
  (row,), slots = rollout.tokens[rollout.mask][None], int(rollout.response_mask.sum())

  def total(policy):
    hidden, _ = policy.model.forward(
      policy.params, row[None], np.arange(len(row))[None], np.ones((1, len(row)), int)
    )
    logits = np.asarray(policy.model.unembed(policy.params, hidden[0]), np.float64)
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return sum(logp[t - 1, row[t]] for t in range(len(row) - slots, len(row)))

  assert slots > 1 and asked['base'].kl == 0.0 and abs(asked['new'].kl) > 0.1
  assert asked['new'].kl == pytest.approx(total(new) - total(old), rel=1e-4)


def test_frontier_joins_samples_and_metrics(tmp_path):
  writer = metrics.Writer(tmp_path)
  for step, kl in ((0, 0.0), (9, 2.5)):
    writer.write(step, {'objective/kl': kl})
  writer.samples(
    9,
    [
      {'prompt': prompt, 'response': 'a' * count, 'score': 1.5, 'postprocessed_score': -1.0}
      for prompt, count in (('p', 1), ('p', 3), ('q', 4), ('q', 4))
    ],
  )
  writer.close()
  judge = judges.load(lambda prompt, response: float(len(response)))
  [point] = policies.frontier(tmp_path, judge)
  # As in test_intervals.py: two prompts, not four samples.
  assert point == {'step': 9, 'kl': 2.5, 'gold': 3.0, 'gold_se': 1.0, 'proxy': 1.5}


def test_a_reward_model_with_another_tokenizer_reads_texts(world, tmp_path):
  """Policy and reward model have different tokenizers, so token ids cannot be shared."""
  own = tokenizers.train_bpe(['w1 w2 w3'], 270, tmp_path)
  model = models.create(tiny.LLAMA | {'vocab_size': 270, 'max_position_embeddings': 48})
  params = {
    'backbone': model.init(jax.random.key(5)),
    'head': heads.init_scalar(jax.random.key(6), model.width, scale='normal'),
  }
  hf.save(tmp_path, model, params['backbone'], tokenizer=own, head=params['head'])
  asked, prompts, responses = tokenizers.load(world / 'tokenizer'), ['w1 w2', 'w3'], ['w6', 'w8 w9']
  tokens = np.array([[tiny.BOS, 5, 6, 10, tiny.EOS], [tiny.PAD, tiny.BOS, 7, 12, 13]], np.int32)
  mask = tokens != tiny.PAD
  samples = policy_lib.Samples(prompts, responses, types.Rollout(tokens, mask, mask[:, 3:], None))
  found = reward_models.RewardModel.load(tmp_path).score_samples(samples, asked)

  expect = jax.jit(lambda *row: scoring.score(params, *row, model=model))
  for i, ended in enumerate((True, False)):
    row = own.encode(prompts[i]) + own.encode(responses[i], add_special_tokens=False)
    row += [own.eos_token_id] * ended
    padded = jnp.asarray([row + [own.pad_token_id] * (48 - len(row))])
    assert found[i] == pytest.approx(
      float(expect(padded, jnp.arange(48)[None] < len(row))[0]), abs=1e-5
    )
  same = reward_models.RewardModel.load(world / 'reward')
  np.testing.assert_array_equal(
    same.score_samples(samples, asked),
    same.score_tokens(samples.rollout.tokens, samples.rollout.mask),
  )


def test_judge_learns_words(tmp_path):
  path = tmp_path / 'judge.jsonl'
  sources.write(
    path,
    [
      {'text': f'a {word} film {i}', 'label': label}
      for i in range(20)
      for word, label in (('lovely', 1), ('dreary', 0))
    ],
  )
  call = polarity.sentiment(str(path))
  assert call('what a', ' lovely time') == 1.0 and call('a dreary', ' time') == 0.0


def test_bag_of_words_baseline_ranks_unseen_pairs():
  train = [(f'kind words {i}', f'rude words {i}') for i in range(30)]
  gaps = hh.bag_of_words(train, [('kind soul', 'rude soul'), ('rude', 'kind')])
  assert gaps[0] > 0 > gaps[1]


COUNT, SLOTS, BEST_OF, TEMPERATURE = 12, 5, 4, 0.7
SAMPLED = dict(max_new_tokens=SLOTS, temperature=TEMPERATURE, truncate_at='w5', truncate_after=1)


def mean_word(prompt, response):
  """Returns a gold score: the mean number of the words."""
  del prompt
  return float(np.mean([int(word[1:]) for word in response.split()] or [0]))


def ids(text):
  return [4 + int(word[1:]) for word in text.split()]


def padded(row):
  """Returns one row of tokens and its mask, [1, 16] each."""
  tokens = np.pad(np.array([row], np.int32), ((0, 0), (0, 16 - len(row))))
  return tokens, np.arange(16)[None] < len(row)


@pytest.fixture(scope='module')
def proxy(world):
  """Returns the reward model's score of a row of tokens alone, without padding before it."""
  model, params = hf.load_reward(world / 'reward')
  score = jax.jit(functools.partial(scoring.score, params, model=model))
  return lambda row: float(score(*padded(row))[0])


@pytest.fixture(scope='module')
def compared(world, tmp_path_factory):
  """Runs a full evaluation of two policies; returns its results and its folder."""
  folder, model = tmp_path_factory.mktemp('compared'), models.create(tiny.LLAMA)
  hf.save(
    folder / 'ppo' / 'model',
    model,
    model.init(jax.random.key(9)),
    tokenizer=tiny.write_tokenizer(folder / 'ppo' / 'model'),
  )
  metrics.Writer(folder / 'ppo').close()
  (folder / 'config.json').write_text('{}')
  policies.run(
    folder,
    title='Two',
    summary='',
    workdir=folder,
    policies=(('base', str(world / 'model')), ('ppo', str(folder / 'ppo'))),
    baseline='base',
    trained='ppo',
    best_of=BEST_OF,
    reward_model=str(world / 'reward'),
    comparisons=str(world / 'comparisons.jsonl'),
    prompts=str(world / 'prompts.jsonl'),
    samples=COUNT,
    gold=f'{__name__}:mean_word',
    gold_path='',
    curves=('ppo',),
    seed=3,
    **SAMPLED,
  )
  return json.loads((folder / 'results.json').read_text()), folder


def rows_of(samples):
  """Returns the tokens of each sample without padding."""
  rollout = samples.rollout
  return [tokens[mask].tolist() for tokens, mask in zip(rollout.tokens, rollout.mask)]


def test_the_best_of_n_is_the_best_by_the_reward_model(compared, world, proxy):
  """The last random key draws the samples of best-of-n; each policy has its own key before it."""
  base = policy_lib.TextPolicy.load(world / 'model')
  samples = base.sample(
    [tiny.text(7 * i, 1 + i % 5) for i in range(COUNT)],
    jax.random.split(jax.random.key(3), 3)[-1],
    samples=BEST_OF,
    **SAMPLED,
  )
  scores = np.reshape([proxy(row) for row in rows_of(samples)], (COUNT, BEST_OF))
  gold = np.reshape([mean_word('', text) for text in samples.responses], (COUNT, BEST_OF))
  best = scores.argmax(axis=1)
  names = [row['stage'] for row in compared[0]['stages']]
  assert names == ['base', f'best of {BEST_OF}', 'ppo']
  row = compared[0]['stages'][1]
  assert row['proxy'] == pytest.approx(scores.max(axis=1).mean(), abs=1e-5)
  assert row['gold'] == pytest.approx(gold[np.arange(COUNT), best].mean())
  assert row['kl'] == pytest.approx(math.log(4) - 3 / 4)  # Stiennon et al. 2020, appendix G.3
  parts = json.loads((compared[1] / policies.REPORT).read_text())
  first, *_, last = parts['best_of']
  assert (last['gold'], last['kl']) == (pytest.approx(row['gold']), row['kl'])
  assert first['gold'] == pytest.approx(gold.mean())  # best of 1
  assert (
    parts['gold'] == f'{__name__}:mean_word: Returns a gold score: the mean number of the words.'
  )


def test_the_kl_is_of_the_policy_from_the_baseline(compared, world):
  """The KL on the policy's own samples, at their sampling temperature, row by row."""
  loaded = [policy_lib.TextPolicy.load(path) for path in (compared[1] / 'ppo', world / 'model')]
  samples = loaded[0].sample(
    [tiny.text(7 * i, 1 + i % 5) for i in range(COUNT)],
    jax.random.split(jax.random.key(3), 3)[1],
    **SAMPLED,
  )
  total = 0.0
  for sign, policy in zip((1, -1), loaded):
    logits = jax.jit(
      lambda tokens, mask, policy=policy: policy.model.unembed(
        policy.params,
        policy.model.forward(policy.params, tokens, np.arange(16)[None], mask.astype(np.int32))[0],
      )
    )
    for row, real in zip(rows_of(samples), samples.rollout.response_mask):
      scores = np.asarray(logits(*padded(row)), np.float64)[0] / TEMPERATURE
      for t in range(len(row) - real.sum(), len(row)):
        total += sign * (scores[t - 1, row[t]] - np.log(np.exp(scores[t - 1]).sum()))
  row = compared[0]['stages'][2]
  assert row['kl'] == pytest.approx(total / COUNT, rel=1e-3) and abs(row['kl']) > 0.05
  assert row['kl_per_token'] == pytest.approx(
    row['kl'] * COUNT / samples.rollout.response_mask.sum(), rel=1e-4
  )


def test_comparisons_are_scored_like_responses(compared, world, proxy):
  """If a token ends responses, they have no EOS, so completions get none either."""
  gaps = []
  for line in (world / 'comparisons.jsonl').read_text().splitlines():
    pair = json.loads(line)
    chosen, rejected = (
      proxy([tiny.BOS, *ids(pair['prompt']), *ids(pair[side])]) for side in ('chosen', 'rejected')
    )
    gaps.append(chosen - rejected)
  found = compared[0]['reward_model']
  assert found['count'] == len(gaps) == 48
  assert found['margin'] == pytest.approx(np.mean(gaps), abs=1e-5)
  assert found['accuracy'] == pytest.approx(np.mean(np.array(gaps) > 0))


def test_each_gap_has_its_own_prompt_in_every_batch(world, proxy, tmp_path, monkeypatch):
  monkeypatch.setattr(policy_lib, 'BATCH_SIZE', 4)
  records = [
    {'prompt': tiny.text(i, 1 + i % 2), 'completions': [tiny.text(3 * i, 2), tiny.text(5 * i, 3)]}
    for i in range(10)
  ]
  path = tiny.write_jsonl(tmp_path / 'pairs.jsonl', records)
  gaps, prompts = reward_models.pair_gaps(
    reward_models.RewardModel.load(world / 'reward'), str(path)
  )
  assert prompts == [record['prompt'] for record in records]
  expected = [
    [
      proxy([tiny.BOS, *ids(record['prompt']), *ids(text), tiny.EOS])
      for text in record['completions']
    ]
    for record in records
  ]
  np.testing.assert_allclose(gaps, [better - worse for better, worse in expected], atol=1e-5)


def test_texts_before_and_after_have_their_own_scores():
  before, after = answers([1, 2]), answers([3, 4], proxy=np.array([5.0, 6.0]))
  before.samples.responses, after.samples.responses = ['a', 'b'], ['c', 'd']
  assert comparison.side_by_side(before, after, 1) == [
    {
      'prompt': 'p',
      'before': 'a',
      'after': 'c',
      'scores': {'before': {'gold': 1.0}, 'after': {'proxy': 5.0, 'gold': 3.0}},
    }
  ]


def words(prompts, responses_a, responses_b, *, metadata):
  """Returns a judge of pairs that prefers the response with the higher mean number of words."""
  assert all('number' in entry for entry in metadata)
  mean = lambda text: mean_word('', text)
  return [np.sign(mean(a) - mean(b)) for a, b in zip(responses_a, responses_b)]


def test_a_judge_of_pairs_gives_the_rates_and_ratings_of_its_scores(compared, world):
  """Preferences from pairs and from scores give equal win rates and Elo ratings."""
  paths = {'base': world / 'model', 'ppo': compared[1] / 'ppo'}
  loaded = {name: policy_lib.TextPolicy.load(path) for name, path in paths.items()}
  examples = loaded['base'].read_examples(world / 'prompts.jsonl')
  settings = comparison.Settings(samples=COUNT, seed=3, **SAMPLED)
  by_pairs, by_scores = (
    comparison.compare_policies(loaded, examples, judges.load(function), settings)
    for function in (words, mean_word)
  )
  assert by_pairs.baseline == 'base' and by_pairs.rows[1]['gold'] is None
  columns = ('stage', 'kl', 'win_rate', 'win_low', 'win_high', 'elo', 'elo_low', 'distinct_2')
  for one, other in zip(by_pairs.rows, by_scores.rows, strict=True):
    assert [one[key] for key in columns] == [other[key] for key in columns]
  assert by_scores.rows[1]['win_rate'] not in (0.0, 0.5, 1.0)


STAGE = {
  'policies': (('sft', 'a'), ('ppo', 'b')),
  'baseline': 'sft',
  'trained': 'ppo',
  'best_of': 0,
  'reward_model': '',
  'comparisons': '',
  'gold': f'{__name__}:mean_word',
  'gold_path': '',
}


@pytest.mark.parametrize(
  'changes, message',
  [
    ({}, None),
    ({'baseline': 'sftt'}, "baseline='sftt' is not the name of a policy.* Did you mean 'sft'"),
    ({'trained': 'grpo'}, "trained='grpo' is not the name of a policy.* They are sft, ppo."),
    ({'gold': f'{__name__}:mean_wrod'}, "gold='.*:mean_wrod' cannot be loaded"),
    ({'best_of': 4}, 'best_of=4 needs a reward model'),
    ({'comparisons': 'x'}, "comparisons='x' needs a reward model"),
  ],
)
def test_mistakes_of_the_stage_are_found_before_the_first_stage_runs(changes, message):
  if message is None:
    policies.run.check(**STAGE | changes)
  else:
    with pytest.raises(errors.UserError, match=message):
      policies.run.check(**STAGE | changes)
