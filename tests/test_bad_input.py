"""Every mistake of a user gives a message with cause and remedy, and costs no checkpoint."""

import errno
import functools
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

from absl import flags
import jax
import numpy as np
import pytest

from rlhf_jax import command_line as command_line_lib
from rlhf_jax import config as config_lib
from rlhf_jax import config_files
from rlhf_jax import errors
from rlhf_jax import loop
from rlhf_jax import main
from rlhf_jax import metrics as metrics_lib
from rlhf_jax import pipeline
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms import sft
from rlhf_jax.rewards import functions
import tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]


# The command line.

COMMANDS = {
  'unknown key': (
    ['--config=configs/quickstart.py', '--config.no_such_key=1'],
    ["--config.no_such_key=1: the config has no key 'no_such_key'", 'Add --help to list its keys'],
  ),
  'misspelt key': (
    ['--config=configs/quickstart.py', '--config.ppo.optim.learning_rat=1'],
    ["no key 'learning_rat'", "Did you mean 'learning_rate'?"],
  ),
  'key of another stage': (
    ['--config=configs/quickstart.py', '--config.sft.ptx_coef=1'],
    ["no key 'ptx_coef'"],
  ),
  'unknown file': (
    ['--config=configs/nothing.py', '--config.seed=1'],
    ['--config=configs/nothing.py: there is no such file in ', 'The configs are a2c, '],
  ),
  'unknown argument': (
    ['--config=configs/quickstart.py:debgu'],
    ["config argument 'debgu' is unknown", 'this config takes: debug, seed'],
  ),
  'argument of the wrong type': (
    ['--config=configs/quickstart.py:seed=first'],
    ["config argument seed='first' must be of type int"],
  ),
  'unknown option': (['--confg=configs/quickstart.py'], ["'confg'", 'Did you mean: config']),
  'wrong type': (
    ['--config=configs/quickstart.py', '--config.ppo.batch_size=many'],
    ['error: --config.ppo.batch_size=many: must be a whole number'],
  ),
  'half a step': (
    ['--config=configs/sft.py', '--config.steps=1.5'],
    ['error: --config.steps=1.5: must be a whole number'],
  ),
  'no number': (
    ['--config=configs/sft.py', '--config.optim.b1=x: y'],
    ['error: --config.optim.b1=x: y: must be a number'],
  ),
  'no boolean': (
    ['--config=configs/ppo.py', '--config.rl.whiten_rewards=maybe'],
    ['error: --config.rl.whiten_rewards=maybe: must be True or False'],
  ),
  'no dict': (
    ['--config=configs/ppo.py', '--config.data=3'],
    ['error: --config.data=3: must be a dict, such as'],
  ),
  'a key below a value': (
    ['--config=configs/sft.py', '--config.batch_size.x=3'],
    ['error: --config.batch_size.x=3: config.batch_size is a value, without keys below it'],
  ),
  'no file': (['--config='], ['error: --config is empty: Name of a config']),
  'a folder': (['--config=configs'], ['--config=configs: there is no such file in ']),
  'misspelt name': (
    ['--config=quikstart:debug'],
    ['--config=quikstart: there is no such file in ', "Did you mean 'quickstart'? The configs are"],
  ),
}


@pytest.fixture
def command_line(monkeypatch):
  """Parses arguments as main does, and resets the flags afterwards."""

  def parse(arguments, required=()):
    monkeypatch.setattr(sys, 'argv', ['main', *arguments])
    return command_line_lib.parse(sys.argv, required)

  monkeypatch.chdir(ROOT)
  yield parse
  for name in list(flags.FLAGS):
    if name.startswith('config.'):
      delattr(flags.FLAGS, name)
  flags.FLAGS.unparse_flags()


@pytest.mark.parametrize('name', COMMANDS)
def test_a_mistake_on_the_command_line(name, command_line):
  arguments, parts = COMMANDS[name]
  with pytest.raises(SystemExit) as caught:
    command_line(arguments)
  message = str(caught.value.code)
  assert message.startswith('error: ') and '\n' not in message
  for part in parts:
    assert part in message, message


