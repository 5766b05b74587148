"""Data sets and optimizers that the keys of a config define, and messages about them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import errors
from rlhf_jax import models
from rlhf_jax import optim
from rlhf_jax import types
from rlhf_jax.algorithms import setup
from rlhf_jax.algorithms import sft
from rlhf_jax.data import formats
from rlhf_jax.models import hf
import tiny


def data(path, **changes):
  config = sft.config().data
  config.update({'path': str(path), **changes})
  return config


def test_a_table_under_other_names(tmp_path):
  path = tmp_path / 'a.dat'
  path.write_text('question\tanswer\n007\t"a\nb"\n')
  columns = 'prompt=question,completion=answer'
  with pytest.raises(errors.UserError, match=r"a\.dat: unknown suffix '\.dat'"):
    setup.read_examples(data(path, columns=columns), formats.completions, None)
  assert setup.read_examples(
    data(path, columns=columns, format='tsv'), formats.completions, None
  ) == [formats.Completion('007', 'a\nb')]


def test_skipped_pairs_and_empty_prompts_are_reported(tmp_path, caplog):
  path = tmp_path / 'a.jsonl'
  pair = lambda prompt, chosen: (
    json.dumps({'prompt': prompt, 'chosen': chosen, 'rejected': 'b'}) + '\n'
  )
  path.write_text(pair('p', 'a'))
  assert len(setup.read_examples(data(path), formats.comparisons, None)) == 1
  assert not caplog.records
  path.write_text(pair('p', 'b') + pair('', 'a'))
  assert len(setup.read_examples(data(path), formats.comparisons, None)) == 1
  (record,) = caplog.records
  assert record.getMessage() == (
    f'{path}: 1 of 2 records kept; 1 left out: all completions are the same (first: {path}:1); '
    f'1 kept with an empty prompt (first: {path}:2)'
  )
  caplog.clear()
  path.write_text(pair('', 'a'))
  setup.read_examples(data(path), formats.comparisons, None)
  assert '1 kept with an empty prompt' in caplog.text


def test_an_optimizer_has_the_values_of_its_config():
  # The norm of (3, 4) is 5. Clipped to 1 it is (0.6, 0.8), a tenth of which is Adam's first moment.
  # Its first step is 1 in each; of the kernel, 2, another half decays: 0.1 * (1 + 0.5 * 2).
  config = sft.config()
  config.optim.update({'learning_rate': 0.1, 'clip_norm': 1.0, 'weight_decay': 0.5, 'b1': 0.9})
  optimizer = setup.make_optimizer(config.optim, 10)
  params, grads = (
    {'kernel': jnp.full((1, 1), kernel), 'bias': jnp.full(1, bias)}
    for kernel, bias in ((2.0, 2.0), (3.0, 4.0))
  )
  updates, state = optimizer.update(grads, optimizer.init(params), params)
  (moment,) = (
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    if 'mu' in jax.tree_util.keystr(path) and 'kernel' in jax.tree_util.keystr(path)
  )
  np.testing.assert_allclose(moment, [[0.06]], rtol=1e-6)
  np.testing.assert_allclose(updates['kernel'], [[-0.2]], rtol=1e-5)
  np.testing.assert_allclose(updates['bias'], [-0.1], rtol=1e-5)


def test_a_policy_is_exported_as_its_moving_average(world, tmp_path):
  config = tiny.sft(world)
  config.optim.ema = 0.5
  optimizer, model = setup.make_optimizer(config.optim, 4), models.create(tiny.LLAMA)
  params = model.init(jax.random.key(0))
  state = optimizer.init(params)
  for sign in (1.0, -1.0):
    updates, state = optimizer.update(jax.tree.map(lambda p: sign + p, params), state, params)
    params = optax.apply_updates(params, updates)
  export = setup.policy_exporter(model, tiny.write_tokenizer(tmp_path / 'tokenizer'), {})
  export(types.TrainState(2, None, {'policy': params}, {'policy': state}), tmp_path / 'model')
  _, found = hf.load(tmp_path / 'model')
  average = optim.moving_average(state)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found, average)
  assert (
    min(
      float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params))
    )
    > 1e-4
  )
