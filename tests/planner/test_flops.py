"""FLOPs of traced programs against counts by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest

from configs import ppo_llama3_8b
from planner import flops
from planner import programs
from planner import search
from rlhf_jax import sharding
from rlhf_jax.models import attention

M, K, N = 3, 5, 7
MATMUL = 2 * M * K * N


def count(function, *shapes):
  return flops.of(jax.jit(function).trace(*[jnp.zeros(shape) for shape in shapes]))


def test_a_matmul_and_a_batch_of_them():
  assert count(lambda a, b: a @ b, (M, K), (K, N)) == (MATMUL, 0)
  assert count(lambda a, b: jnp.einsum('bmk,bnk->bmn', a, b), (4, M, K), (4, N, K)) == (
    4 * MATMUL,
    0,
  )
  assert count(lambda a, b: jnp.tanh(a @ b).sum(), (M, K), (K, N)).flops == MATMUL


def test_a_convolution():
  # 8 outputs of 6 channels, each from 3 slots of 2 channels.
  convolve = lambda x, w: jax.lax.conv_general_dilated(x, w, (1,), 'SAME')
  assert count(convolve, (1, 2, 8), (6, 2, 3)).flops == 2 * 8 * 6 * 3 * 2


def test_loops_count_as_often_as_they_run():
  def nested(a, b):
    inner = lambda x, _: (x + a @ b, None)
    outer = lambda x, _: (jax.lax.scan(inner, x, None, length=4)[0], None)
    return jax.lax.scan(outer, jnp.zeros((M, N)), None, length=6)[0]

  assert count(nested, (M, K), (K, N)) == (24 * MATMUL, 0)


def test_a_while_loop_runs_to_its_bound_whatever_else_could_end_it():
  def loop(a, b):
    def step(s):
      return s[0] + 1, s[1] + a @ b, s[2]

    state = jax.lax.while_loop(
      lambda s: (s[0] < 10) & ~jnp.all(s[2]), step, (jnp.int32(3), jnp.zeros((M, N)), a > 0)
    )
    # Continues where the first stopped, at 10, by 2 per iteration.
    more = lambda s: (s[0] + 2, s[1] + a @ b)
    return jax.lax.while_loop(lambda s: s[0] <= 20, more, (state[0] + 1, state[1]))

  assert count(loop, (M, K), (K, N)) == ((7 + 5) * MATMUL, 0)


def test_a_loop_without_a_bound_is_reported():
  def loop(a, b):
    return jax.lax.while_loop(lambda x: jnp.sum(x) < 1.0, lambda x: x + a @ b, jnp.zeros((M, N)))

  assert count(loop, (M, K), (K, N)) == (MATMUL, 1)


def test_of_two_branches_the_larger():
  def branch(a, b):
    return jax.lax.cond(a[0, 0] > 0, lambda: jnp.sum(a @ b), lambda: 0.0)

  assert count(branch, (M, K), (K, N)).flops == MATMUL


def test_gradients_and_recomputation():
  loss = lambda a, b: jnp.sum(jnp.sin(a @ b))
  assert count(jax.grad(loss, argnums=(0, 1)), (M, K), (K, N)).flops == 3 * MATMUL
  # A block that is recomputed: one more forward pass.
  again = jax.checkpoint(lambda a, b: jnp.sin(a @ b))
  assert (
    count(jax.grad(lambda a, b: jnp.sum(again(a, b)), argnums=(0, 1)), (M, K), (K, N)).flops
    == 4 * MATMUL
  )


def test_attention_in_a_kernel_and_in_blocks():
  shapes = [
    jax.ShapeDtypeStruct((4, *shape), jnp.float32)
    for shape in ((1024, 4, 64), (2, 1024, 64), (2, 1024, 64))
  ]
  segments = jax.ShapeDtypeStruct((4, 1024), jnp.int32)
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  matmul = 4 * 4 * 2 * 1024 * 1024 * 64
  kernel = lambda q, k, v, s: attention.on_shards(
    functools.partial(attention.splash, window=0, score_cap=0.0), q, k, v, s
  )
  in_blocks = lambda q, k, v, s: attention.blocks(q, k, v, s, s, index=0, window=0, score_cap=0.0)
  for function, share in ((kernel, 1), (in_blocks, 36 / 64)):
    gradient = jax.grad(lambda *operands: jnp.sum(function(*operands)), argnums=(0, 1, 2))
    for call, matmuls in ((function, 2), (gradient, 9 if function is kernel else 7)):
      with jax.set_mesh(mesh):
        found = flops.of(jax.jit(call).trace(*shapes, segments))
      assert (
        found.flops == pytest.approx(matmuls * share * matmul, rel=1e-3) and not found.unbounded
      )


def test_every_data_shard_counts():
  """Parts split over 'tensor', which the function does not name, count once."""
  with jax.set_mesh(sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})):
    product = functools.partial(sharding.map_shards, lambda weights, rows, number: rows @ weights)
    assert count(product, (K, N), (4 * M, K)) == (4 * MATMUL, 0)


def test_the_count_of_all_programs_of_llama_3_8b_is_the_one_by_hand(monkeypatch):
  config = ppo_llama3_8b.get_config()
  config.mesh = {'data': 1, 'fsdp': 4, 'tensor': 2}
  mesh = sharding.make_mesh(dict(config.mesh))
  made = programs.make(config, mesh)
  assert (
    sum(leaf.size for leaf in jax.tree.leaves(made.arrays['state'].params['policy']))
    == 8_030_261_248
  )
  work = search.operations(made, mesh)
  batch, prompt, response, length = 512, 512, 512, 1024
  layers, width, inner, vocab, heads, kv_width, head_width = 32, 4096, 14336, 128256, 32, 1024, 128
  down = inner * width
  weights = layers * (2 * width * width + 2 * width * kv_width + 3 * down)  # 6.98e9
  attention = lambda queries, keys: layers * 4 * queries * keys * heads * head_width
  # Blocks of 128 x 128 above the diagonal are skipped; the kernel needs 7 matmuls per block for 2
  # forward ones.
  blocks, blocks_of_prompt = (
    length // 128 * (length // 128 + 1) / 2,
    prompt // 128 * (prompt // 128 + 1) / 2,
  )
  forward = batch * (2 * length * weights + blocks * attention(128, 128))
  logits = batch * response * 2 * width * vocab
  # Four stages of 128 tokens, the first of which comes from the prompt; keys are the full cache of
  # the stage.
  stages = attention(127, 640) + attention(128, 768) + attention(128, 896) + attention(128, 1024)
  decode = (
    batch
    * (2 * (prompt + response - 1) * weights + blocks_of_prompt * attention(128, 128) + stages)
    + logits
  )
  # Policy, critic and reference once; then 4 epochs of 2 models: forth, again but for the last
  # matmul of a block, and back, twice as much and a third time the scores. Logits are computed
  # again as well.
  again = forward - batch * length * 2 * layers * down
  back = 2 * forward + batch * blocks * attention(128, 128) / 2
  update = 3 * forward + 2 * logits + 4 * (2 * (forward + again + back) + 4 * logits)
  assert work == {
    'rollout': pytest.approx(decode, rel=1e-3),
    'scoring': pytest.approx(forward, rel=1e-3),
    'update': pytest.approx(update, rel=1e-3),
  }
  # And by the rule of thumb, 2 N a token forward and 6 N in training (Kaplan et al. 2020, §2.1).
  rule = 2 * 6.98e9 * batch * length
  assert work['scoring'] == pytest.approx(rule, rel=0.05)
  assert work['update'] == pytest.approx((3 + 4 * 2 * 3 + 8) * rule + 18 * logits, rel=0.05)
