"""DPO and its relatives: TRL's numbers, an update by hand, kept log-probabilities, learning."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import references
from rlhf_jax import errors
from rlhf_jax import evaluate
from rlhf_jax import loop
from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import dpo
from rlhf_jax.data import formats
from rlhf_jax.data import preferences
from rlhf_jax.models import hf
import runs
import tiny

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'trl_dpo.npz')
CASES = json.loads(str(GOLDEN['settings']))
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def trl_settings(name):
  """Returns our settings of a golden case."""
  case = CASES[name]
  kind = name.partition('_')[0]
  return dpo.Settings(
    loss=kind,
    beta=case['beta'],
    label_smoothing=case.get('label_smoothing', 0.0),
    length_normalize=name in ('ipo', 'sigmoid_norm'),
    gamma=case.get('simpo_gamma', 0.0),
    desirable_weight=case.get('desirable_weight', 1.0),
    undesirable_weight=case.get('undesirable_weight', 1.0),
  )


@pytest.mark.parametrize('name', CASES)
def test_losses_gradients_and_metrics_are_those_of_trl(name):
  golden = {
    key.partition('/')[2]: jnp.asarray(GOLDEN[key])
    for key in GOLDEN.files
    if key.startswith(f'{name}/')
  }
  settings, count = trl_settings(name), golden['logps'].shape[1]
  # One example in each row: [2, G] becomes [G, 2, 1].
  rows = lambda x: x.T[:, :, None]
  batch = types.Preferences(
    sequences=None,
    index=jnp.arange(count)[:, None],
    present=jnp.ones((count, 1), bool),
    desirable=golden.get('labels', jnp.zeros(count, bool))[:, None],
    margin=jnp.zeros((count, 1)),
    ref_logprobs=rows(golden.get('ref_logps', jnp.zeros((2, count)))),
  )

  def loss(logps):
    values = dpo.compared_values(rows(logps), rows(golden['lengths']), batch, settings)
    kl = jnp.maximum(jnp.mean(values[:, 1]), 0.0) if settings.loss == 'kto' else None
    return jnp.mean(dpo.example_losses(values, batch, settings, kl)), (values, kl)

  (value, (values, kl)), gradients = jax.value_and_grad(loss, has_aux=True)(golden['logps'])
  close(value, golden['loss'])
  close(gradients, golden['gradients'])
  if settings.loss == 'kto':
    close(kl, golden['kl'])
  up, down = (jnp.broadcast_to(mask, values.shape) for mask in dpo.groups(batch, settings))
  if settings.loss == 'kto':
    up, down = up.at[:, 1].set(False), down.at[:, 1].set(False)
  # TRL logs rewards without the division by lengths.
  unscaled = dpo.compared_values(
    rows(golden['logps']),
    rows(golden['lengths']),
    batch,
    dataclasses.replace(settings, length_normalize=False),
  )
  rewards = settings.beta * unscaled
  close(jnp.mean(rewards[up]), golden['rewards/chosen'])
  close(jnp.mean(rewards[down]), golden['rewards/rejected'])


def test_the_golden_kl_of_kto_is_positive_in_one_case_and_clipped_in_the_other():
  assert GOLDEN['kto/kl'] == 0 and GOLDEN['kto_swapped/kl'] > 1


# Log-probabilities of completions.


def ragged(count=7):
  """Returns pairs of different lengths, with margins."""
  rng = np.random.default_rng(3)
  text = lambda low, high: tiny.text(int(rng.integers(60)), int(rng.integers(low, high)))
  return [
    formats.Comparison(text(1, 5), (text(1, 6), text(1, 6)), (0, 1), margin=float(rng.random()))
    for _ in range(count)
  ]


def alone(model, params, tokenizer, prompt, completion):
  """Returns the log-probabilities of a completion's tokens, from one sequence in its own row."""
  prompt = [tiny.BOS, *tokenizer.encode(prompt, add_special_tokens=False)]
  tokens = [*prompt, *tokenizer.encode(completion, add_special_tokens=False), tiny.EOS]
  row = np.zeros((1, 24), int)
  row[0, : len(tokens)] = tokens
  logits = np.asarray(row_logits(params, row, model=model)[0], np.float64)
  rows = [references.log_softmax(row) for row in logits]
  return [rows[t - 1][tokens[t]] for t in range(len(prompt), len(tokens))]


