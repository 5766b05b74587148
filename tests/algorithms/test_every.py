"""Every algorithm: one compilation, resuming to the last bit, and eight devices equal one.

A new algorithm needs one line in ALGORITHMS. The configs share what this file checks of a run; the
rest of an algorithm is tested in its own file.

python -m rlhf_jax.main --config=tests/algorithms/test_every.py:algorithm=ppo,world=FOLDER \\
    --workdir=DIR
"""

import random
import shutil
import signal

import devices
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from rlhf_jax import config as config_lib
from rlhf_jax import loop
from rlhf_jax import sharding
from rlhf_jax.algorithms import a2c
from rlhf_jax.algorithms import build
from rlhf_jax.algorithms import online_dpo
from rlhf_jax.algorithms import reinforce
from rlhf_jax.algorithms import rloo
from rlhf_jax.algorithms import trpo
import runs
import tiny


def reinforce_config(world):
  """Returns REINFORCE with the baseline that is part of the state."""
  config = tiny.on_policy(reinforce.config(), world)
  config.rl.baseline = 'moving'
  return config


def distillation_config(world):
  """Distillation on samples of the student and on completions, half of the batch each."""
  return tiny.distillation(world, 'gkd')


def grpo_config(world):
  """GRPO that samples ahead, and samples groups of equal scores again."""
  config = sampled_ahead(tiny.grpo(world))
  config.rl.update({'drop_equal_groups': True, 'max_resamples': 2})
  return config


def trpo_config(world):
  """Returns TRPO with few steps of conjugate gradients, which amplify rounding errors."""
  config = tiny.on_policy(trpo.config(), world)
  config.rl.cg_steps = 4
  return config


def sampled_ahead(config):
  """Returns a config whose rollouts are one update old, with importance weights."""
  config.sampling.staleness, config.rl.importance_cap = 1, 1.1
  return config


def mixture_config(world):
  """Returns SFT on all answers of two sources of different weights."""
  config = tiny.sft(world, 'conversation')
  config.data.path = None
  config.data.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
  config.data.mixture = {
    'few': {'path': f'{world}/completions.jsonl', 'weight': 0.25},
    'many': {'path': f'{world}/conversations.jsonl', 'weight': 0.75},
  }
  return config


def reliability_config(world):
  """Returns a reward model that learns how reliable its annotators are."""
  config = tiny.reward_model(world)
  config.data.path, config.preference.reliability = f'{world}/annotated.jsonl', True
  return config


def dpo_config(world, preset, pack):
  """Returns DPO or one of its relatives on comparisons.jsonl, with few rows if they are packed."""
  config = tiny.dpo(world, preset)
  config.dpo.pack, config.microbatch_size = pack, 8
  return config


# Module of rlhf_jax/algorithms, with what differs after a dash: function from the folder of
# tiny.write to a config.
ALGORITHMS = {
  'a2c': lambda world: tiny.on_policy(a2c.config(), world),
  'dpo': lambda world: dpo_config(world, '', pack=True),
  'dpo-kto': lambda world: dpo_config(world, 'kto', pack=False),
  'distillation': distillation_config,
  'grpo': grpo_config,
  'ilql': tiny.ilql,
  'nlpo': tiny.nlpo,
  'online_dpo': lambda world: tiny.on_policy(online_dpo.config(), world),
  'ppo': tiny.ppo,
  'reinforce': reinforce_config,
  'rejection_sampling': tiny.rejection_sampling,
  'reward_model': tiny.reward_model,
  'reward_model-reliability': reliability_config,
  'rloo': lambda world: tiny.on_policy(rloo.config(), world),
  'sft': lambda world: tiny.sft(world, 'completion'),
  'sft-mixture': mixture_config,
  'trpo': trpo_config,
}
STEPS, SAVED = 4, 2
MESH = {'data': 2, 'fsdp': 2, 'tensor': 2}
KILLS = 5


def make_config(algorithm, world):
  """Returns the config of a short run with a schedule and running moments of scores, if any."""
  config = ALGORITHMS[algorithm](world)
  config.update({'steps': STEPS, 'log_every': 1, 'checkpoint_every': SAVED, 'samples_every': 2})
  # With 1e-8 Adam amplifies the rounding of small gradients.
  config.optim.update({'schedule': 'linear', 'eps': 1e-4})
  if 'rl' in config:
    config.rl.scale_scores = True
  return config


