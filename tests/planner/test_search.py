"""Candidates of a search: which are tried, their estimates, and their order."""

import math

import pytest

from configs import ppo_llama3_8b
from planner import chips
from planner import estimate
from planner import programs
from planner import report
from planner import search
from rlhf_jax import errors
from rlhf_jax import loop
from rlhf_jax import sharding
from rlhf_jax.algorithms import build
import tiny

CHIPS = 256
LINKS = {axis: 2e11 for axis in sharding.AXES}


@pytest.fixture(scope='module')
def llama():
  """Returns the config and its Programs, which can be placed on any mesh."""
  config = ppo_llama3_8b.get_config()
  config.mesh = {'data': 1, 'fsdp': 4, 'tensor': 2}
  return config, programs.make(config, sharding.make_mesh(dict(config.mesh)))


def candidate(llama, mesh, **keys):
  config, made = llama
  config = config.copy_and_resolve_references()
  config.mesh = dict(zip(sharding.AXES, mesh))
  config.update_from_flattened_dict(keys)
  work = {'rollout': 8e15, 'scoring': 7.6e15, 'update': 2.55e17}
  return search.estimated(
    config, made, work, chip=chips.CHIPS['v5e'], chips=math.prod(mesh), by_axis=LINKS
  )


def test_variants_are_valid_runs():
  config = ppo_llama3_8b.get_config()
  found = list(search.variants(config, CHIPS))
  assert len({str(varied) for varied in found}) == len(found) > 100
  for varied in found:
    build.validate(varied, CHIPS)
    assert varied.mesh.tensor in (1, 2, 4, 8)  # a divisor of the 8 heads of keys and values
  assert {varied.model.remat for varied in found} == {'none', 'block', 'dots'}
  assert {'data': 2, 'fsdp': 32, 'tensor': 4} in [varied.mesh.to_dict() for varied in found]


def test_variants_divide_the_rows_sampled_at_a_time():
  config = ppo_llama3_8b.get_config()
  config.sampling.max_concurrent = 96
  found = list(search.variants(config, CHIPS))
  assert {varied.mesh.data * varied.mesh.fsdp for varied in found} == {32}
  assert not any(
    varied.sampling.gather_weights for varied in found
  )  # they are gathered in either case


def test_a_mesh_that_does_not_divide_the_model_is_no_candidate(llama):
  assert candidate(llama, (1, 3, 1)) is None
  assert candidate(llama, (1, 32, 8)) is not None


def test_bytes_of_persistent_arrays(llama):
  count = 8_030_261_248
  kinds = candidate(llama, (1, 32, 8)).kinds
  assert kinds['policy'] == pytest.approx(2 * count / 256, rel=0.01)
  assert kinds['moments'] == pytest.approx(8 * (2 * count - 128256 * 4096) / 256, rel=0.01)
  assert kinds['master weights'] == pytest.approx(kinds['moments'] / 2, rel=0.01)
  # 8 chips of 'data' hold copies of everything.
  assert candidate(llama, (8, 4, 8)).kinds['policy'] == pytest.approx(8 * kinds['policy'], rel=0.01)


def test_gathering_the_weights_once_costs_memory_and_saves_time(llama):
  once = candidate(llama, (1, 32, 8), **{'sampling.gather_weights': True})
  each = candidate(llama, (1, 32, 8), **{'sampling.gather_weights': False})
  assert once.times['rollout'].interconnect < 0.1 * each.times['rollout'].interconnect
  assert once.extra['rollout'] - each.extra['rollout'] == pytest.approx(2 * 8.03e9 / 8, rel=0.1)
  assert each.times['rollout'].limit == 'interconnect' and once.times['rollout'].limit == 'HBM'


def test_effects_of_recomputation_and_microbatches(llama):
  memory = {
    remat: candidate(llama, (1, 64, 4), **{'model.remat': remat}).extra['update']
    for remat in ('block', 'dots', 'none')
  }
  assert memory['block'] < memory['dots'] < memory['none']
  large, small = (candidate(llama, (1, 64, 4), microbatch_size=size) for size in (256, 64))
  assert small.extra['update'] < large.extra['update']
  assert small.times['update'].interconnect > large.times['update'].interconnect


def test_order(llama):
  fast, slow = (
    candidate(llama, (1, 32, 8), **{'sampling.gather_weights': gather}) for gather in (True, False)
  )
  large = candidate(llama, (256, 1, 1))
  assert fast.seconds < slow.seconds and fast.fits and slow.fits and not large.fits
  assert search.ranked([large, slow, fast]) == [fast, slow, large]
  assert 'does not fit' in report.text([report.candidates_table([large], '')])


def test_times():
  time = estimate.Time(1.0, 3.0, 2.0, 0.0)
  assert (time.roofline, time.seconds, time.limit) == (3.0, 3.0, 'HBM')
  assert time._replace(compiler=4.0).seconds == 4.0 and time._replace(compiler=4.0).roofline == 3.0


def test_chips_by_topology():
  chip, extents = chips.of_topology('v5p:4x4x4')
  assert (chip.name, extents, chips.count(extents)) == ('v5p', (4, 4, 4), 64)
  for wrong in ('v5e', 'v5e:', 'v5e:4xa', 'h100:8x8', 'v5e:0x4'):
    with pytest.raises(errors.UserError, match='must be CHIP:AxB'):
      chips.of_topology(wrong)


def test_the_run_of_the_config_at_its_small_size(world, tmp_path):
  """The same config with folders of a tiny model: two steps."""
  for variant in ('', ',lora'):
    config = ppo_llama3_8b.get_config(
      f'debug{variant},policy={world}/model,reward={world}/reward,prompts={world}/prompts.jsonl'
    )
    assert config.model.init.num_hidden_layers == tiny.LLAMA['num_hidden_layers']
    assert (loop.run(config, tmp_path / f'run{variant}') / 'config.json').exists()


def test_a_section_of_the_report_is_replaced(tmp_path):
  path = tmp_path / 'docs' / 'plan.md'
  for title, summary in (('a', 'first'), ('b', 'second'), ('a', 'third')):
    report.append(path, title, 'python -m x', summary, [])
  text = path.read_text()
  assert text.index('## b') < text.index('## a') and 'first' not in text and 'third' in text
