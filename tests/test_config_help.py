"""The output of --help and --print for a config."""

import json
import pathlib
import re

import pytest

from rlhf_jax import config_files
from rlhf_jax import config_help
from rlhf_jax.algorithms import build

ROOT = pathlib.Path(__file__).resolve().parents[1]


def lines(text):
  return dict(line.strip().split('=', 1) for line in text.splitlines() if line.startswith('  --'))


@pytest.mark.parametrize('algorithm', build.names())
def test_every_key_has_a_doc(algorithm):
  docs = config_help.docs(algorithm)
  keys = [
    line[len('  --config.') :].split('=')[0]
    for line in config_help.keys(build.load(algorithm).config()).splitlines()
  ]
  assert len(keys) > 40
  assert [key for key in keys if not docs.get(re.sub('evals[.]held_out', 'evals.*', key))] == []


def test_keys_values_and_docs_of_a_run():
  found = lines(config_help.keys(config_files.read(str(ROOT / 'configs' / 'ppo.py'))))
  assert found['--config.steps'].split(maxsplit=1) == [
    '1000',
    'number of train steps; or set data.epochs',
  ]
  assert found['--config.rl.vf_coef'].split(maxsplit=1) == ['0.1', 'weight of the value loss']
  assert found['--config.reference'].split(maxsplit=1) == [
    'None',
    'folder of the reference; None: the initial policy',
  ]
  assert (
    found['--config.reward.ensemble'].startswith("'mean'")
    and 'worst case' in found['--config.reward.ensemble']
  )


def test_docs_are_those_of_the_algorithm_and_its_evaluators():
  config = build.load('sft').config()
  config.evals = {
    'mine': {'kind': 'prompts', 'count': 3, 'reward': {'function': 'a:b'}},
    'own': {'function': 'a:b'},
  }
  found = lines(config_help.keys(config))
  assert found['--config.data.epochs'].split(maxsplit=1) == [
    'None',
    'passes over the data; or set steps',
  ]
  docs = {
    key: found[f'--config.{key}'].split('  ')[-1].strip()
    for key in (
      'evals.mine.kind',
      'evals.mine.count',
      'evals.mine.reward.function',
      'evals.own.function',
      'mesh.data',
      'mesh.fsdp',
      'mesh.tensor',
    )
  }
  assert len(set(docs.values())) == 7
  assert docs['evals.mine.count'] == 'number of prompts, from the start of the data; None: all'
  assert "a Python function 'package.module:function'" in docs['evals.mine.reward.function']
  assert (
    "of a user's evaluator" in docs['evals.own.function'] and 'the parameters' in docs['mesh.fsdp']
  )
  ppo = lines(config_help.keys(build.load('ppo').config()))
  assert ppo['--config.data.epochs'].split(maxsplit=1) == [
    'None',
    'passes over the prompts; or set steps',
  ]


def test_keys_of_all_stages():
  found = lines(config_help.keys(config_files.read(str(ROOT / 'configs' / 'quickstart.py'))))
  assert found['--config.ppo.rl.kl_coef'].startswith('0.15  ')
  assert found['--config.compare.pairs'].split(maxsplit=1) == [
    '8000',
    'Number of comparisons for training',
  ]


def test_the_printed_config_can_be_read(tmp_path):
  config = config_files.read(str(ROOT / 'configs' / 'quickstart.py'), 'debug,seed=3')
  config.ppo.rl.kl_coef = 0.5
  path = tmp_path / 'printed.json'
  path.write_text(config_help.resolved(config, '/runs/x'))
  found = config_files.read(str(path))
  assert found.ppo.rl.kl_coef == 0.5 and found.ppo.seed == found.world.seed == 3
  assert found.ppo.model.path == '/runs/x/sft/model' and '$workdir' not in path.read_text()
  assert found.evaluate.policies[0] == ('pretrained', '/runs/x/pretrain')
  assert config.ppo.seed is None  # unchanged
  assert '"$workdir/sft/model"' in config_help.resolved(config)
  run = config_files.read(str(ROOT / 'configs' / 'grpo.py'))
  assert json.loads(config_help.resolved(run))['sampling']['samples'] == 8
