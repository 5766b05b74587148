"""Reward models: a task to learn, K-way losses by loops over pairs, padding and normalization."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers

from rlhf_jax import errors
from rlhf_jax import models
from rlhf_jax import optim
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import reward_model
from rlhf_jax.data import tokenizers
from rlhf_jax.models import heads
from rlhf_jax.models import hf
from rlhf_jax.rewards import learned
from rlhf_jax.rewards import scoring
from rlhf_jax.types import Comparisons
import tiny

B, K, T = 8, 4, 9
PLAIN = reward_model.Settings(
  loss='pairwise', centering=0.0, label_smoothing=0.0, token_dropout=0.0
)


@pytest.fixture(scope='module')
def llama():
  model = models.create(tiny.LLAMA)
  head = heads.init_scalar(jax.random.key(4), model.width, scale='normal')
  return model, {'backbone': model.init(jax.random.key(3)), 'head': head}


@pytest.fixture(scope='module')
def score_of(llama):
  model, params = llama
  return functools.partial(jax.jit(functools.partial(scoring.score, model=model)), params)


def comparisons(seed=0, garbage=0):
  """Returns two to four completions of each prompt, some tied; padding holds `garbage`."""
  rng = np.random.default_rng(seed)
  present = np.arange(K)[None] < rng.integers(2, K + 1, (B, 1))
  mask = (np.arange(T) < rng.integers(2, T + 1, (B, K, 1))) & present[..., None]
  tokens = np.where(mask, rng.integers(4, tiny.VOCAB, (B, K, T)), garbage)
  return Comparisons(
    tokens=tokens.astype(np.int32),
    mask=mask,
    present=present,
    ranks=np.where(present, rng.integers(0, 3, (B, K)), garbage).astype(np.int32),
    ratings=np.where(present, rng.normal(size=(B, K)), garbage).astype(np.float32),
    margin=rng.uniform(0, 0.5, B).astype(np.float32),
  )


def loss_of(llama, batch, settings):
  model, params = llama
  loss, valid, scores = jax.jit(
    functools.partial(reward_model.comparison_loss, model=model, settings=settings)
  )(params, batch)
  return np.asarray(loss), np.asarray(valid), np.asarray(scores)


def test_it_learns_which_words_are_good(world, tmp_path):
  config = tiny.reward_model(world)
  config.optim.learning_rate = 1e-2
  _, _, history, held_out = tiny.train(reward_model, config, 60)
  assert history[0]['loss'] > 0.4 and history[-1]['loss'] < 0.05
  assert history[-1]['accuracy'] == 1 and history[-1]['ties'] == 0
  assert held_out['held_out/accuracy'] > 0.9 and held_out['held_out/pairs'] == 10
  assert held_out['held_out/ece'] < 0.2


def test_k_way_loss_is_the_mean_over_pairs_scored_one_by_one(llama, score_of):
  """Ouyang et al. 2022, eq. 1: each prompt has the same weight, for any number of pairs."""
  batch = comparisons()
  settings = dataclasses.replace(PLAIN, centering=0.01, label_smoothing=0.1)
  loss, valid, scores = loss_of(llama, batch, settings)
  for b in range(B):
    single = [
      float(
        score_of(jnp.asarray(batch.tokens[b, k : k + 1]), jnp.asarray(batch.mask[b, k : k + 1]))[0]
      )
      for k in range(K)
    ]
    np.testing.assert_allclose(
      scores[b][batch.present[b]], np.array(single)[batch.present[b]], atol=1e-5
    )
    pairs = []
    for i in np.flatnonzero(batch.present[b]):
      for j in np.flatnonzero(batch.present[b]):
        if batch.ranks[b, i] < batch.ranks[b, j]:
          gap = single[i] - single[j] - batch.margin[b]
          pairs.append(
            0.9 * np.logaddexp(0, -gap)
            + 0.1 * np.logaddexp(0, gap)
            + 0.01 * (single[i] + single[j]) ** 2
          )
    assert valid[b] == bool(pairs)
    np.testing.assert_allclose(loss[b], np.mean(pairs) if pairs else 0.0, rtol=1e-5, atol=1e-6)
  assert not valid.all() and valid.any()  # a prompt with ties only has no pair


def test_k_way_gradient_is_the_sum_over_pairs(llama):
  """One forward pass per completion gives the gradient of all its pairs."""
  model, params = llama
  batch = comparisons(seed=2)

  def total(params, batch):
    loss, _, _ = reward_model.comparison_loss(params, batch, model=model, settings=PLAIN)
    return jnp.sum(loss)

  gradient = jax.jit(jax.grad(total))
  whole = gradient(params, batch)
  parts = jax.tree.map(jnp.zeros_like, whole)
  for b in range(B):
    pairs = [
      (i, j)
      for i in range(K)
      for j in range(K)
      if batch.present[b, [i, j]].all() and batch.ranks[b, i] < batch.ranks[b, j]
    ]
    for pair in pairs:
      one = jax.tree.map(lambda x: x[b : b + 1, list(pair)] if x.ndim > 1 else x[b : b + 1], batch)
      parts = jax.tree.map(lambda a, g: a + g / len(pairs), parts, gradient(params, one))
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('loss', ['pairwise', 'pick_best', 'rating'])
def test_absent_completions_and_padding_change_nothing(llama, loss):
  settings = dataclasses.replace(PLAIN, loss=loss)
  for clean, dirty in zip(
    loss_of(llama, comparisons(), settings)[:2],
    loss_of(llama, comparisons(garbage=tiny.EOS), settings)[:2],
  ):
    np.testing.assert_array_equal(clean, dirty)


def test_the_score_is_read_at_the_last_real_token_on_either_side(llama, score_of):
  right = comparisons()
  lengths = right.mask[:, 0].sum(1)
  tokens, mask = right.tokens[:, 0], right.mask[:, 0]
  left = np.stack([np.roll(row, T - n) for row, n in zip(tokens, lengths)])
  expected = score_of(jnp.asarray(tokens), jnp.asarray(mask))
  found = score_of(jnp.asarray(left), jnp.arange(T)[None] >= T - lengths[:, None])
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
  model, params = llama
  n = lengths[0]
  hidden, _ = model.forward(
    params['backbone'], jnp.asarray(tokens[:1, :n]), jnp.arange(n)[None], jnp.ones((1, n), bool)
  )
  by_hand = hidden[0, -1] @ params['head']['kernel'] + params['head']['bias']
  np.testing.assert_allclose(expected[0], by_hand, rtol=0, atol=1e-5)


def test_microbatches_are_the_full_batch(llama):
  """Prompts have different numbers of pairs, and some have none."""
  model, params = llama
  settings = dataclasses.replace(PLAIN, centering=0.01)
  outcomes = []
  for size in (0, 2):
    state, metrics = tiny.one_step(
      functools.partial(
        reward_model.train_step, model=model, settings=settings, microbatch_size=size
      ),
      {'reward': params},
      {},
      comparisons(),
    )
    outcomes.append((state.params, metrics))
  batch = comparisons()
  assert metrics['tokens'] == (batch.mask & batch.present[:, :, None]).sum()
  for a, b in zip(*map(jax.tree.leaves, outcomes)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def several_heads(llama, count):
  """The parameters with `count` heads."""
  model, params = llama
  head = heads.init_scalar(jax.random.key(9), model.width, scale='normal', count=count)
  return params | {'head': head | {'bias': jnp.linspace(-1.0, 1.0, count)}}


def test_each_head_learns_from_its_own_prompts(llama):
  """The gradient is the mean of those of single-head models, each on the prompts of its head."""
  model, params = llama
  batch, count = comparisons(seed=5), 3
  settings = dataclasses.replace(PLAIN, centering=0.01, head_fraction=0.5)
  params = several_heads(llama, count)
  key = jax.random.key(0)
  subsets = np.asarray(reward_model.head_subsets(key, batch.tokens, count, 0.5))

  @functools.partial(jax.jit, static_argnames=('settings', 'size'))
  def step(params, batch, settings, size=0):
    optimizer = optax.sgd(1.0)
    opt_state = {'reward': optimizer.init(params)}
    state = types.TrainState(jnp.int32(0), key, {'reward': params}, opt_state)
    state, metrics = reward_model.train_step(
      state,
      {},
      batch,
      model=model,
      optimizers={'reward': optimizer},
      settings=settings,
      microbatch_size=size,
    )
    return jax.tree.map(jnp.subtract, params, state.params['reward']), metrics

  found, metrics = step(params, batch, settings)
  singles, losses = [], []
  for m in range(count):
    head = {'kernel': params['head']['kernel'][:, m], 'bias': params['head']['bias'][m]}
    own = batch.replace(present=batch.present & subsets[:, m, None])
    gradient, alone = step(
      params | {'head': head}, own, dataclasses.replace(settings, head_fraction=1.0)
    )
    singles.append(gradient)
    losses.append(float(alone['loss']))
  assert metrics['loss'] == pytest.approx(np.mean(losses), rel=1e-5)
  expected = jax.tree.map(lambda *x: np.mean(x, axis=0), *(one['backbone'] for one in singles))
  for name, value in (('kernel', 1), ('bias', 0)):
    stacked = np.stack([one['head'][name] for one in singles], axis=value)
    np.testing.assert_allclose(found['head'][name], stacked / count, rtol=1e-4, atol=1e-6)
  for a, b in zip(*map(jax.tree.leaves, (found['backbone'], expected))):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
  again, same = step(params, batch, settings, 2)
  for a, b in zip(*map(jax.tree.leaves, ((found, metrics), (again, same)))):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
  # Metrics are of the mean score.
  _, _, scores = loss_of((model, params), batch, PLAIN)
  sums = reward_model.pair_sums(jnp.asarray(scores.mean(2)), batch)
  assert metrics['accuracy'] == pytest.approx(float(sums['correct'] / sums['pairs']))
  spread = scores.std(2)[batch.present].mean()
  assert metrics['scores/std_of_heads'] == pytest.approx(spread, rel=1e-4)


def test_a_prompt_keeps_its_heads():
  tokens = np.random.default_rng(0).integers(0, 60, (2000, 2, 9)).astype(np.int32)
  key = jax.random.key(3)
  subsets = np.asarray(reward_model.head_subsets(key, tokens, 4, 0.3))
  order = np.random.default_rng(1).permutation(2000)
  np.testing.assert_array_equal(
    reward_model.head_subsets(key, tokens[order], 4, 0.3), subsets[order]
  )
  # Standard errors: sqrt(0.3 * 0.7 / 2000) = 0.010, and 0.022 of the correlations.
  np.testing.assert_allclose(subsets.mean(axis=0), 0.3, atol=0.05)
  assert np.abs(np.corrcoef(subsets.T) - np.eye(4)).max() < 0.1


def test_a_run_with_several_heads(world, tmp_path):
  """Each head of the exported model is normalized; an ensemble can be trained further."""
  config = tiny.reward_model(world)
  config.data.update({'held_out': None, 'held_out_path': config.data.path})
  config.preference.update({'heads': 3, 'head_fraction': 0.5, 'normalize': 'gain_bias'})
  reward_model.validate(config, 1)
  learner, state, history, found = tiny.train(reward_model, config, 3)
  assert history[0]['scores/std_of_heads'] > 0.1
  assert found['held_out/pairs'] == 48 and found['held_out/prompts'] == 48
  learner.export(state, tmp_path / 'model')
  model, params = hf.load_reward(tmp_path / 'model')
  records = [json.loads(line) for line in (world / 'comparisons.jsonl').open()]
  words = lambda text: [4 + int(word[1:]) for word in text.split()]
  rows = [
    [tiny.BOS, *words(record['prompt']), *words(record[key]), tiny.EOS]
    for record in records
    for key in ('chosen', 'rejected')
  ]
  tokens, mask = learned.right_padded(rows, 16, tiny.PAD)
  scores = np.asarray(jax.jit(functools.partial(scoring.score, model=model))(params, tokens, mask))
  assert scores.shape == (96, 3)
  np.testing.assert_allclose(scores.mean(axis=0), 0.0, atol=1e-5)
  np.testing.assert_allclose(scores.std(axis=0), 1.0, rtol=1e-4)
  config.model.path = str(tmp_path / 'model')
  config.preference.heads = 2
  with pytest.raises(errors.UserError, match='heads=2, but the reward model .* has 3'):
    tiny.train(reward_model, config, 0)


def test_prompts_without_a_loss_change_nothing(llama):
  """The loss is the mean over prompts with a pair, so prompts with ties only do not change it."""
  model, params = llama
  batch = comparisons()
  losses, counted, _ = loss_of(llama, batch, PLAIN)
  assert 0 < counted.sum() < B
  step = functools.partial(reward_model.train_step, model=model, settings=PLAIN, microbatch_size=0)
  (whole, metrics), (alone, same) = (
    tiny.one_step(step, {'reward': params}, {}, rows)
    for rows in (batch, jax.tree.map(lambda x: x[counted], batch))
  )
  assert metrics['loss'] == pytest.approx(losses[counted].mean(), rel=1e-5)
  assert metrics['loss'] == pytest.approx(float(same['loss']), rel=1e-5)
  for a, b in zip(*map(jax.tree.leaves, (whole.params, alone.params))):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def rated(world, folder):
  """Returns the config of a run on ratings: single completions, and pairs of which some tie."""
  records = [
    {'prompt': tiny.text(i, 2), 'completion': tiny.text(3 * i, 3), 'rating': i % 7 - 2.0}
    for i in range(20)
  ]
  records += [
    {
      'prompt': tiny.text(i, 3),
      'completions': [tiny.text(5 * i, 2), tiny.text(7 * i, 4)],
      'ratings': [1.0, 1.0 + i % 2],
    }
    for i in range(20)
  ]
  config = tiny.reward_model(world)
  config.data.path = str(tiny.write_jsonl(folder / 'rated.jsonl', records))
  config.preference.loss = 'rating'
  return config


def test_a_run_on_ratings_ends_and_measures_what_it_learns(world, tmp_path):
  """Single completions have no pairs, whose loss the evaluation must not compute."""
  config = rated(world, tmp_path)
  config.evals.single = {
    'kind': 'loss',
    'path': str(
      tiny.write_jsonl(
        tmp_path / 'single.jsonl',
        [
          {'prompt': tiny.text(i, 2), 'completion': tiny.text(2 * i, 3), 'rating': i % 4}
          for i in range(20)
        ],
      )
    ),
  }
  learner, state, history, found = tiny.train(reward_model, config, 2)
  model, params = models.create(tiny.LLAMA), state.params['reward']
  score = jax.jit(functools.partial(scoring.score, model=model))
  assert found['held_out/prompts'] == 8 and found['single/prompts'] == 20
  assert (
    'held_out/ece' not in found and 'single/accuracy' not in found and found['held_out/pairs'] > 0
  )

  words = lambda text: [4 + int(word[1:]) for word in text.split()]
  rows = [
    [tiny.BOS, *words(tiny.text(i, 2)), *words(tiny.text(2 * i, 3)), tiny.EOS] for i in range(20)
  ]
  scores = np.array(
    [float(score(params, np.array([row], np.int32), np.ones((1, 7), bool))[0]) for row in rows]
  )
  ratings = np.arange(20) % 4
  assert found['single/loss'] == pytest.approx(np.mean((scores - ratings) ** 2), rel=1e-4)
  assert found['single/bias'] == pytest.approx(np.mean(scores) - 1.5, abs=1e-4)
  assert found['single/correlation'] == pytest.approx(np.corrcoef(scores, ratings)[0, 1], abs=1e-4)
  order = np.argsort(scores)  # ten bins of two
  gaps = [abs((scores - ratings)[order[i : i + 2]].sum()) for i in range(0, 20, 2)]
  assert found['single/rating_error'] == pytest.approx(sum(gaps) / 20, abs=1e-4)


def test_held_out_data_need_ratings_too(world, tmp_path):
  config = rated(world, tmp_path)
  config.data.update({'held_out': None, 'held_out_path': f'{world}/comparisons.jsonl'})
  with pytest.raises(
    errors.UserError, match="held_out: .*'rating' needs a rating of every completion"
  ):
    tiny.train(reward_model, config, 0)


def test_ties_count_as_wrong():
  """A constant scorer has accuracy 0."""
  batch = comparisons()
  sums = jax.device_get(reward_model.pair_sums(jnp.ones((B, K)), batch))
  assert sums['correct'] == 0 and sums['tied'] == sums['pairs'] > 0
  best = jax.device_get(reward_model.pair_sums(-jnp.asarray(batch.ranks, jnp.float32), batch))
  assert best['correct'] == best['pairs'] and best['tied'] == 0 and best['gap'] > 0


def test_dropped_tokens_leave_first_and_last():
  mask = jnp.asarray(comparisons().mask)
  kept = np.asarray(reward_model.drop_tokens(jax.random.key(0), mask, 0.9))
  mask = np.asarray(mask)
  assert not (kept & ~mask).any() and 0 < kept.sum() < mask.sum()
  rows, real = kept.reshape(-1, T), mask.reshape(-1, T)
  for row, whole in zip(rows[real.any(1)], real[real.any(1)]):
    assert row[0] and row[whole.sum() - 1]


@pytest.mark.parametrize('mode', ['gain_bias', 'bias'])
def test_normalization_folds_into_the_exported_head(mode, world, tmp_path):
  """The scores of the training completions have mean 0 and, with a gain, standard deviation 1."""
  config = tiny.reward_model(world)
  config.data.held_out = None
  config.preference.normalize = mode
  learner, state, _, _ = tiny.train(reward_model, config, 2)
  learner.export(state, tmp_path / 'model')
  model, params = hf.load_reward(tmp_path / 'model')
  score = jax.jit(functools.partial(scoring.score, model=model))
  values = {}
  for name, weights in {'before': state.params['reward'], 'after': params}.items():
    values[name] = []
    for i in range(48):
      for start, length in ((i % 20, 3), (30 + i % 20, 4)):
        prompt = [4 + int(w[1:]) for w in tiny.text(i, 1 + i % 3).split()]
        words = [4 + int(w[1:]) for w in tiny.text(start, length).split()]
        row = [tiny.BOS, *prompt, *words, tiny.EOS]
        tokens = np.zeros((1, 16), np.int32)
        tokens[0, : len(row)] = row
        values[name].append(float(score(weights, tokens, np.arange(16)[None] < len(row))[0]))
  before, after = np.array(values['before']), np.array(values['after'])
  np.testing.assert_allclose(after.mean(), 0.0, atol=1e-5)
  np.testing.assert_allclose(after.std(), 1.0 if mode == 'gain_bias' else before.std(), rtol=1e-4)
  gain = 1.0 if mode == 'bias' else before.std()
  np.testing.assert_allclose(after, (before - before.mean()) / gain, atol=1e-4)


GPT2 = {
  'family': 'gpt2',
  'vocab_size': tiny.VOCAB,
  'n_positions': 32,
  'n_embd': 16,
  'n_layer': 2,
  'n_head': 2,
  'initializer_range': 0.3,
}


@pytest.mark.parametrize(
  'fields',
  [GPT2, tiny.LLAMA | {'vocab_size': tiny.VOCAB + 6}],
  ids=['gpt2', 'llama with a spare row'],
)
def test_transformers_gives_the_scores_that_we_give(fields, world, tmp_path):
  """GPT-2 pads with the EOS, at which transformers would read no score."""
  torch = pytest.importorskip('torch')
  tiny.write_model(tmp_path / 'start', fields, reward=True)
  for file in (tmp_path / 'start').glob('tokenizer*.json'):
    padded = '"pad_token": "<|pad|>"'
    file.write_text(
      file.read_text().replace(padded, '"pad_token": "<|eos|>"').replace('<|pad|>', 'spare')
    )
  tokenizer = tokenizers.load(tmp_path / 'start')
  assert tokenizer.pad_token_id == tiny.EOS and len(tokenizer) == tiny.VOCAB
  config = tiny.reward_model(world)
  config.model.path = str(tmp_path / 'start')
  config.data.held_out, config.steps = None, 1
  learner, state = reward_model.create(config, sharding.make_mesh({}, devices=jax.devices()[:1]))
  learner.export(state, tmp_path / 'model')

  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'model')
  assert theirs.eos_token == '<|eos|>' != theirs.pad_token
  texts = [tiny.text(i, 2 + i) + '<|eos|>' for i in range(4)]
  batch = theirs(texts, padding=True, return_tensors='pt')
  classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / 'model'
  ).eval()
  with torch.no_grad():
    found = classifier(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits[
      :, 0
    ]
  first = hf.load_reward(tmp_path / 'start')
  again = hf.load_reward(tmp_path / 'model')
  assert again[0].vocab_size == (128 if fields is GPT2 else tiny.VOCAB + 6)
  for (model, params), pad in ((first, 0), (again, theirs.pad_token_id)):
    tokens = np.where(batch['attention_mask'], batch['input_ids'], pad).astype(np.int32)
    ours = scoring.score(params, tokens, np.asarray(batch['attention_mask'], bool), model=model)
    np.testing.assert_allclose(found, ours, rtol=0, atol=1e-5)
  assert np.ptp(found) > 0.05
  # PPO still scores the policy's tokens with it.
  assert learned.same_tokenizer(tokenizers.load(tmp_path / 'model'), tokenizer)


def test_each_row_loses_tokens_of_its_own():
  kept = np.asarray(reward_model.drop_tokens(jax.random.key(0), jnp.ones((4, 3, 40), bool), 0.5))
  assert len({tuple(row) for row in kept.reshape(12, 40).tolist()}) == 12


def test_each_step_loses_tokens_of_its_own(llama):
  """With equal parameters and rows, another step has another loss, and the same step the same."""
  model, params = llama
  step = jax.jit(
    functools.partial(
      reward_model.train_step,
      model=model,
      optimizers={'reward': None},
      microbatch_size=0,
      settings=dataclasses.replace(PLAIN, token_dropout=0.5),
    )
  )
  state = types.TrainState(
    step=jnp.int32(0), key=jax.random.key(0), params={'reward': params}, opt_state={'reward': None}
  )
  first, second, again = (
    float(step(state.replace(step=jnp.int32(number)), {}, comparisons())[1]['loss'])
    for number in (0, 1, 0)
  )
  assert first == again != second


@pytest.fixture(scope='module')
def from_config(world, tmp_path_factory):
  """Trains two steps with every key that affects a batch, a loss or a head.

  Returns:
    Score (params, tokens of one sequence) -> float, the texts that scores are normalized on, the
    first batch, parameters and loss, the last state, and the exported parameters.
  """
  folder = tmp_path_factory.mktemp('from_config')
  texts = [
    {'prompt': tiny.text(i, 2), 'completion': tiny.text(7 * i + 3, 1 + i % 4)} for i in range(20)
  ]
  config = tiny.reward_model(world)
  config.data.held_out, config.optim.ema = None, 0.9
  config.preference.update(
    {
      'label_smoothing': 0.2,
      'centering': 0.1,
      'append_eos': False,
      'normalize': 'gain_bias',
      'normalize_path': str(tiny.write_jsonl(folder / 'texts.jsonl', texts)),
    }
  )
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    learner, state = reward_model.create(config, mesh)
    start = jax.device_get(state.params['reward'])
    (frozen, first), _ = learner.next_batch(state, timed=False)
    state, metrics = learner.train_step(state, frozen, first)
    state, _ = learner.train_step(state, *learner.next_batch(state, timed=False)[0])
    learner.export(state, folder / 'model')
  model, exported = hf.load_reward(folder / 'model')
  jitted = jax.jit(functools.partial(scoring.score, model=model))

  def score(params, row):
    padded = np.pad(np.array([row], np.int32), ((0, 0), (0, 16 - len(row))))
    return float(jitted(params, padded, np.arange(16)[None] < len(row))[0])

  return score, texts, jax.device_get(first), start, float(metrics['loss']), state, exported


def ids(text):
  return [4 + int(word[1:]) for word in text.split()]


def test_scores_are_normalized_before_the_first_step_and_after_the_last(from_config):
  """Scores are normalized on separate texts, which have no EOS."""
  score, texts, _, start, _, _, exported = from_config
  for params in (start, exported):
    values = [
      score(params, [tiny.BOS, *ids(text['prompt']), *ids(text['completion'])]) for text in texts
    ]
    np.testing.assert_allclose([np.mean(values), np.std(values)], [0, 1], atol=1e-4)


def test_the_first_loss_of_a_config_by_loop(from_config):
  score, _, batch, start, loss, _, _ = from_config
  total = 0.0
  for rows, masks in zip(batch.tokens, batch.mask):
    chosen, rejected = (row[mask].tolist() for row, mask in zip(rows, masks))
    assert tiny.EOS not in chosen + rejected
    better, worse = score(start, chosen), score(start, rejected)
    gap = better - worse
    total += 0.8 * np.logaddexp(0, -gap) + 0.2 * np.logaddexp(0, gap) + 0.1 * (better + worse) ** 2
  assert loss == pytest.approx(total / 16, rel=1e-4)


def test_a_reward_model_is_exported_as_its_moving_average(from_config):
  *_, state, exported = from_config
  average, now = optim.moving_average(state.opt_state['reward']), state.params['reward']
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
    exported['backbone'],
    average['backbone'],
  )
  embedding = lambda params: params['backbone']['embed']['embedding']
  assert np.abs(embedding(exported) - embedding(now)).max() > 1e-4
  # The head is that of the moving average too, except for gain and bias.
  gain = exported['head']['kernel'] / average['head']['kernel']
  np.testing.assert_allclose(gain, np.full(gain.shape, np.mean(gain)), rtol=1e-4)