@functools.partial(jax.jit, static_argnames='model')
def row_logits(params, tokens, *, model):
  """Returns logits [1, T, V]; padding on the right does not change those of earlier tokens."""
  positions = jnp.arange(tokens.shape[1])[None]
  hidden, _ = model.forward(params, tokens, positions, jnp.ones_like(tokens))
  return model.unembed(params, hidden)


@pytest.fixture(scope='module')
def policy(world):
  model, params = hf.load(world / 'model')
  return model, params, tiny.write_tokenizer(world / 'tokenizer')


@pytest.fixture(scope='module')
def expected(policy):
  """[2, 7] sums over completions and their lengths, from sequences alone."""
  logprobs = [
    [alone(*policy, each.prompt, each.completions[lane]) for each in ragged()] for lane in (0, 1)
  ]
  sums = np.array([[sum(x) for x in lane] for lane in logprobs])
  return sums, np.array([[len(x) for x in lane] for lane in logprobs])


@pytest.mark.parametrize('pack', [False, True])
def test_completions_have_the_logprobs_of_sequences_alone(policy, expected, pack):
  model, params, tokenizer = policy
  batch = all_rows(tokenizer, pack)
  assert (batch.present.shape[1] > 1) == pack
  logprobs, lengths = jax.jit(functools.partial(dpo.completion_logprobs, model=model))(
    params, {}, batch
  )
  for found, wanted in zip((logprobs, lengths), expected):
    for row, column in zip(*np.nonzero(batch.present)):
      close(found[row, :, column], wanted[:, batch.index[row, column]], rtol=1e-5, atol=1e-4)


def all_rows(tokenizer, pack):
  """Returns all ragged pairs as one batch."""
  rows = preferences.arrange(ragged(), tokenizer, max_length=24, pack=pack)
  count = len(rows.index)
  return jax.tree.map(jnp.asarray, rows.collate(np.arange(count), np.ones(count, bool)))


# One update, whose loss and metrics a loop computes from the sums above.


def by_hand(sums, lengths, reference, margins, settings):
  """Returns loss and metrics of the pairs, with loops."""
  terms, rewards, nll = [], [], []
  for i in range(sums.shape[1]):
    pair = [float(x) for x in sums[:, i]]
    means = [x / n for x, n in zip(pair, lengths[:, i])]
    beta = settings.beta
    if settings.loss == 'orpo':
      values = means
      loss = references.orpo_loss(*means, beta=beta)
    else:
      values = [(x - r) / n for x, r, n in zip(pair, reference[:, i], lengths[:, i])]
      gap = values[0] - values[1] - settings.margin_coef * margins[i] / beta
      loss = references.reference_loss(
        gap, beta=beta, smoothing=settings.label_smoothing, kind='sigmoid'
      )
    nll.append(-means[0])
    terms.append(loss)
    rewards.append([beta * x for x in values])
  rewards = np.array(rewards)
  return {
    'loss': np.mean(terms) + settings.sft_coef * np.mean(nll),
    'rewards/chosen': rewards[:, 0].mean(),
    'rewards/rejected': rewards[:, 1].mean(),
    'rewards/margins': (rewards[:, 0] - rewards[:, 1]).mean(),
    'rewards/accuracies': (rewards[:, 0] > rewards[:, 1]).mean(),
    'logps/chosen': sums[0].mean(),
    'logps/rejected': sums[1].mean(),
  }


UPDATES = {
  'dpo with margins, an SFT term and smoothing': dict(
    label_smoothing=0.1, margin_coef=0.7, sft_coef=0.5, length_normalize=True
  ),
  'orpo, packed': dict(loss='orpo', sft_coef=1.0, beta=0.3),
}


@pytest.mark.parametrize('name', UPDATES)
def test_an_update_has_the_loss_and_metrics_of_a_loop(name, policy, expected):
  model, params, tokenizer = policy
  settings, (sums, lengths) = dpo.Settings(**UPDATES[name]), expected
  batch = all_rows(tokenizer, pack='packed' in name)
  reference = sums + np.random.default_rng(1).normal(0, 2, sums.shape)
  batch = with_reference(batch, reference)
  # Microbatches of packed rows have different numbers of examples.
  _, metrics = step(model, params, batch, settings, microbatch_size=1 if 'orpo' in name else 0)
  wanted = by_hand(sums, lengths, reference, [e.margin for e in ragged()], settings)
  for key, value in wanted.items():
    close(metrics[key], value, err_msg=key, rtol=1e-5, atol=1e-4)


