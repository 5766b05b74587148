"""Configs from Python files, and from the config.json of runs."""

import importlib.util
import json
import pathlib
import sys

import ml_collections
import pytest

from rlhf_jax import config_files
from rlhf_jax import errors
from rlhf_jax import identity
from rlhf_jax import pipeline
from rlhf_jax.algorithms import build
from rlhf_jax.algorithms import sft
import tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
BEGIN = (  # 5 lines
  'from rlhf_jax.algorithms import sft\n\n\ndef get_config(arg=None):\n  config = sft.config()\n'
)
PIPELINE = (
  'import ml_collections\n\n\ndef get_config(arg=None):\n'
  "  return ml_collections.ConfigDict({'seed': 0, "
)


def test_a_file_may_import_files_of_its_folder(tmp_path, monkeypatch):
  (tmp_path / 'shared_settings.py').write_text('steps = 77\n')
  path = tmp_path / 'mine.py'
  path.write_text(
    'import shared_settings\n'
    + BEGIN
    + '  from shared_settings import steps\n  config.steps = steps\n  return config\n'
  )
  monkeypatch.chdir(ROOT)
  before = list(sys.path)
  assert config_files.read(str(path)).steps == 77 and sys.path == before


@pytest.mark.parametrize('name', ['quickstart', 'configs/quickstart.py'])
def test_a_config_is_found_by_name_and_by_path(name, monkeypatch):
  monkeypatch.chdir(ROOT)
  assert pathlib.Path(config_files.find(name)).resolve() == ROOT / 'configs' / 'quickstart.py'
  assert 'quickstart' in config_files.names()


@pytest.mark.parametrize(
  'text, message',
  [
    ('x = 1\ndef get_config(arg=None)\n  pass\n', "FILE:2: expected ':': def get_config(arg=None)"),
    (
      'def config():\n  pass\n',
      'FILE:1: defines no get_config(arg=None), which returns the config',
    ),
    (
      '\n\ndef get_config(arg=None):\n  return {}\n',
      'FILE:3: get_config() returns a dict: it must return a ConfigDict',
    ),
    (
      'def get_config(arg=None):\n  pass\n',
      'FILE:1: get_config() returns nothing: it must return a ConfigDict',
    ),
    ('import no_such_module\n', "FILE:1: ModuleNotFoundError: No module named 'no_such_module'"),
    ('\nopen("no_such_file")\n', "FILE:2: [Errno 2] No such file or directory: 'no_such_file'"),
    (BEGIN + '  return 1 / 0\n', 'FILE:6: ZeroDivisionError: division by zero'),
    (
      BEGIN + '  config.optim.learning_rat = 1\n',
      "FILE:6: the config has no key 'learning_rat'. Did you mean 'learning_rate'?",
    ),
    (
      BEGIN + "  config.data.update({'max_lenght': 3})\n",
      "FILE:6: the config has no key 'max_lenght'. Did you mean 'max_length'?",
    ),
    (
      BEGIN + '\n  config.steps = config.data.epoch\n',
      "FILE:7: the config has no key 'epoch'. Did you mean 'epochs'?",
    ),
    (
      BEGIN + '  config.batch_size.x = 1\n',
      "FILE:6: AttributeError: 'int' object has no attribute 'x'",
    ),
    (
      BEGIN + "  config.batch_size = 'many'\n",
      "FILE:6: config.batch_size='many' must be a whole number",
    ),
    (
      BEGIN + "  config.optim.learning_rate = 'fast'\n",
      "FILE:6: config.optim.learning_rate='fast' must be a finite number",
    ),
    (
      BEGIN + "\n  config.optim.update({'b1': 'x'})\n",
      "FILE:7: config.optim.b1='x' must be a finite number",
    ),
    (BEGIN + "  config.steps = 'few'\n", "FILE:6: config.steps='few' must be a whole number"),
    (BEGIN + '  config.optim = 3\n', 'FILE:6: config.optim=3 must be a dict'),
    (
      BEGIN + "  config.data = {'path': 'x', 'split': None}\n  return config\n",
      'FILE:6: config.data lacks chat_template, columns, epochs and others: set single keys, '
      'config.data.KEY = ',
    ),
    (
      BEGIN
      + "  config.update_from_flattened_dict({'steps': 1})\n"
      + '  del config.unlock().optim.b1\n  return config\n',
      'FILE:4: config.optim lacks b1: set single keys',
    ),
    (
      f"from rlhf_jax.algorithms import sft\n{PIPELINE}'stages': ('a',), 'a': cut()}})\n\n\n"
      "def cut():\n  run = sft.config()\n  run.data = {'path': 'x'}\n  return run\n",
      'FILE:11: config.a.data lacks chat_template',
    ),
    ('import sys\nsys.exit(0)\n', 'FILE:2: sys.exit(0) is called: the file must return its config'),
    (BEGIN + '  raise SystemExit\n', 'FILE:6: sys.exit(None) is called'),
    ('x = 1\0\n', 'FILE:1: source code string cannot contain null bytes'),
    (PIPELINE + "'stages': ('a',), 'sede': 3})\n", 'FILE:4: config.sede=3 has no effect: beside'),
    (
      PIPELINE + "'steps': 3})\n",
      'FILE:4: the config of get_config() must come from the config() of an algorithm; or',
    ),
  ],
)
def test_mistakes_in_a_file(text, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'mine.py').write_text(text)
  with pytest.raises(errors.UserError) as caught:
    config_files.read('mine.py')
  assert str(caught.value).startswith(message.replace('FILE', 'mine.py')) and '\n' not in str(
    caught.value
  )
  assert not str(caught.value).endswith(':')