def test_a_key_is_turned_off_on_the_command_line(command_line):
  command_line(
    [
      '--config=configs/sft.py',
      '--config.data.epochs=None',
      '--config.steps=7',
      '--config.optim.clip_norm=None',
      '--config.data.held_out=None',
    ]
  )
  config = flags.FLAGS.config
  assert (config.steps, config.data.epochs, config.optim.clip_norm) == (7, None, None)
  assert config.data.held_out is None
  with pytest.raises(SystemExit, match="the config has no key 'epoch'. Did you mean 'epochs'"):
    command_line(['--config=configs/sft.py', '--config.data.epoch=None'])


def test_a_logged_config_runs_again_with_overrides(command_line, tmp_path):
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(sft.config().to_dict() | {'steps': 5}))
  command_line(
    [
      f'--config={path}',
      '--config.data.epochs=2',
      '--config.steps=None',
      '--config.model.path=m',
      "--config.model.lora.targets=(('up', 4, 8.0),)",
    ]
  )
  config = flags.FLAGS.config
  assert (config.steps, config.data.epochs, config.model.path) == (None, 2.0, 'm')
  assert config.model.lora.targets == (('up', 4, 8.0),)
  with pytest.raises(SystemExit, match="the config has no key 'epoch'. Did you mean 'epochs'"):
    command_line([f'--config={path}', '--config.data.epoch=2'])


def test_the_folder_of_a_run_is_not_its_config(command_line, tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(SystemExit) as caught:
    command_line([f'--config={tmp_path}'])
  assert caught.value.code == f'error: --config={tmp_path} is a folder: name {tmp_path}/config.json'


@pytest.mark.parametrize(
  'arguments, said',
  [
    ([], 'error: --model is missing: A folder.'),
    (['--model=x', '--count=two'], 'error: --count=two: must be a whole number'),
    (['--modle=x'], "error: Unknown command line flag 'modle'. Did you mean: model ?"),
  ],
)
def test_flags_of_a_program_without_a_config(arguments, said, monkeypatch):
  own = flags.FlagValues()
  flags.DEFINE_string('model', None, 'A folder.', flag_values=own)
  flags.DEFINE_integer('count', 1, 'Of samples.', flag_values=own)
  monkeypatch.setattr(flags, 'FLAGS', own)
  with pytest.raises(SystemExit) as caught:
    command_line_lib.parse(['generate', *arguments], ('model',))
  assert caught.value.code == said
  assert command_line_lib.parse(['generate', '--model=x', 'y'], ('model',)) == ['generate', 'y']


@pytest.mark.parametrize(
  'error, said, status',
  [
    (errors.UserError('bad'), 'error: bad', 1),
    (KeyboardInterrupt(), 'stopped by SIGINT', 130),
    (
      OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), '/x'),
      'error: No space left on device (/x): free some space',
      1,
    ),
  ],
)
def test_programs_that_read_end_in_one_line(error, said, status, monkeypatch):
  ends = []
  monkeypatch.setattr(command_line_lib.runtime, 'exit_now', lambda *end: ends.append(end))
  with command_line_lib.exit_on_error():
    raise error
  assert ends == [(said, status)]
  with pytest.raises(ZeroDivisionError):
    with command_line_lib.exit_on_error():
      raise ZeroDivisionError  # a bug: its traceback must be shown


@pytest.mark.parametrize('option', ['--help', '--print'])
def test_help_and_the_config_itself_need_no_workdir(option, command_line, capsys):
  with pytest.raises(SystemExit) as caught:
    command_line(['--config=configs/sft.py', option, '--config.batch_size=12'])
  assert caught.value.code == 0
  out = capsys.readouterr().out
  if option == '--print':
    assert json.loads(out)['batch_size'] == 12
  else:
    assert '--config.batch_size=12  ' in out and '--print' in out


@pytest.mark.parametrize(
  'arguments, name', [([], 'config'), (['--config=configs/sft.py'], 'workdir')]
)
def test_missing_arguments_are_named(arguments, name, command_line):
  with pytest.raises(SystemExit, match=f'error: --{name} is missing: '):
    command_line(arguments, required=('config', 'workdir'))


def test_an_argument_that_a_stage_does_not_take(monkeypatch):
  monkeypatch.chdir(ROOT)
  stage = config_files.read('configs/quickstart.py', 'debug').world
  stage.unlock().prompt_cont = 3
  with pytest.raises(
    errors.UserError, match="unexpected keyword argument 'prompt_cont'.*Did you mean 'prompt_count'"
  ):
    pipeline.check('world', stage)


