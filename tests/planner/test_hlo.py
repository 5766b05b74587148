"""Collectives and cycles of compiled programs, with loops counted."""

import textwrap

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from planner import hlo
from rlhf_jax import sharding

# Shortened HLO of XLA for TPUs: a loop of 10 - 2 iterations whose body gathers once, in three
# fusions that overlap it with two matmuls, and an inner loop of 4 iterations with a reduce-scatter.
MODULE = textwrap.dedent("""\
    HloModule jit_f, is_scheduled=true

    %add (x: f32[], y: f32[]) -> f32[] {
      %x = f32[] parameter(0)
      %y = f32[] parameter(1)
      ROOT %s = f32[] add(%x, %y)
    }

    %starts (p: bf16[4,8]) -> (bf16[4,8], bf16[32,8]) {
      %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
      %all-gather.1 = bf16[32,8]{1,0:T(8,128)S(1)} all-gather(%p), channel_id=1, \
        replica_groups=mesh['a'=8] {'a'}
      ROOT %start = (bf16[4,8], bf16[32,8]) custom-call(%all-gather.1), \
        custom_call_target="AsyncCollectiveStart"
    }

    %goes_on (p.1: bf16[4,8]) -> bf16[32,8] {
      %p.1 = bf16[4,8]{1,0} parameter(0)
      ROOT %all-gather.2 = bf16[32,8]{1,0} all-gather(%p.1), channel_id=1, \
        replica_groups=mesh['a'=8] {'a'}
    }

    %all-reduce-scatter.1 (p.2: f32[64]) -> f32[16] {
      %p.2 = f32[64]{0} parameter(0)
      %all-reduce.1 = f32[64]{0} all-reduce(%p.2), channel_id=2, \
        replica_groups=[4,4]<=[16], to_apply=%add
      ROOT %slice = f32[16]{0} dynamic-slice(%all-reduce.1)
    }

    %inner_body (s.1: (s32[], f32[64])) -> (s32[], f32[64]) {
      %s.1 = (s32[]{:T(128)}, f32[64]{0}) parameter(0)
      %f.1 = f32[16]{0} fusion(%s.1), kind=kCustom, calls=%all-reduce-scatter.1, \
        backend_config={"estimated_cycles":"7"}
      ROOT %t.1 = (s32[], f32[64]{0}) tuple(%s.1, %f.1)
    }

    %inner_cond (s.2: (s32[], f32[64])) -> pred[] {
      %four = s32[]{:T(128)} constant(4)
      %s.2 = (s32[], f32[64]{0}) parameter(0)
      %i.2 = s32[]{:T(128)} get-tuple-element(%s.2), index=0
      ROOT %lt.2 = pred[] compare(%i.2, %four), direction=LT
    }

    %outer_body (s.3: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
      %s.3 = (s32[], bf16[4,8]{1,0}) parameter(0)
      %zero = s32[] constant(0)
      %g.3 = bf16[4,8]{1,0} get-tuple-element(%s.3), index=1
      %f.3 = (bf16[4,8], bf16[32,8]) fusion(%g.3), kind=kCustom, calls=%starts, \
        config={"estimated_cycles":"100"}
      %f.4 = bf16[32,8]{1,0} fusion(%f.3), kind=kCustom, calls=%goes_on, \
        backend_config={"estimated_cycles":"50"}
      %kernel.1 = f32[16]{0} custom-call(%f.4), frontend_attributes={kernel_metadata={
    "xprof_metadata":"{\\"block_q\\": 512}"
    }}, metadata={op_name="jit(f)/pallas_call"}, backend_config={"custom_call_config":{}}
      %copied = s32[] copy(%zero)
      %t.3 = (s32[], f32[64]{0}) tuple(%copied, %f.4)
      %while.3 = (s32[], f32[64]{0}) while(%t.3), condition=%inner_cond, body=%inner_body
      ROOT %r.3 = (s32[], bf16[4,8]{1,0}) tuple(%s.3, %while.3)
    }

    %outer_cond (s.4: (s32[], bf16[4,8])) -> pred[] {
      %s.4 = (s32[], bf16[4,8]{1,0}) parameter(0)
      %ten = s32[] constant(11)
      %one = s32[] constant(1)
      %i.4 = s32[] get-tuple-element(%s.4), index=0
      %next = s32[] add(%i.4, %one)
      %lt.4 = pred[] compare(%next, %ten), direction=LT
      %done = pred[] all-reduce(%lt.4), channel_id=3, \
        replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
      ROOT %and = pred[] and(%lt.4, %done)
    }

    ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
      %a = bf16[4,8]{1,0} parameter(0)
      %two = s32[] constant(2)
      %t.5 = (s32[], bf16[4,8]{1,0}) tuple(%two, %a)
      %while.5 = (s32[], bf16[4,8]) while(%t.5), condition=%outer_cond, body=%outer_body
      %permuted = (bf16[4,8], bf16[4,8], u32[], u32[]) collective-permute-start(%a), channel_id=4
      ROOT %out = bf16[4,8]{1,0} get-tuple-element(%while.5), index=1, \
        backend_config={"estimated_cycles":"3"}
    }
    """)


def test_loops_and_collectives_that_overlap_with_computation():
  found = hlo.totals(MODULE)
  assert found.unbounded == 0
  assert found.cycles == 3 + 8 * (100 + 50 + 4 * 7)
  assert found.calls == {
    ('all-gather', 8): 8,
    ('reduce-scatter', 4): 32,
    ('all-reduce', 4): 8,
    ('collective-permute', 2): 1,
  }
  assert found.sent == pytest.approx(
    {
      ('all-gather', 8): 8 * 32 * 8 * 2 * 7 / 8,  # iterations, elements, bytes, all parts but one
      ('reduce-scatter', 4): 32 * 64 * 4 * 3 / 4,
      ('all-reduce', 4): 8 * 1 * 2 * 3 / 4,
      ('collective-permute', 2): 4 * 8 * 2,
    }
  )


@pytest.mark.parametrize(
  'text, chips',
  [
    ("replica_groups=mesh['a'=4,'b'=64], device_ids=([64,4]T(1,0)) {'b'}, dimensions={2}", 64),
    ("replica_groups=mesh['a'=4,'b'=64] {'a','b'}, use_global_device_ids=true", 256),
    ("replica_groups=mesh['a'=64] {'a':(4)16}", 16),
    ('replica_groups=[8,32]<=[32,8]T(1,0), dimensions={0}', 32),
    ('replica_groups={{0,2,4},{1,3,5}}', 3),
    ('channel_id=1', 1),
  ],
)
def test_chips_of_a_group(text, chips):
  assert hlo.group_size(text) == chips


def test_programs_that_xla_compiles_for_eight_devices():
  mesh = sharding.make_mesh({'fsdp': 8})
  rows, width, layers = 64, 32, 5
  put = lambda shape, spec: jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=NamedSharding(mesh, spec)
  )

  def apply(x, weights):
    def layer(x, w):
      return jnp.tanh(jax.lax.with_sharding_constraint(x @ w, P('fsdp', None))), None

    return jax.lax.scan(layer, x, weights)[0]

  with jax.set_mesh(mesh):
    text = (
      jax.jit(apply)
      .lower(
        put((rows, width), P('fsdp', None)), put((layers, width, width), P(None, 'fsdp', None))
      )
      .compile()
      .as_text()
    )
  found = hlo.totals(text)
  assert found.unbounded == 0
  assert found.calls == {('all-gather', 8): layers}
  assert found.sent == {('all-gather', 8): layers * width * width * 4 * 7 / 8}