def with_reference(batch, reference):
  """Returns a batch with the log-probabilities [2, N] of the reference."""
  values = np.moveaxis(reference.T[np.maximum(batch.index, 0)], 2, 1)
  return batch.replace(ref_logprobs=jnp.asarray(values, jnp.float32))


def step(model, params, batch, settings, microbatch_size=0):
  """Takes a step from given parameters."""
  train_step = functools.partial(
    dpo.train_step, model=model, settings=settings, microbatch_size=microbatch_size
  )
  return tiny.one_step(train_step, {'policy': params}, {}, batch)


def test_an_update_of_kto_has_the_loss_and_metrics_of_a_loop(policy, expected):
  """Completion 0 of each pair is the labelled one, completion 1 that of another prompt.

  Sums are compared, whatever `length_normalize` is.
  """
  model, params, tokenizer = policy
  sums, _ = expected
  labels = np.array([True, False, True, True, False, False, True])
  batch = all_rows(tokenizer, pack=True)
  batch = batch.replace(desirable=jnp.asarray(labels)[batch.index] & batch.present)
  reference = sums - 1.0 + np.random.default_rng(2).normal(0, 2, sums.shape)
  settings = dpo.Settings(
    loss='kto', beta=0.3, desirable_weight=1.2, undesirable_weight=0.7, length_normalize=True
  )
  _, metrics = step(model, params, with_reference(batch, reference), settings, microbatch_size=1)
  ratios, mismatched = sums - reference
  kl = max(np.mean(mismatched), 0.0)
  assert kl > 0
  weights = np.where(labels, 1.2, 0.7)
  terms = [references.kto_loss(r, good, kl, beta=0.3) for r, good in zip(ratios, labels)]
  close(metrics['kto/kl'], kl, rtol=1e-5, atol=1e-4)
  close(metrics['loss'], np.mean(weights * terms))
  close(metrics['rewards/chosen'], 0.3 * ratios[labels].mean(), atol=1e-4)
  close(metrics['rewards/rejected'], 0.3 * ratios[~labels].mean(), atol=1e-4)
  close(metrics['logps/chosen'], sums[0][labels].mean(), atol=1e-4)
  assert 'rewards/accuracies' not in metrics


# Log-probabilities of the reference on disk.


def files(workdir):
  """Returns the files of log-probabilities, by name."""
  return {path.name: path for path in (workdir / 'reference_logprobs').iterdir()}


@pytest.fixture(scope='module')
def finished(world, tmp_path_factory):
  """A finished run of two steps with a shared folder of log-probabilities, and its config."""
  folder = tmp_path_factory.mktemp('dpo')
  config = tiny.dpo(world)
  config.steps, config.data.path = 2, str(folder / 'comparisons.jsonl')
  config.dpo.reference_logprobs = str(folder / 'reference_logprobs')
  (folder / 'comparisons.jsonl').write_bytes((world / 'comparisons.jsonl').read_bytes())
  loop.run(config, folder / 'run')
  return config, folder


def test_log_probabilities_are_those_of_the_initial_policy(finished, policy):
  config, folder = finished
  assert sorted(files(folder)) == ['held_out.npz', 'train.npz']
  records = [json.loads(line) for line in open(config.data.path, encoding='utf-8')]
  stored = np.load(files(folder)['train.npz'])['logprobs']
  held_out = np.load(files(folder)['held_out.npz'])['logprobs']
  assert len(stored) + len(held_out) == len(records) and stored.dtype == np.float32
  both = {tuple(np.round(row, 2)) for row in np.concatenate([stored, held_out])}
  for record in records[::16]:
    texts = record['chosen'], record['rejected']
    pair = [sum(alone(*policy, record['prompt'], text)) for text in texts]
    assert min(np.abs(np.array(row) - pair).max() for row in both) < 0.02
  first, *_ = runs.metrics(folder / 'run')
  close(first['loss'], np.log(2))
  close([first['rewards/chosen'], first['rewards/rejected']], 0.0)