@pytest.mark.parametrize(
  'argument, part',
  [
    ('--config.no_such_key=1', "--config.no_such_key=1: the config has no key 'no_such_key'"),
    (
      '--config.ppo.batch_size=126',
      'stage ppo: config.rl.minibatches=4 does not divide config.batch_size=126: change either',
    ),
  ],
)
def test_a_command_that_cannot_run_ends_in_one_line(argument, part, tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'rlhf_jax.main',
      '--config=configs/quickstart.py',
      argument,
      f'--workdir={tmp_path}/run',
    ],
    cwd=ROOT,
    env=os.environ | {'XLA_FLAGS': ''},
    text=True,
    capture_output=True,
    timeout=300,
  )
  assert done.returncode == 1, done.stderr
  assert done.stderr.startswith(f'error: {part}') and done.stderr.count('\n') == 1, done.stderr
  assert not (tmp_path / 'run').exists()


def test_arguments_without_dashes_are_an_error():
  with pytest.raises(SystemExit, match=r"error: unexpected arguments \['debug'\].*begins with --"):
    main.main(['main', 'debug'])


# Files, lengths and sizes: before anything is compiled, and in folders with checkpoints.


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """Runs on one of the eight devices, which compiles faster."""
  devices = jax.devices()
  monkeypatch.setattr(jax, 'devices', lambda *_: devices[:1])
  monkeypatch.setattr(jax, 'device_count', lambda: 1)


def contents(folder):
  """Returns {path: hash} of all files below a folder."""
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def begun(config, folder):
  """Returns a run of 4 steps with checkpoints of steps 2 and 4, as if it had been stopped."""
  config.checkpoint_every = 2
  loop.run(config, folder)
  shutil.rmtree(folder / 'model')
  config.steps = 6
  return folder, config


