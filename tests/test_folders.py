"""The folder of a run in place of the folder of a model."""

import json
import shutil

import pytest

from rlhf_jax import errors
from rlhf_jax import folders
from rlhf_jax import policy
from rlhf_jax.algorithms import setup
from rlhf_jax.data import tokenizers
from rlhf_jax.models import hf
import tiny


@pytest.fixture(scope='module')
def run(world, tmp_path_factory):
  """Returns the folder of a finished run: its config.json, and model/."""
  folder = tmp_path_factory.mktemp('run')
  (folder / 'config.json').write_text(json.dumps(tiny.sft(world).to_dict()))
  shutil.copytree(world / 'reward', folder / 'model')
  return folder


def test_a_finished_run_is_its_model(run, world):
  assert (
    folders.find_model(run) == run / 'model' and folders.find_model(run / 'model') == run / 'model'
  )
  assert setup.is_reward_model(run) and not setup.is_reward_model(world / 'model')
  assert len(tokenizers.load(run)) == tiny.VOCAB
  model, params = hf.load_reward(run)
  assert model.width == tiny.LLAMA['hidden_size'] and 'head' in params


def test_a_model_with_a_folder_of_that_name_is_itself(world, tmp_path):
  shutil.copytree(world / 'model', tmp_path / 'm')
  (tmp_path / 'm' / 'model').mkdir()
  assert folders.find_model(tmp_path / 'm') == tmp_path / 'm'
  assert policy.TextPolicy.load(tmp_path / 'm').model.family == 'llama'


def test_what_is_neither_is_left_to_those_who_read_it(tmp_path):
  assert (
    folders.find_model(tmp_path / 'no') == tmp_path / 'no'
    and folders.find_model(tmp_path) == tmp_path
  )
  (tmp_path / 'config.json').write_text('{')
  assert folders.find_model(tmp_path) == tmp_path


@pytest.mark.parametrize(
  'fields, message',
  [
    (
      {'algorithm': 'sft'},
      'is the folder of a run that has not finished, and holds no model yet: resume it',
    ),
    (
      {'stages': ['sft', 'ppo'], 'seed': 0},
      'is the folder of a pipeline: name the folder of a stage, such as .*/ppo',
    ),
  ],
)
def test_runs_without_a_model(fields, message, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(fields))
  with pytest.raises(errors.UserError, match=message):
    hf.load(tmp_path)