def test_they_are_read_the_second_time(finished, tmp_path):
  """Another run, which was stopped before its first step, reads the changed numbers of the file."""
  config, folder = finished
  config = config.copy_and_resolve_references()
  config.dpo.update({'loss': 'hinge', 'beta': 0.5, 'reference_logprobs': None})
  own = tmp_path / 'run' / 'reference_logprobs'
  own.mkdir(parents=True)
  for path in files(folder).values():
    with np.load(path) as stored:
      changed = stored['logprobs'] + [-2.0, 0.0]
      np.savez(own / path.name, logprobs=changed, fingerprint=stored['fingerprint'])
  loop.run(config, tmp_path / 'run')
  first, *_ = runs.metrics(tmp_path / 'run')
  close([first['rewards/chosen'], first['rewards/rejected']], [1.0, 0.0])
  close(first['loss'], 0.0)  # max(0, 1 - (1 - 0))


@pytest.mark.parametrize('changed', ['model', 'data', 'file'])
def test_those_of_another_model_or_other_data_are_refused(changed, finished, tmp_path, world):
  config, folder = finished
  config = config.copy_and_resolve_references()
  message = {'model': 'of another reference than', 'data': 'of other data than', 'file': 'be read'}
  if changed == 'model':  # the same path and shapes, other numbers
    model, params = hf.load(world / 'model')
    params = jax.tree.map(lambda x: x * 1.001, params)
    hf.save(tmp_path / 'model', model, params, tokenizer=tiny.write_tokenizer(world / 'tokenizer'))
    config.model.path = str(tmp_path / 'model')
  if changed == 'data':
    text = pathlib.Path(config.data.path).read_text(encoding='utf-8')
    config.data.path = str(tmp_path / 'comparisons.jsonl')
    pathlib.Path(config.data.path).write_text(text.replace('w41', 'w42'), encoding='utf-8')
  if changed == 'file':
    config.dpo.reference_logprobs = str(tmp_path / 'kept')
    (tmp_path / 'kept').mkdir()
    whole = files(folder)['train.npz'].read_bytes()
    (tmp_path / 'kept' / 'train.npz').write_bytes(whole[: len(whole) // 2])
  with pytest.raises(errors.UserError, match=message[changed]) as caught:
    loop.run(config, tmp_path / 'run')
  assert 'train.npz' in str(caught.value) and 'Delete the file' in str(caught.value)


def test_a_finished_run_is_evaluated_on_its_own_and_other_data(finished, world):
  _, folder = finished
  step, metrics = evaluate.run(folder / 'run')
  last = runs.metrics(folder / 'run')[-1]
  assert step == 2
  close(metrics['held_out/loss'], last['held_out/loss'])
  evals = {'other': {'kind': 'loss', 'path': f'{world}/comparisons.jsonl'}}
  _, metrics = evaluate.run(folder / 'run', json.dumps(evals))
  assert metrics['other/pairs'] == 48


# Models.


def test_adapters_start_at_the_reference_without_a_copy_of_it(world, tmp_path):
  config = tiny.dpo(world)
  config.steps, config.model.lora.targets = 2, (('attention/|mlp/', 4, 8.0),)
  config.data.held_out = None  # a fraction is chosen by the seed
  loop.run(config, tmp_path / 'run')
  first, second, *_ = runs.metrics(tmp_path / 'run')
  close(first['loss'], np.log(2))
  assert not (tmp_path / 'run' / 'reference_logprobs' / 'held_out.npz').exists()
  assert second['rewards/margins'] > first['rewards/margins'] + 1e-4
  assert (tmp_path / 'run' / 'adapter').is_dir()
  # The reference does not depend on the random adapters of the seed.
  config.dpo.reference_logprobs = str(tmp_path / 'run' / 'reference_logprobs')
  config.seed, config.steps = 1, 1
  loop.run(config, tmp_path / 'other')


def test_adapters_of_another_scale_are_another_reference(world, tmp_path):
  config = tiny.dpo(world)
  config.data.held_out, config.model.lora.targets = None, (('mlp/', 2, 4.0),)
  config.dpo.reference_logprobs = str(tmp_path / 'reference_logprobs')
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    learner, state = dpo.create(config, mesh)
    learner.export(state, tmp_path / 'model')
    (file,) = tmp_path.rglob('adapter_config.json')
    config.model.lora.targets, config.model.lora.path = (), str(file.parent)
    dpo.create(config, mesh)[0].prepare(tmp_path)
    fields = json.loads(file.read_text(encoding='utf-8'))
    doubled = {'lora_alpha': 2 * fields['lora_alpha']}
    patterns = {key: 2 * value for key, value in (fields.get('alpha_pattern') or {}).items()}
    file.write_text(json.dumps(fields | doubled | {'alpha_pattern': patterns}), encoding='utf-8')
    with pytest.raises(errors.UserError, match='of another reference than'):
      dpo.create(config, mesh)[0].prepare(tmp_path)


def test_an_encoder_decoder_starts_at_the_reference_and_learns(world, tmp_path):
  fields = {
    'family': 't5',
    'vocab_size': tiny.VOCAB,
    'd_model': 16,
    'd_kv': 4,
    'd_ff': 32,
    'num_layers': 1,
    'num_decoder_layers': 1,
    'num_heads': 4,
    'relative_attention_num_buckets': 8,
    'relative_attention_max_distance': 16,
    'pad_token_id': tiny.PAD,
    'eos_token_id': tiny.EOS,
  }
  model = models.create(fields)
  tokenizer = tiny.write_tokenizer(world / 'tokenizer')
  hf.save(tmp_path, model, model.init(jax.random.key(1)), tokenizer=tokenizer)
  config = tiny.dpo(world)
  config.model.path = str(tmp_path)
  _, _, history, metrics = tiny.train(dpo, config, 6)
  close(history[0]['loss'], np.log(2))
  assert history[-1]['rewards/margins'] > 0.02 and metrics['held_out/accuracy'] > 0.7
  config.dpo.pack = True
  with pytest.raises(errors.UserError, match='config.dpo.pack: an encoder-decoder'):
    tiny.train(dpo, config, 1)


def test_held_out_preferences_are_learnt(world):
  """Chosen completions have words below w30, the others do not."""
  config = tiny.dpo(world)
  config.optim.learning_rate = 1e-2
  *_, metrics = tiny.train(dpo, config, 30)
  assert metrics['held_out/margin'] > 1 and metrics['held_out/accuracy'] == 1


def test_kto_is_evaluated_on_completions_of_one_kind(world, tmp_path):
  """The policy is the reference, so each loss is 1 - sigmoid(0)."""
  records = [{'prompt': tiny.text(i, 2), 'completion': 'w1 w2', 'label': True} for i in range(3)]
  lines = ''.join(f'{json.dumps(record)}\n' for record in records)
  (tmp_path / 'good.jsonl').write_text(lines, encoding='utf-8')
  config = tiny.dpo(world, 'kto')
  config.data.held_out, config.data.held_out_path = None, str(tmp_path / 'good.jsonl')
  *_, metrics = tiny.train(dpo, config, 0)
  close(metrics['held_out/loss'], 0.5)
  assert metrics['held_out/completions'] == 3 and 'held_out/margin' not in metrics


def test_a_reference_in_another_folder(world, tmp_path):
  """Rewards are log-ratios to it, so they are not 0 at the start."""
  model = models.create(tiny.LLAMA)
  tokenizer = tiny.write_tokenizer(world / 'tokenizer')
  hf.save(tmp_path, model, model.init(jax.random.key(9)), tokenizer=tokenizer)
  config = tiny.dpo(world)
  config.reference = str(tmp_path)
  _, _, history, _ = tiny.train(dpo, config, 1)
  assert abs(history[0]['rewards/chosen']) > 1e-3


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'dpo.loss': 'slic'}, "config.dpo.loss='slic' must be one of sigmoid"),
    ({'dpo.beta': 0.0}, 'config.dpo.beta=0.0 must be positive'),
    ({'dpo.label_smoothing': 0.5}, r'config.dpo.label_smoothing=0.5 must be in \[0, 0.5\)'),
    ({'dpo.sft_coef': -1.0}, 'config.dpo.sft_coef=-1.0 must be 0 or positive'),
    ({'dpo.loss': 'orpo'}, 'set config.dpo.sft_coef to 1.0'),
    ({'reference': 'x', 'model.unfrozen_layers': 1}, "config.reference='x'"),
  ],
)
def test_a_bad_config_is_refused(world, changes, message):
  config = tiny.dpo(world)
  config.update_from_flattened_dict(changes)
  with pytest.raises(errors.UserError, match=message):
    dpo.validate(config, 1)