def get_config(arg=None):
  """Returns many small steps, for the test that kills them. Arguments: algorithm, world."""
  arg = config_lib.parse_arg(arg, algorithm='ppo', world='')
  config = make_config(arg.algorithm, arg.world)
  config.update({'steps': 150, 'checkpoint_every': 3, 'samples_every': 10})
  if 'rl' in config and arg.algorithm != 'trpo':  # its surrogate has no pretraining loss
    tiny.mix_in_pretraining(config, arg.world)
  return config


def test_every_algorithm_has_a_line():
  assert sorted({name.partition('-')[0] for name in ALGORITHMS}) == build.names()


@pytest.fixture(scope='module')
def lowered():
  """Returns the names of all programs lowered so far, compiled or cached; the list grows."""
  names = []

  def listen(event, seconds, **labels):
    if event.endswith('jaxpr_to_mlir_module_duration'):
      names.append(str(labels.get('fun_name')))

  jax.monitoring.register_event_duration_secs_listener(listen)
  return names


def train_on_one_device(config, lowered, path):
  """Trains without the loop, and saves the model; returns the metrics of each step.

  Fails if a step after the first has to compile anything.
  """
  mesh, history, counts = sharding.make_mesh({}, devices=jax.devices()[:1]), [], [len(lowered)]
  with jax.set_mesh(mesh):
    learner, state = build.load(config.algorithm).create(config, mesh)
    for _ in range(config.steps):
      batch, _ = learner.next_batch(state, timed=False)
      state, metrics = learner.train_step(state, *batch)
      history.append(jax.device_get(metrics))
      counts.append(len(lowered))
    learner.export(state, path)
  assert lowered[counts[0] : counts[1]].count('jit(train_step)') == 1
  assert lowered[counts[1] : counts[-1]] == []
  return history


@pytest.mark.parametrize('algorithm', ALGORITHMS)
def test_one_compilation_resuming_and_eight_devices(algorithm, world, tmp_path, lowered):
  config = make_config(algorithm, world)
  one_device = train_on_one_device(config, lowered, tmp_path / 'one' / 'model')
  devices.first(8)
  config.mesh.update(MESH)
  loop.run(config, tmp_path / 'eight')

  # The files of a run that was killed in the middle.
  shutil.copytree(tmp_path / 'eight', tmp_path / 'killed')
  shutil.rmtree(tmp_path / 'killed' / 'model')
  shutil.rmtree(tmp_path / 'killed' / 'checkpoints' / str(STEPS))
  loop.run(config, tmp_path / 'killed')
  runs.assert_same_run(tmp_path / 'killed', tmp_path / 'eight')

  records = [r for r in runs.metrics(tmp_path / 'eight') if r.keys() & one_device[0].keys()]
  for expected, found in zip(one_device, records, strict=True):
    for name, value in expected.items():
      if name == 'rewards/accuracies' and expected is one_device[0]:
        continue  # before the first update all margins are 0 up to rounding
      if not name.startswith('samples/'):
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
  before, expected, found = (
    load_file(path / 'model.safetensors')
    for path in (world / 'model', tmp_path / 'one' / 'model', tmp_path / 'eight' / 'model')
  )
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)
    assert name not in before or np.abs(value - before[name]).max() > 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize('algorithm', ALGORITHMS)
def test_five_kills(algorithm, world, tmp_path):
  config = f'tests/algorithms/test_every.py:algorithm={algorithm},world={world}'
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  assert runs.start(config, whole).wait() == 0, (tmp_path / 'whole.log').read_text()
  draw = random.Random(algorithm)
  for _ in range(KILLS):
    process = runs.start(config, killed)
    code = runs.kill_after(process, killed, draw.randint(2, 22), draw.uniform(0.0, 0.3))
    assert code == -signal.SIGKILL, (tmp_path / 'killed.log').read_text()
  assert runs.start(config, killed).wait() == 0, (tmp_path / 'killed.log').read_text()
  runs.assert_same_run(killed, whole)
