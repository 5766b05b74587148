"""Language modelling on a task that a tiny model can learn, and invariances of its loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import sft
from rlhf_jax.data import packing
from rlhf_jax.models import hf
import tiny


@pytest.fixture(scope='module')
def llama():
  model = models.create(tiny.LLAMA)
  return model, model.init(jax.random.key(2))


@pytest.fixture(scope='module')
def losses_of(llama):
  model, _ = llama
  return jax.jit(functools.partial(sft.token_losses, frozen={}, model=model))


def rows(batch=8, width=12, seed=0, garbage=0):
  """Returns prompts of 0 to 3 tokens, and completions of the rest; padding holds `garbage`."""
  rng = np.random.default_rng(seed)
  prompt, length = rng.integers(0, 4, (batch, 1)), rng.integers(4, width + 1, (batch, 1))
  place = np.arange(width)[None]
  real = place < length
  tokens = np.where(real, rng.integers(4, tiny.VOCAB, (batch, width)), garbage)
  return types.LMBatch(
    tokens.astype(np.int32),
    real.astype(np.int32),
    np.where(real, place, 0).astype(np.int32),
    real & (place >= np.maximum(prompt, 1)),
  )


def test_it_learns_to_continue_and_to_end(world, tmp_path):
  """The next word follows from the last one, and the text ends after three words."""
  tiny.write_jsonl(
    tmp_path / 'data.jsonl',
    [{'prompt': tiny.text(i, 2), 'completion': tiny.text(i + 22, 3)} for i in range(60)],
  )
  config = tiny.sft(world, 'completion')
  config.data.update({'path': f'{tmp_path}/data.jsonl', 'held_out': 0.1, 'max_length': 7})
  config.batch_size, config.optim.learning_rate = 32, 0.02
  _, _, history, held_out = tiny.train(sft, config, 200)
  assert 3.5 < history[0]['loss'] < 5  # log 64 is 4.16.
  assert history[-1]['loss'] < 0.1
  assert held_out['held_out/loss'] < 2.5  # on texts with other first words
  np.testing.assert_allclose(
    held_out['held_out/perplexity'], np.exp(held_out['held_out/loss']), rtol=1e-5
  )


def test_the_loss_is_the_mean_over_targets_by_loop(llama, losses_of):
  model, params = llama
  batch = rows()
  losses, mask = jax.device_get(losses_of(params, batch=batch))
  total, count = 0.0, 0
  for tokens, real, targets in zip(batch.tokens, batch.segments, batch.loss_mask):
    length = real.sum()
    hidden, _ = model.forward(
      params, jnp.asarray(tokens[None]), jnp.arange(12)[None], jnp.asarray(real[None])
    )
    logp = np.asarray(jax.nn.log_softmax(model.unembed(params, hidden[0])), np.float64)
    for t in range(1, length):
      if targets[t]:
        total, count = total - logp[t - 1, tokens[t]], count + 1
  assert count == mask.sum() == batch.loss_mask.sum()
  np.testing.assert_allclose(losses[mask].sum(), total, rtol=1e-6)
  np.testing.assert_allclose(
    jax.jit(functools.partial(sft.mean_loss, frozen={}, model=model))(params, batch=batch),
    total / count,
    rtol=1e-6,
  )


def test_contents_of_padding_change_nothing(llama, losses_of):
  _, params = llama
  clean, mask = losses_of(params, batch=rows())
  dirty, _ = losses_of(params, batch=rows(garbage=tiny.EOS))
  np.testing.assert_array_equal(np.asarray(clean)[mask], np.asarray(dirty)[mask])


def test_packed_documents_have_the_losses_of_single_ones(llama, losses_of):
  _, params = llama
  rng = np.random.default_rng(1)
  documents = [rng.integers(4, tiny.VOCAB, n).astype(np.int32) for n in (5, 3, 8, 2, 6, 9, 4)]
  sums = []
  for sequences in (packing.assign(documents, length=12), [[one] for one in documents]):
    batch = packing.to_batch(sequences, length=12, pad_id=0)
    losses, mask = losses_of(params, batch=batch)
    sums.append(np.asarray(losses)[np.asarray(mask)])
  assert len(sums[0]) == len(sums[1]) == sum(map(len, documents)) - 7
  np.testing.assert_allclose(sorted(sums[0]), sorted(sums[1]), atol=1e-5)


def test_microbatches_are_the_full_batch(world):
  """Sequences have different numbers of targets, so a mean of means would differ."""
  config = tiny.sft(world, 'completion')
  _, full, history, _ = tiny.train(sft, config, 3)
  config.microbatch_size = 4
  _, parts, found, _ = tiny.train(sft, config, 3)
  for a, b in zip(jax.tree.leaves(full.params), jax.tree.leaves(parts.params)):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)
  for a, b in zip(history, found):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)


def test_evaluation_counts_every_held_out_target_once(world, losses_of, tmp_path):
  """Ten examples do not fill a batch of 16; the other rows must not count."""
  config = tiny.sft(world, 'completion')
  records = [{'prompt': 'w1', 'completion': tiny.text(i, 1 + i)} for i in range(10)]
  config.data.held_out_path = str(tiny.write_jsonl(tmp_path / 'held_out.jsonl', records))
  _, state, _, held_out = tiny.train(sft, config, 0)
  tokens = np.zeros((10, 13), np.int32)
  for i, record in enumerate(records):
    words = [4 + int(word[1:]) for word in record['completion'].split()]
    tokens[i, : i + 4] = [tiny.BOS, 5, *words, tiny.EOS]
  place = np.broadcast_to(np.arange(13, dtype=np.int32), tokens.shape)
  real = place < np.arange(4, 14)[:, None]
  losses, mask = losses_of(
    state.params['policy'],
    batch=types.LMBatch(tokens, real.astype(np.int32), place, real & (place >= 2)),
  )
  np.testing.assert_allclose(held_out['held_out/loss'], np.asarray(losses)[mask].mean(), rtol=1e-5)


def test_the_evaluated_average_is_exported(world, tmp_path):
  """A and B of adapters are averaged separately, then merged: W + 2 A B."""
  config = tiny.sft(world, 'completion')
  config.data.held_out, config.optim.ema, config.optim.learning_rate = 0.25, 0.9, 0.02
  config.model.lora.targets = (('mlp/up', 4, 8.0),)
  mesh, seen = sharding.make_mesh({}, devices=jax.devices()[:1]), []
  with jax.set_mesh(mesh):
    learner, state = sft.create(config, mesh)
    for _ in range(12):
      batch, _ = learner.next_batch(state, timed=False)
      state, _ = learner.train_step(state, *batch)
      seen.append(jax.device_get(state.params['policy']['blocks']['mlp']['up']['lora']))
    found = learner.evaluators['held_out'](state)['loss']
    learner.export(state, tmp_path / 'model')
    now = learner.evaluators['held_out'](
      state.replace(opt_state={'policy': state.opt_state['policy'].inner})
    )['loss']
  weights = 0.9 ** np.arange(11, -1, -1.0)
  mean = {name: np.average([lora[name] for lora in seen], axis=0, weights=weights) for name in 'ab'}
  _, before = hf.load(world / 'model')
  _, after = hf.load(tmp_path / 'model')
  kernel = before['blocks']['mlp']['up'].pop('kernel') + 2.0 * mean['a'] @ mean['b']
  np.testing.assert_allclose(after['blocks']['mlp']['up'].pop('kernel'), kernel, atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, after, before)

  config.model.path, config.model.lora.targets = str(tmp_path / 'model'), ()
  *_, exported = tiny.train(sft, config, 0)
  np.testing.assert_allclose(exported['held_out/loss'], found, rtol=1e-5)
  assert abs(found - now) > 0.01