def test_a_file_that_is_not_there():
  for name in ('nothing.py', 'nothing', 'nothing.json', str(ROOT)):
    with pytest.raises(OSError):
      config_files.read(name)


def configured(name, arg=None):
  """Returns the result of get_config in a file of configs/."""
  spec = importlib.util.spec_from_file_location(name, ROOT / 'configs' / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  with config_files.importable(str(ROOT / 'configs')):
    spec.loader.exec_module(module)
  return module.get_config(arg)


def written(config, folder):
  """Returns the config.json that a run writes."""
  identity.write_json(folder / 'config.json', config.to_dict())
  return str(folder / 'config.json')


@pytest.mark.parametrize(
  'name, arg',
  [
    ('quickstart', 'debug,lora'),
    ('ppo', None),
    ('grpo', None),
    ('a2c', None),
    ('nlpo', None),
    ('rejection_sampling', None),
    ('best_of_n', None),
    ('expert_iteration', 'debug'),
    ('dpo', None),
    ('online_dpo', None),
    ('distillation', None),
    ('context_distillation', 'lora'),
    ('smaller_student', 'debug'),
    ('trpo', None),
    ('hh_reward', 'data=x'),
    ('reward_model', None),
    ('random_walks', None),
    ('random_walks_offline', 'debug'),
    ('ilql', None),
    ('overoptimization', None),
    ('online', None),
    ('pmp', 'debug'),
    ('unreliable_annotators', 'debug'),
    ('preferences', 'debug'),
    ('red_team', None),
    ('sparrow', None),
  ],
)
def test_a_config_comes_back_as_it_was(name, arg, tmp_path):
  config = configured(name, arg)
  found = config_files.read(written(config, tmp_path))
  assert found.to_dict() == config.to_dict() and found.is_locked
  for block, wanted in (
    ((found, config),)
    if 'algorithm' in config
    else ((found[stage], config[stage]) for stage in config.stages if 'algorithm' in config[stage])
  ):
    for key in ('steps', 'batch_size', 'tokenizer', 'samples_every'):
      assert block.get_type(key) is wanted.get_type(key)
    with pytest.raises(AttributeError):
      block.optim.learning_rat = 1.0


def test_a_null_key_takes_values_of_its_default_type(tmp_path):
  config = tiny.sft('world')
  config.evals = {'held_out': {'kind': 'loss', 'every': None}}
  found = config_files.read(written(config, tmp_path))
  found.data.epochs, found.optim.clip_norm, found.evals.held_out.every = 2, 1, 3
  assert (found.data.epochs, found.optim.clip_norm) == (2.0, 1.0) and isinstance(
    found.data.epochs, float
  )
  with pytest.raises(TypeError):
    found.data.epochs = 'many'


def test_a_run_of_an_older_version_gets_the_defaults_of_new_keys(tmp_path):
  found = config_files.read(
    written(
      ml_collections.ConfigDict({'algorithm': 'sft', 'steps': 3, 'data': {'gone': None}}), tmp_path
    )
  )
  assert (
    found.steps == 3
    and 'gone' not in found.data
    and found.optim.learning_rate == sft.config().optim.learning_rate
  )


@pytest.mark.parametrize(
  'text, message',
  [
    (
      '{"algorithm": "sft", "optim": {"learning_rat": 1}}',
      "FILE: config.optim has no key 'learning_rat'. Did you mean 'learning_rate'?",
    ),
    (
      '{"algorithm": "sft", "batch_size": true}',
      'FILE: config.batch_size=True must be a whole number',
    ),
    ('{"algorithm": "sft", "optim": 3}', 'FILE: config.optim=3 must be an object'),
    (
      '{"stages": ["a"], "seed": 0, "a": {"algorithm": "sft", "stepz": 3}}',
      "FILE: stage a: config has no key 'stepz'",
    ),
    ('{"algorithm":\n sft}', 'FILE:2: not JSON: '),
    (
      '{"model_type": "llama"}',
      'FILE: has neither algorithm nor stages: it is not the config.json of a run',
    ),
    ('{"algorithm": "no_such"}', "config.algorithm='no_such' cannot be loaded"),
  ],
)
def test_mistakes_in_a_config_json(text, message, tmp_path):
  path = tmp_path / 'config.json'
  path.write_text(text)
  with pytest.raises(errors.UserError) as caught:
    config_files.read(str(path))
  assert str(caught.value).startswith(message.replace('FILE', str(path)))


def test_a_rerun_of_a_fork_starts_from_the_beginning(tmp_path, capsys):
  path = tmp_path / 'config.json'
  fields = tiny.sft('world').to_dict()
  path.write_text(json.dumps(fields | {'forked_from': {'workdir': 'runs/first', 'step': 40}}))
  assert config_files.read(str(path)).to_dict() == fields
  assert capsys.readouterr().err == (
    f'{path}: this run started from step 40 of runs/first; this one starts from the beginning\n'
  )


def test_the_seed_of_a_stage_can_be_set():
  config = config_files.read(str(ROOT / 'configs' / 'quickstart.py'), 'debug')
  config.ppo.seed, config.world.seed = 4, 5
  with pytest.raises(TypeError):
    config.ppo.seed = 'one'
  assert pipeline.resolve(config.ppo, 'x', 0).seed == 4
  build.validate(pipeline.resolve(config.ppo, 'x', 0), 1)


def test_an_override_of_one_key_keeps_the_others_of_an_open_block():
  config = sft.config()
  config_files.override(
    config,
    {
      'evals.held_out.every': 5,
      'evals.texts.kind': 'text',
      'evals.texts.every': 2,
      'model.init.family': 'llama',
      'model.init.vocab_size': 64,
    },
  )
  assert config.evals.to_dict() == {
    'held_out': {'kind': 'loss', 'every': 5},
    'texts': {'kind': 'text', 'every': 2},
  }
  assert config.model.init.to_dict() == {'family': 'llama', 'vocab_size': 64}
  with pytest.raises(errors.UserError, match='config.evals.held_out.every'):
    config_files.override(config, {'evals.held_out.every': 'often'})
  with pytest.raises(errors.UserError, match="config.optim has no key 'learning_rat'"):
    config_files.override(config, {'optim.learning_rat': 1.0})