@pytest.fixture(scope='module')
def begun_sft(world, tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    one_device.__wrapped__(patch)
    return begun(tiny.sft(world), tmp_path_factory.mktemp('sft'))


@pytest.fixture(scope='module')
def begun_ppo(world, tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    one_device.__wrapped__(patch)
    return begun(tiny.ppo(world), tmp_path_factory.mktemp('ppo'))


@pytest.fixture(scope='module')
def bad(world, tmp_path_factory):
  """Returns a folder of unusable files."""
  folder = tmp_path_factory.mktemp('bad')
  for name in ('empty.jsonl', 'blank.jsonl', 'empty.txt'):
    (folder / name).write_text('\n\n' if name.startswith('blank') else '')
  (folder / 'nothing').mkdir()
  tiny.write_jsonl(folder / 'wordless.jsonl', [{'prompt': '', 'completion': ''}])
  tiny.write_jsonl(
    folder / 'long.jsonl',
    [{'prompt': tiny.text(0, 2), 'number': 0}, {'prompt': tiny.text(5, 9), 'number': 1}],
  )
  tiny.write_tokenizer(folder / 'tokenizer', tiny.WORDS + 5)
  shutil.copytree(world / 'reward', folder / 'reward')
  tiny.write_tokenizer(folder / 'reward', tiny.WORDS + 5)
  return folder


BAD_FILES = {
  'no data file': (
    {'data.path': '{bad}/no.jsonl'},
    ['no.jsonl: no such file or directory', 'Set the path of the data'],
  ),
  'no held-out file': (
    {'data.held_out_path': '{bad}/no.jsonl'},
    ['no.jsonl: no such file or directory', 'Set the path of the data'],
  ),
  'no such data set': (
    {'data.path': 'no-such-data-set'},
    ['no-such-data-set', 'no such file or directory'],
  ),
  'no tokenizer': (
    {'tokenizer': '{bad}/no'},
    ['/no: no such folder', 'a folder with tokenizer.json'],
  ),
  'no model': (
    {'model.path': '{bad}/no', 'tokenizer': '{world}/tokenizer'},
    ['/no/config.json: no such file', 'a model folder holds config.json and'],
  ),
  'a model without weights': (
    {'model.path': '{bad}/tokenizer'},
    ['config.json: no such file', 'a model folder holds'],
  ),
  'empty file': (
    {'data.path': '{bad}/empty.jsonl'},
    ['empty.jsonl: the data set is empty', 'at least one record'],
  ),
  'blank lines': (
    {'data.path': '{bad}/blank.jsonl'},
    ['blank.jsonl: the data set is empty', 'at least one record'],
  ),
  'empty text': (
    {'data.path': '{bad}/empty.txt'},
    ['empty.txt: the data set is empty', 'at least one record'],
  ),
  'empty folder': (
    {'data.path': '{bad}/nothing'},
    ['nothing: no data file in this directory', 'files must end in .jsonl'],
  ),
  'too long for the context': (
    {'data.max_length': 33},
    ['config.data.max_length: 33 tokens exceed the model', 'context of 32', 'Lower it, or use'],
  ),
  'tokenizer larger than the embedding': (
    {'tokenizer': '{bad}/tokenizer'},
    [
      "has ids up to 68, but the model's vocab_size is 64",
      'Use the tokenizer that belongs to the model',
      'at least 69',
    ],
  ),
}
BAD_PROMPTS = {
  'no prompts': (
    {'data.path': '{bad}/no.jsonl'},
    ['no.jsonl: no such file or directory', 'Set the path of the data'],
  ),
  'empty prompts': (
    {'data.path': '{bad}/empty.jsonl'},
    ['empty.jsonl: the data set is empty', 'at least one record'],
  ),
  'a long prompt': (
    {'data.path': '{bad}/long.jsonl'},
    [
      'prompt 1 has 10 tokens, more than config.data.max_prompt_length=6',
      'Raise max_prompt_length',
      "config.data.on_long to 'truncate_left' or 'drop'",
    ],
  ),
  'long prompts alone': (
    {'data.path': '{bad}/long.jsonl', 'data.max_prompt_length': 2, 'data.on_long': 'drop'},
    ['none of 2 prompts has at most config.data.max_prompt_length=2', 'Raise it'],
  ),
  'prompt and response too long for the context': (
    {'data.max_prompt_length': 27},
    [
      'config.data.max_prompt_length + config.sampling.max_new_tokens: 33 tokens exceed the '
      "model's context of 32 tokens",
      'Lower it, or use',
    ],
  ),
  'pretraining rows too long for the context': (
    {
      'ptx.path': '{world}/texts.jsonl',
      'ptx.batch_size': 16,
      'ptx.max_length': 33,
      'rl.ptx_coef': 1.0,
    },
    ['config.ptx.max_length: 33 tokens exceed the model', 'context of 32', 'Lower it'],
  ),
  'tokenizer larger than the embedding': (
    {'tokenizer': '{bad}/tokenizer'},
    ["has ids up to 68, but the model's vocab_size is 64", "set the model's vocab_size"],
  ),
  "a reward model's tokenizer larger than its embedding": (
    {'reward.function': None, 'reward.model': '{bad}/reward'},
    ['/reward has ids up to 68', 'Use the tokenizer that belongs to the model'],
  ),
  'no reward module': (
    {'reward.function': 'no_such_module:reward'},
    [
      "config.reward.function='no_such_module:reward' cannot be loaded",
      "Write 'package.module:function'",
    ],
  ),
  'no reward function': (
    {'reward.function': 'tiny:no_such_function'},
    ['no_such_function', "Write 'package.module:function'"],
  ),
  'a reward function without a name': (
    {'reward.function': 'tiny'},
    ["'tiny' cannot be loaded", "Write 'package.module:function'"],
  ),
  'no reward model': (
    {'reward.function': None, 'reward.model': '{bad}/no'},
    ['/no/config.json: no such file', 'a model folder holds'],
  ),
  'a language model for a reward': (
    {'reward.function': None, 'reward.model': '{world}/model'},
    ['it is not a reward model', 'ForSequenceClassification'],
  ),
  'a reward model for a policy': (
    {'model.path': '{world}/reward'},
    ['it is a reward model, not a language model'],
  ),
}


def fails(config, changes, parts, folder, **places):
  """Forks a run with a changed config; checks the message, and that no file changes.

  A config with other weights, which a fork must not have, starts a new run.
  """
  config = config.copy_and_resolve_references()
  for key, value in changes.items():
    *blocks, name = key.split('.')
    block = functools.reduce(lambda block, part: block[part], blocks, config)
    block[name] = value.format(**places) if isinstance(value, str) else value
  before = contents(folder)
  assert {part.split('/')[1] for part in before if part.startswith('checkpoints')} >= {'2', '4'}
  fork = folder.with_name(f'{folder.name}_fork')
  shutil.rmtree(fork, ignore_errors=True)
  with pytest.raises(errors.UserError) as caught:
    loop.run(
      config,
      fork,
      fork_of=None if any(key.startswith(workdir_lib.WEIGHT_KEYS) for key in changes) else folder,
    )
  for part in parts:
    assert part in str(caught.value), caught.value
  assert contents(folder) == before
  assert not (fork / 'config.json').exists()
  return config


@pytest.mark.parametrize('name', BAD_FILES)
def test_bad_files_are_found_before_compilation(name, begun_sft, world, bad, compiled):
  folder, config = begun_sft
  count = len(compiled)
  fails(config, *BAD_FILES[name], folder, world=world, bad=bad)
  assert compiled[count:] == []


@pytest.mark.parametrize('name', BAD_PROMPTS)
def test_bad_prompts_are_found_before_compilation(name, begun_ppo, world, bad, compiled):
  folder, config = begun_ppo
  count = len(compiled)
  fails(config, *BAD_PROMPTS[name], folder, world=world, bad=bad)
  assert not {'jit(generate)', 'jit(train_step)'} & set(compiled[count:])


def test_a_text_data_set_of_nothing_has_no_token(begun_sft, world, bad):
  folder, config = begun_sft
  fails(
    config,
    {'data.path': '{bad}/wordless.jsonl', 'data.kind': 'completion'},
    ['wordless.jsonl', 'completion'],
    folder,
    world=world,
    bad=bad,
  )


@pytest.mark.parametrize(
  'begin, changes, part',
  [
    ('begun_sft', {'batch_size': 0}, 'must be positive'),
    ('begun_sft', {'microbatch_size': 5}, 'does not divide'),
    ('begun_ppo', {'rl.minibatches': 3}, 'does not divide'),
    ('begun_ppo', {'sampling.temperature': 0.0}, 'with greedy decoding'),
  ],
)
def test_contradictions_are_found_before_anything_is_read(
  begin, changes, part, request, monkeypatch
):
  folder, config = request.getfixturevalue(begin)
  for module in (ppo, sft):
    monkeypatch.setattr(module, 'create', lambda *_: pytest.fail('was created'))
  fails(config, changes, [part], folder)


def test_another_model_leaves_the_checkpoints_of_the_first(begun_sft, tmp_path):
  folder, config = begun_sft
  tiny.write_model(tmp_path / 'model', tiny.LLAMA | {'num_hidden_layers': 1})
  other = config.copy_and_resolve_references()
  other.model.path = f'{tmp_path}/model'
  before = contents(folder)
  for workdir, source, part in (
    (folder, None, 'was started with another config: config.model.path: '),
    (tmp_path / 'new', folder, 'which belong to another model: config.model.path: '),
  ):
    with pytest.raises(errors.UserError, match=part):
      loop.run(other, workdir, fork_of=source)
  assert contents(folder) == before and not (tmp_path / 'new').exists()


# Rewards and losses: after compilation, when they come up.


def rewards_of(case):
  """Returns a reward function that is wrong in the way of the case."""

  def reward(prompts, responses, *, response_tokens, metadata):
    del prompts, metadata
    if case == 'raises':
      raise RuntimeError('the server is away')
    good = [0.5] * len(responses)
    return {
      'is short': good[:-1],
      'is NaN': [float('nan')] + good[1:],
      'is infinite': good[1:] + [float('inf')],
      'is None': None,
      'is ragged': [[0.0] * (len(row) + 1) for row in response_tokens],
      'is mixed': [[0.0] * len(row) for row in response_tokens[:-1]] + [0.5],
    }[case]

  return reward


BAD_REWARDS = {
  'raises': ['reward raised RuntimeError: the server is away', 'the same command resumes'],
  'is short': ['returned 3 rewards for 4 responses', 'it must return one for each'],
  'is NaN': ['returned nan for example 0', 'every reward must be finite'],
  'is infinite': ['returned inf for example 3', 'every reward must be finite'],
  'is None': ['reward returned None for 4 responses', 'it must return one for each'],
  'is ragged': [
    'returned [0.0, 0.0, 0.0] for example 0',
    'of shape (2,)',
    'one number per token (here 2 tokens)',
  ],
  'is mixed': ['returned 0.5 for example 3', 'of shape (2,)', 'or for all examples'],
}


@pytest.mark.parametrize('case', BAD_REWARDS)
def test_bad_rewards(case):
  with pytest.raises(errors.UserError) as caught:
    functions.call(
      rewards_of(case),
      ['a'] * 4,
      ['b'] * 4,
      response_tokens=[[1, 2]] * 4,
      metadata=[{}] * 4,
      response_length=3,
    )
  for part in BAD_REWARDS[case]:
    assert part in str(caught.value), caught.value


@pytest.mark.parametrize(
  'case, parts',
  [
    (
      'raises',
      [
        'RuntimeError: the server is away',
        'with 16 prompts, the first',
        'the same command resumes.',
      ],
    ),
    ('is NaN', ['returned nan for example 0, prompt', 'every reward must be finite']),
    ('is short', ['returned 15 rewards for 16 responses', 'must return one for each']),
  ],
)
def test_bad_rewards_stop_a_run_that_can_go_on(case, parts, begun_ppo, tmp_path, monkeypatch):
  folder, config = begun_ppo
  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  before = contents(tmp_path / 'checkpoints')
  with monkeypatch.context() as patch:
    patch.setattr(tiny, 'good_words', rewards_of(case))
    with pytest.raises(errors.UserError) as caught:
      loop.run(config, tmp_path)
  for part in parts:
    assert part in str(caught.value), caught.value
  assert contents(tmp_path / 'checkpoints') == before
  assert not (tmp_path / 'model').exists()
  if case == 'raises':  # once it is fixed, the same command resumes
    loop.run(config, tmp_path)
    assert {record['step'] for record in metrics_lib.read(tmp_path)} == set(range(6))


def test_a_loss_that_is_not_finite_stops_the_run_before_its_checkpoint(begun_sft, tmp_path):
  folder, config = begun_sft
  wild = config.copy_and_resolve_references()
  wild.optim.learning_rate, wild.checkpoint_every = 1e30, 1
  with pytest.raises(errors.UserError) as caught:
    loop.run(wild, tmp_path / 'wild', fork_of=folder)
  message = str(caught.value)
  assert 'is not finite at step 4' in message and 'param_norm' in message
  assert 'Lower config.optim.learning_rate' in message and 'clip_norm' in message
  assert (
    f'{tmp_path}/wild/checkpoints' in message and '--fork=NEWDIR starts from the last' in message
  )
  assert [path.name for path in (tmp_path / 'wild' / 'checkpoints').iterdir()] == ['4']
  assert not (tmp_path / 'wild' / 'model').exists()
  mended = config.copy_and_resolve_references()
  mended.optim.clip_norm = 1.0
  loop.run(mended, tmp_path / 'mended', fork_of=tmp_path / 'wild')  # as the message advises
  assert all(
    np.isfinite(record['loss'])
    for record in metrics_lib.read(tmp_path / 'mended')
    if 'loss' in record
  )


def test_nan_in_the_weights_is_named_at_the_first_step(world, tmp_path, monkeypatch):
  create = sft.create

  def poisoned(config, mesh):
    learner, state = create(config, mesh)
    return learner, state.replace(
      params=jax.tree.map(lambda x: x * np.float32('nan'), state.params)
    )

  monkeypatch.setattr(sft, 'create', poisoned)
  with pytest.raises(errors.UserError, match='loss.*is not finite at step 0. Lower config'):
    loop.run(tiny.sft(world), tmp_path)
  assert not (tmp_path / 'model').exists()


def test_a_config_is_validated_before_anything_is_created(monkeypatch, world, tmp_path):
  order = []
  monkeypatch.setattr(config_lib, 'validate', lambda *_: order.append('validate'))

  def create(*_):
    order.append('create')
    raise errors.UserError('enough')

  monkeypatch.setattr(sft, 'create', create)
  with pytest.raises(errors.UserError, match='enough'):
    loop.run(tiny.sft(world), tmp_path)
  assert order == ['validate', 'create']
