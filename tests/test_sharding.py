"""Meshes and rules; the same program on one device and on eight."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import heads

GPT2 = {
  'family': 'gpt2',
  'vocab_size': 31,
  'n_positions': 16,
  'n_embd': 16,
  'n_layer': 2,
  'n_head': 4,
}
LLAMA = {
  'family': 'llama',
  'vocab_size': 32,
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'attention_bias': True,
  'mlp_bias': True,
}


def test_mesh_sizes():
  count = jax.device_count()
  assert dict(sharding.make_mesh({'data': -1}).shape) == {'data': count, 'fsdp': 1, 'tensor': 1}
  if count == 8:
    assert dict(sharding.make_mesh({'tensor': 2, 'fsdp': -1}).shape) == {
      'data': 1,
      'fsdp': 4,
      'tensor': 2,
    }
  one = sharding.make_mesh({'data': -1}, devices=jax.devices()[:1])
  assert dict(one.shape) == {'data': 1, 'fsdp': 1, 'tensor': 1}


@pytest.mark.parametrize(
  'shape,words',
  [
    ({'model': 2}, 'model'),
    ({'data': -1, 'fsdp': -1}, 'at most one'),
    ({'data': 0}, 'positive'),
    ({'data': 2.0}, 'positive'),
    ({'data': 3}, 'needs 3 devices'),
    ({'data': -1, 'fsdp': 3}, 'devices'),
    ({'data': -1, 'tensor': 100}, 'devices'),
  ],
)
def test_bad_meshes_are_explained(shape, words):
  with pytest.raises(UserError, match=words):
    sharding.make_mesh(shape)


@pytest.fixture(
  params=[GPT2, LLAMA, LLAMA | {'tie_word_embeddings': True}], ids=['gpt2', 'llama', 'tied']
)
def model(request):
  return models.create(request.param)


def mesh_of_eight():
  if jax.device_count() != 8:
    pytest.skip('needs 8 (fake) devices')
  return sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})


def test_rules_name_every_parameter_and_moment(model):
  """Parameters, optimizer state and heads; moments have the sharding of their parameters."""
  mesh = mesh_of_eight()

  def state(key):
    params = {
      'policy': model.init(key),
      'critic': {
        'backbone': model.init(key),
        'head': heads.init_scalar(key, model.width, scale='normal'),
      },
    }
    return {'params': params, 'opt_state': optax.adamw(1e-3).init(params), 'step': jnp.int32(0)}

  places = sharding.shardings(jax.eval_shape(state, jax.random.key(0)), model.rules, mesh)
  assert all(isinstance(place, NamedSharding) for place in jax.tree.leaves(places))
  assert places['params'] == places['opt_state'][0].mu == places['opt_state'][0].nu
  assert places['step'].spec == P() and places['params']['critic']['head']['kernel'].spec == P(None)
  up = places['params']['critic']['backbone']['blocks']['mlp']['up']['kernel']
  assert up.spec == P(None, 'fsdp', 'tensor')


def test_every_large_parameter_is_split_over_fsdp(model):
  """With FSDP no device holds a full matrix."""
  mesh = mesh_of_eight()
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  for name, place in sharding.paths(sharding.shardings(shapes, model.rules, mesh)).items():
    if name.endswith(('kernel', 'embedding')):
      assert 'fsdp' in place.spec, name


def test_unmatched_and_indivisible_parameters_are_named(model):
  mesh = mesh_of_eight()
  with pytest.raises(UserError, match=r"'blocks/adapter/down' of shape \(4, 4\)"):
    sharding.shardings({'blocks': {'adapter': {'down': jnp.zeros((4, 4))}}}, model.rules, mesh)
  odd = {'blocks': {'mlp': {'up': {'kernel': jnp.zeros((2, 16, 7))}}}}
  with pytest.raises(
    UserError, match=r"blocks/mlp/up/kernel.*\(2, 16, 7\).*dimension 2.*'tensor'.*size 2"
  ):
    sharding.shardings(odd, model.rules, mesh)
  with pytest.raises(UserError, match='too few dimensions'):
    sharding.shardings({'blocks': {'mlp': {'up': {'kernel': jnp.zeros(2)}}}}, model.rules, mesh)


def test_batches_are_split_over_data_and_fsdp():
  mesh = mesh_of_eight()
  assert sharding.batch_sharding(mesh).shard_shape((8, 3)) == (2, 3)
  assert sharding.replicated(mesh).shard_shape((8, 3)) == (8, 3)


@pytest.mark.parametrize(
  'fields,shape',
  [
    (GPT2, {'data': 8}),
    (LLAMA, {'fsdp': 8}),
    (GPT2, {'data': 2, 'fsdp': 2, 'tensor': 2}),
    (LLAMA, {'data': 2, 'fsdp': 2, 'tensor': 2}),
    (LLAMA | {'tie_word_embeddings': True}, {'fsdp': 2, 'tensor': 4}),
  ],
)
def test_eight_devices_give_the_loss_and_gradient_of_one(fields, shape):
  mesh_of_eight()
  mesh = sharding.make_mesh(shape)
  model = models.create(fields)
  params = model.init(jax.random.key(0))
  tokens = np.random.default_rng(0).integers(0, 31, (8, 6)).astype(np.int32)
  positions = np.broadcast_to(np.arange(6, dtype=np.int32), (8, 6))
  segments = np.ones((8, 6), np.int32)
  segments[:, 5:] = np.arange(8)[:, None] % 2

  def loss(params, tokens, positions, segments):
    hidden, _ = model.forward(params, tokens, positions, segments)
    logprobs = jax.nn.log_softmax(model.unembed(params, hidden))
    return -(logprobs[:, :, 0] * (segments > 0)).mean()

  places = sharding.shardings(params, model.rules, mesh)
  rows = sharding.batch_sharding(mesh)
  one = jax.jit(jax.value_and_grad(loss))(params, tokens, positions, segments)
  step = jax.jit(
    jax.value_and_grad(loss),
    in_shardings=(places, rows, rows, rows),
    out_shardings=(sharding.replicated(mesh), places),
  )
  many = step(jax.device_put(params, places), tokens, positions, segments)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), many, one)


@pytest.mark.parametrize('shape', [{}, {'data': 8}, {'data': 2, 'fsdp': 2, 'tensor': 2}], ids=str)
def test_each_shard_has_its_rows_and_its_number_of_rounds(shape):
  mesh_of_eight()
  mesh = sharding.make_mesh(shape, devices=jax.devices()[: 8 if shape else 1])
  count = 8 // shape.get('tensor', 1) if shape else 1
  weights = np.diag(np.arange(1.0, 5.0, dtype=np.float32))
  inside = []

  def double(weights, rows, number):
    """Doubles rows @ weights as many times as its count."""
    inside.append((rows.shape, sharding.shards(), sharding.row_spec()))
    product = sharding.split_rows(rows @ weights)
    turn = lambda s: (s[0] + 1, sharding.split_rows(2 * s[1]))
    return jax.lax.while_loop(lambda s: s[0] < number, turn, (jnp.int32(0), product))[1]

  with jax.set_mesh(mesh):
    places = tuple(NamedSharding(mesh, spec) for spec in (P('fsdp', 'tensor'), sharding.BATCH))
    found = jax.jit(lambda *x: sharding.map_shards(double, *x))(
      *jax.device_put((weights, np.ones((16, 4))), places)
    )
  times = np.repeat(2.0 ** np.arange(count), 16 // count)
  np.testing.assert_array_equal(found, times[:, None] * np.arange(1.0, 5.0)[None])
  assert inside[0][:2] == ((16 // count, 4), (1, shape.get('tensor', 1)))
  assert not shape or inside[0][2] == P(None)


@pytest.mark.parametrize('fields', [GPT2, LLAMA], ids=['gpt2', 'llama'])
def test_activations_stay_split_by_rows_under_fsdp(fields):
  """Although parameters are split along their width, activations are not."""
  mesh_of_eight()
  model, mesh = models.create(fields), sharding.make_mesh({'fsdp': 8})
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  rows = sharding.batch_sharding(mesh)
  tokens = jax.ShapeDtypeStruct((8, 6), jnp.int32)

  def prefill(params, tokens, positions, segments):
    return model.forward(params, tokens, positions, segments, model.init_cache(8, 10))

  places = (sharding.shardings(shapes, model.rules, mesh), rows, rows, rows)
  with jax.set_mesh(mesh):
    compiled = jax.jit(prefill, in_shardings=places).lower(shapes, tokens, tokens, tokens).compile()
  hidden, cache = compiled.output_shardings
  assert hidden.shard_shape((8, 6, model.width)) == (1, 6, model.width)
  keys = (model.config.depth, 8, model.config.kv_heads, 10, model.config.head_width)
  assert cache['k'].shard_shape(keys)[:2] == (model.config.depth, 1)
