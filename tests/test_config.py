"""Arguments of configs, and all contradictions, which are found before anything is compiled."""

import functools
import importlib.util
import math
import pathlib
import sys

import ml_collections
import pytest

from rlhf_jax import config as config_lib
from rlhf_jax import config_files
from rlhf_jax import config_keys
from rlhf_jax import errors
from rlhf_jax import pipeline
from rlhf_jax.algorithms import build
from rlhf_jax.algorithms import effects
from rlhf_jax.algorithms import ppo

CONFIGS = sorted((pathlib.Path(__file__).resolve().parents[1] / 'configs').glob('[a-z]*.py'))
# Base configs, with what a user must give on the command line, and more.
BASES = build.names()
GIVEN = {
  'model.path': 'model',
  'data.path': 'data.jsonl',
  'reward.model': 'reward',
  'distillation.teacher': 'teacher',
  'ptx.path': 'texts.jsonl',
}
# Required arguments after the colon of other configs.
ARGUMENTS = {
  'gsm8k': 'data=problems,model=model',
  'hh_reward': 'data=pairs',
  'sentiment': 'data=reviews',
  'stories': 'model=model',
  'lm_human_preferences': 'data=texts,model=model,labels=labels',
}

# Packages that a config needs and that the tests do not ask for.
PACKAGES = {'puzzles': 'reasoning_gym'}

ALGORITHMS = ('sft', 'reward_model', 'ppo')


# The string after the colon.


def test_arguments_have_the_type_of_their_defaults():
  parsed = config_lib.parse_arg(
    'debug,rate=1,name=7,count=-3', debug=False, rate=0.5, name='', count=1, left=2
  )
  assert parsed.to_dict() == {'debug': True, 'rate': 1.0, 'name': '7', 'count': -3, 'left': 2}
  assert isinstance(parsed.rate, float)
  assert config_lib.parse_arg('debug=False', debug=True).debug is False
  assert config_lib.parse_arg('path=a=b', path='').path == 'a=b'
  for empty in (None, ''):
    assert config_lib.parse_arg(empty, seed=3).to_dict() == {'seed': 3}


@pytest.mark.parametrize(
  'arg, message',
  [
    ('debgu', "config argument 'debgu' is unknown; this config takes: debug, seed"),
    ('debug,sede=1', "config argument 'sede' is unknown; this config takes: debug, seed"),
    ('seed=one', "config argument seed='one' must be of type int"),
    ('seed=1.5', "config argument seed='1.5' must be of type int"),
    ('seed', "config argument seed='' must be of type int"),
    ('seed=True', "config argument seed='True' must be of type int"),
    ('debug=1', "config argument debug='1' must be of type bool"),
  ],
)
def test_bad_arguments(arg, message):
  with pytest.raises(errors.UserError) as caught:
    config_lib.parse_arg(arg, debug=False, seed=0)
  assert str(caught.value) == message


def test_unknown_preset():
  with pytest.raises(errors.UserError, match="unknown preset 'ppo2' of ppo: one of openai2019, "):
    ppo.config('ppo2')


# Every config of the project.


def imported(path):
  spec = importlib.util.spec_from_file_location(f'a_config_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  with config_files.importable(str(path.parent)):
    spec.loader.exec_module(module)
  return module


def complete(config, path):
  """Sets the keys of a base config that its docstring asks for."""
  if path.stem == 'best_of_n':
    config.sample.update({'policy': 'model', 'prompts': 'data.jsonl'})
    config.sample.reward.model = 'reward'
  if path.stem not in BASES:
    return
  for key, value in GIVEN.items():
    block = key.partition('.')[0]
    if block in config and (block != 'ptx' or config.rl.ptx_coef):
      config.update_from_flattened_dict({key: value})
  if config.get('ptx') and config.rl.ptx_coef:
    config.ptx.batch_size = config.batch_size


def valid(config, devices):
  """Asserts that a run's config is valid and has no key without effect."""
  build.validate(config, devices)
  assert effects.warnings(config, build.load(config.algorithm).config()) == []


def check_stages(config, folder):
  """Asserts that every stage of a config is valid when it is resolved."""
  names = pipeline.stage_names(config)
  assert len(set(names)) == len(names) >= 1
  for name in names:
    stage = pipeline.resolve(config[name], folder, config.seed)
    assert stage.get('seed', 0) >= 0  # the pipeline's or its own
    assert '$' not in str(stage.to_dict())
    if 'algorithm' in stage:
      valid(stage, 1)
    else:
      pipeline.check(name, stage)


def test_no_config_hides_a_module():
  """The folder of a config is on the path while the config is read."""
  names = {path.stem for path in CONFIGS}
  assert not names & {*sys.stdlib_module_names, *PACKAGES.values()}
  specs = map(importlib.util.find_spec, sorted(names))  # a config that another one imported has one
  assert not [spec.name for spec in specs if spec and pathlib.Path(spec.origin) not in CONFIGS]


@pytest.mark.parametrize('arg', [None, 'debug', 'debug,seed=3'])
@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_configs_build_and_every_stage_is_valid(path, arg, tmp_path):
  if path.stem in PACKAGES:
    pytest.importorskip(PACKAGES[path.stem])
  module = imported(path)
  config = module.get_config(','.join(filter(None, (arg, ARGUMENTS.get(path.stem)))))
  assert config.seed == (3 if arg and 'seed' in arg else 0)
  complete(config, path)
  if 'stages' in config:
    check_stages(config, tmp_path)
  else:  # a single run, on the least number of devices that its mesh needs
    valid(config, math.prod(max(size, 1) for size in dict(config.mesh).values()))
  with pytest.raises(errors.UserError, match='this config takes: debug, seed'):
    module.get_config('no_such_argument=1')


@pytest.mark.parametrize('name', BASES)
def test_base_configs_ask_for_model_data_and_reward(name):
  path = CONFIGS[0].with_name(f'{name}.py')
  config = imported(path).get_config()
  optional = {'ptx.path'} | ({'reward.model'} if name == 'ilql' else set())  # data may have rewards
  for key in (key for key in GIVEN if key.partition('.')[0] in config and key not in optional):
    complete(config, path)
    config.update_from_flattened_dict({key: None})
    with pytest.raises(errors.UserError, match=key):
      build.validate(config, 1)


@pytest.mark.parametrize(
  'name, preset',
  [(name, preset) for name in BASES for preset in getattr(build.load(name), 'PRESETS', ())],
)
def test_base_configs_take_every_preset(name, preset):
  path = CONFIGS[0].with_name(f'{name}.py')
  config = imported(path).get_config(f'preset={preset}')
  complete(config, path)
  valid(config, 1)
  expected = dict(build.load(name).PRESETS[preset])
  fresh = build.load(name).config(preset)
  complete(fresh, path)
  for block in {'rl', 'distillation', 'dpo', 'ilql'} & {*config}:
    assert dict(config[block]) == dict(fresh[block])
  keys = ('optim.learning_rate', 'sampling.temperature', 'batch_size')
  for key in (key for key in keys if key.partition('.')[0] in config):
    value = functools.reduce(lambda block, part: block[part], key.split('.'), config)
    assert value == expected.get(key, value)  # the preset's values are not overwritten


LM_HUMAN_PREFERENCES = CONFIGS[0].with_name('lm_human_preferences.py')


@pytest.mark.parametrize(
  'arg',
  [
    *(
      f'task={task},data=d,model=m,labels=l'
      for task in ('sentiment', 'descriptiveness', 'tldr', 'cnndm')
    ),
    'small,data=d',
    'small,debug,data=d',
  ],
)
def test_tasks_of_lm_human_preferences(arg, tmp_path):
  config = imported(LM_HUMAN_PREFERENCES).get_config(arg)
  check_stages(config, tmp_path)
  # In PPO the reward model reads texts without an EOS, as in its training.
  assert config.ppo.sampling.truncate_at and not config.reward_model.preference.append_eos


def test_constants_of_lm_human_preferences():
  # launch.py of https://github.com/openai/lm-human-preferences.
  get = imported(LM_HUMAN_PREFERENCES).get_config
  books = get('data=d,model=m,labels=l')
  assert (books.queries.length, books.queries.start_text, books.queries.end_text) == (64, '.', '.')
  assert books.ppo.sampling.max_new_tokens == 24 and books.ppo.sampling.truncate_after == 16
  assert books.ppo.sampling.temperature == 0.7 and books.ppo.optim.learning_rate == 1e-5
  assert (books.ppo.rl.kl_coef, books.ppo.rl.kl_controller) == (0.15, 'adaptive')
  assert books.ppo.rl.kl_target == 6.0 and books.ppo.rl.whiten_rewards
  assert books.ppo.rl.missing_eos_value == -1.0 and books.ppo.critic.kind == 'trunk'
  assert books.ppo.batch_size * books.ppo.steps == pytest.approx(1e6, rel=1e-3)
  assert books.reward_model.optim.learning_rate == 5e-5 and books.reward_model.batch_size == 32
  tldr = get('task=tldr,data=d,model=m,labels=l')
  assert tldr.queries.suffix == '\n\nTL;DR:' and tldr.queries.end_text is None
  assert (tldr.queries.length, tldr.ppo.sampling.max_new_tokens) == (500, 75)
  assert (tldr.ppo.sampling.truncate_at, tldr.ppo.sampling.truncate_after) == ('\n', 55)
  assert (tldr.ppo.rl.kl_coef, tldr.ppo.rl.kl_controller) == (0.03, 'fixed')
  assert not tldr.ppo.rl.whiten_rewards
  cnndm = get('task=cnndm,data=d,model=m,labels=l')
  assert (cnndm.ppo.rl.kl_coef, cnndm.ppo.sampling.temperature) == (0.01, 0.5)
  assert (cnndm.queries.prefix, cnndm.queries.end_text) == ('Article:\n\n', '\n')


@pytest.mark.parametrize(
  'arg, message',
  [
    ('task=books', "task='books' must be one of sentiment, descriptiveness, tldr, cnndm"),
    ('task=tldr,small', 'small works with task=sentiment only'),
    ('small', 'needs the argument data, the folder of rt-polarity'),
    ('data=d', 'needs the argument model'),
    ('data=d,model=m', 'needs the argument labels'),
  ],
)
def test_wrong_arguments_of_lm_human_preferences(arg, message):
  with pytest.raises(errors.UserError, match=message):
    imported(LM_HUMAN_PREFERENCES).get_config(arg)


@pytest.mark.parametrize('name', ARGUMENTS)
def test_folders_must_be_given(name):
  with pytest.raises(errors.UserError, match='this config needs the argument'):
    imported(CONFIGS[0].with_name(f'{name}.py')).get_config('debug')


# Contradictions.


def changed(config, changes):
  """Returns a config with some dotted keys set, including new ones."""
  with config.unlocked(), config.ignore_type():
    for key, value in changes.items():
      *blocks, name = key.split('.')
      block = functools.reduce(lambda block, part: block[part], blocks, config)
      block[name] = ml_collections.ConfigDict(value) if isinstance(value, dict) else value
  return config


def good(algorithm):
  """Returns the smallest valid config."""
  config = build.load(algorithm).config()
  config.data.path, config.model.path, config.steps = 'data.jsonl', 'model', 10
  if 'reward' in config:
    config.reward.function = 'tiny:good_words'
  return config


@pytest.mark.parametrize('algorithm', ALGORITHMS)
@pytest.mark.parametrize('devices', [1, 8])
def test_defaults_are_valid(algorithm, devices):
  valid(good(algorithm), devices)


@pytest.mark.parametrize('preset', ppo.PRESETS)
def test_presets_are_valid(preset):
  config = ppo.config(preset)
  config.update(data={'path': 'p'}, model={'path': 'm'}, reward={'model': 'r'}, steps=100)
  if config.rl.ptx_coef:
    config.ptx.path = 'p'
  valid(config, 8)


BAD = [
  (
    {'algorithm': 'dpq'},
    "config.algorithm='dpq' cannot be loaded (No module named 'dpq'): name a module",
  ),
  ({'algorithm': 'json'}, "config.algorithm='json' is a module without config, validate, create"),
  (
    {'steps': None},
    'set exactly one of config.steps (now None) and config.data.epochs (now None), to a',
  ),
  (
    {'data.epochs': 1.0},
    'set exactly one of config.steps (now 10) and config.data.epochs (now 1.0)',
  ),
  (
    {'steps': 0},
    'set exactly one of config.steps (now 0) and config.data.epochs (now None), to a positive',
  ),
  ({'steps': -5}, 'set exactly one of config.steps (now -5) and config.data.epochs (now None)'),
  ({'batch_size': 0}, 'config.batch_size=0 must be positive'),
  ({'batch_size': True}, 'config.batch_size=True must be a whole number'),
  ({'batch_size': None}, 'config.batch_size=None must be a whole number'),
  ({'steps': True}, 'config.steps=True must be a whole number, or None'),
  ({'seed': -1}, 'config.seed=-1 must be 0 or positive'),
  (
    {'optim': {'learning_rat': 1.0}},
    "config.optim has no key 'learning_rat'. Did you mean 'learning_rate'?",
  ),
  (
    {'optim': {'name': 'adam'}},
    "config.optim lacks the key 'b1': take the config from the config() of its",
  ),
  (
    {'mesh': {'data': -1, 'fsdp': 1, 'tensor': 1, 'model': 2}},
    "config.mesh has no key 'model'. The keys are data",
  ),
  ({'optim.learning_rate': math.inf}, 'config.optim.learning_rate=inf must be a finite number'),
  ({'data.epochs': math.nan}, 'config.data.epochs=nan must be a finite number, or None'),
  (
    {'model.init': {'rope_theta': math.nan}},
    'config.model.init.rope_theta=nan must be a finite number',
  ),
  (
    {'model.lora.targets': (('up', 1, math.inf),)},
    'config.model.lora.targets=inf must be a finite number',
  ),
  ({'optim.b1': 1.0}, 'config.optim.b1=1.0 must be in [0, 1)'),
  ({'optim.eps': 0.0}, 'config.optim.eps=0.0 must be positive'),
  ({'model.remat': 'all'}, "config.model.remat='all' must be one of none, block, dots"),
  ({'model.unroll': 0}, 'config.model.unroll=0 must be positive, or None'),
  ({'optim.name': 'sgd'}, "config.optim.name='sgd' must be one of adam, tf_adam"),
  ({'optim.schedule': 'step'}, "config.optim.schedule='step' must be one of constant, "),
  ({'optim.learning_rate': -1.0}, 'config.optim.learning_rate=-1.0 must be 0 or positive'),
  ({'optim.learning_rate': float('nan')}, 'config.optim.learning_rate=nan must be'),
  ({'optim.warmup_steps': -1}, 'config.optim.warmup_steps=-1 must be 0 or positive'),
  ({'optim.warmup_from': 1.5}, 'config.optim.warmup_from=1.5 must be in [0, 1]'),
  ({'optim.weight_decay': -0.1}, 'config.optim.weight_decay=-0.1 must be 0 or positive'),
  ({'optim.clip_norm': -1.0}, 'config.optim.clip_norm=-1.0 must be positive, or None'),
  ({'data.on_error': 'ignore'}, "config.data.on_error='ignore' must be one of stop, skip"),
  ({'data.kind': 'prompt'}, "config.data.kind='prompt' must be one of text, completion"),
  (
    {'data.path': None},
    'config.data.path is empty: name a file, a folder, a hub data set, tfds:NAME or',
  ),
  (
    {'data.columns': 'prompt'},
    "config.data.columns='prompt' must have the form 'new=stored,new=stored'",
  ),
  ({'data.columns': 'prompt=a,prompt=b'}, 'with different new names'),
  ({'data.format': 'xlsx'}, "config.data.format='xlsx' must be one of jsonl, json, csv"),
  ({'data.max_length': 0}, 'config.data.max_length=0 must be positive'),
  ({'data.held_out': 1.0}, 'config.data.held_out=1.0 must be in (0, 1), or None'),
  (
    {'data.held_out': 0.1, 'data.held_out_path': 'x'},
    "config.data.held_out=0.1 and config.data.held_out_path='x': set at most one",
  ),
  ({'model.path': None}, 'config.model.path and config.model.init are both empty: name a'),
  (
    {'model.path': None, 'model.init': {'family': 'llama'}},
    'config.tokenizer is None and there is no config.model.path to take it from',
  ),
  ({'model.dtype': 'float16'}, "config.model.dtype='float16' must be one of float32, bfloat16"),
  ({'model.param_dtype': 'int8'}, "config.model.param_dtype='int8' must be one of"),
  (
    {'model.unfrozen_layers': -2},
    'config.model.unfrozen_layers=-2 must be 0 or more, or None for all',
  ),
  ({'model.lora.targets': (('up(', 1, 1.0),)}, "config.model.lora.targets: 'up(' is not a regular"),
  ({'model.lora.targets': (('up', 0, 1.0),)}, "targets has ('up', 0, 1.0): each must be (regex"),
  ({'model.lora.targets': ('up',)}, "config.model.lora.targets has 'up': each must be (regex"),
  (
    {'model.lora.targets': (('up', 1, 1.0),), 'model.lora.path': 'adapter'},
    "config.model.lora.path='adapter' has its own targets",
  ),
  ({'optim.ema': 1.0}, 'config.optim.ema=1.0 must be in (0, 1), or None'),
  ({'optim.master_dtype': 'float16'}, "config.optim.master_dtype='float16' must be one of"),
  ({'keep_checkpoints': 0}, 'config.keep_checkpoints=0 must be positive'),
  ({'checkpoint_every': -1}, 'config.checkpoint_every=-1 must be positive, or None'),
  ({'log_every': 0}, 'config.log_every=0 must be positive'),
  ({'microbatch_size': 5}, 'config.microbatch_size=5 does not divide config.batch_size=32: '),
  ({'microbatch_size': -1}, 'config.microbatch_size=-1 must be positive, or None'),
  ({'batch_size': 12}, 'config.batch_size=12 does not divide over the 8 data shards of'),
  ({'mesh.data': 3}, 'does not fit 8 devices'),
  ({'mesh.data': 4}, 'does not fit 8 devices'),
  ({'mesh.fsdp': -1}, 'only one axis can be -1'),
  ({'mesh.tensor': 0}, 'config.mesh.tensor=0 must be positive, or -1'),
]
BAD_REWARD_MODEL = [
  ({'data.kind': 'text'}, "config.data.kind='text' must be one of comparison"),
  (
    {'evals': {'text': {'path': 'p'}}},
    "config.evals.text.kind='text' needs an algorithm that trains a policy",
  ),
  (
    {'preference.loss': 'hinge'},
    "config.preference.loss='hinge' must be one of pairwise, pick_best",
  ),
  (
    {'preference.normalize': 'all'},
    "config.preference.normalize='all' must be one of none, gain_bias",
  ),
  ({'preference.token_dropout': 1.0}, 'config.preference.token_dropout=1.0 must be in [0, 1)'),
  (
    {'preference.label_smoothing': -0.1},
    'config.preference.label_smoothing=-0.1 must be in [0, 1)',
  ),
  ({'preference.centering': -1.0}, 'config.preference.centering=-1.0 must be 0 or positive'),
  ({'microbatch_size': 3}, 'config.microbatch_size=3 does not divide config.batch_size=32'),
]
PARTS = {'reward.function': None}
PROMPTS = {'path': 'p', 'reward': {'function': 'tiny:good_words'}}
BAD_EVALS = [
  (
    {'held_out': {'kind': 'loss', 'every': 0}},
    'config.evals.held_out.every=0 must be positive, or None',
  ),
  (
    {'x': {'every': 1}},
    "config.evals.x.kind='x' must be one of loss, prompts, win_rate, text; or set",
  ),
  (
    {'x': {'kind': 'bleu'}},
    "config.evals.x.kind='bleu' must be one of loss, prompts, win_rate, text; or",
  ),
  (
    {'text': {'evry': 1}},
    "config.evals.text has no key 'evry' for kind='text': its keys are kind, every, path",
  ),
  (
    {'mine': {'function': 'tiny:good_words', 'path': 'p'}},
    "config.evals.mine has no key 'path' for kind='function'",
  ),
  (
    {'mine': {'function': 'tiny:nothing'}},
    "config.evals.mine.function='tiny:nothing' cannot be loaded (module",
  ),
  (
    {'mine': {'function': 'tiny:good_words'}},
    "config.evals.mine.function='tiny:good_words' takes (prompts, responses",
  ),
  (
    {'held_out': {'kind': 'loss', 'every': True}},
    'config.evals.held_out.every=True must be a whole number, or None',
  ),
  (
    {'text': {'path': 'p', 'every': 1.5}},
    'config.evals.text.every=1.5 must be a whole number, or None',
  ),
  (
    {'text': {'path': 'p', 'sampling': {'temperature': math.nan}}},
    'config.evals.text.sampling.temperature=nan must be a finite number',
  ),
  (
    {'prompts': {'path': 'p', 'reward': {'modle': 'm'}}},
    "config.evals.prompts.reward has no key 'modle'. Did you mean 'model'?",
  ),
  ({'text': {}}, 'config.evals.text.path is empty: name a data set of prompts'),
  (
    {'prompts': {'path': 'p'}},
    'set exactly one of config.evals.prompts.reward.model, config.evals.prompts.reward.models',
  ),
  ({'win_rate': PROMPTS | {'count': 0}}, 'config.evals.win_rate.count=0 must be positive, or None'),
  (
    {'win_rate': PROMPTS | {'batch_size': -1}},
    'config.evals.win_rate.batch_size=-1 must be positive',
  ),
  (
    {'text': {'path': 'p', 'sampling': {'top': 1}}},
    "config.evals.text.sampling has ['top']: its keys are",
  ),
  (
    {'text': {'path': 'p', 'sampling': {'max_new_tokens': 0}}},
    'config.evals.text.sampling.max_new_tokens=0 must be positive',
  ),
  (
    {'text': {'path': 'p', 'sampling': {'temperature': -1.0}}},
    'config.evals.text.sampling.temperature=-1.0 must be 0 or positive',
  ),
]
PTX = {'rl.ptx_coef': 1.0, 'ptx.batch_size': 8, 'ptx.path': 'p'}
BAD_ON_POLICY = [
  ({'rl.kl_coef': -0.1}, 'config.rl.kl_coef=-0.1 must be 0 or positive'),
  ({'rl.kl_coef': math.nan}, 'config.rl.kl_coef=nan must be a finite number'),
  ({'rl.missing_eos_value': -math.inf}, 'config.rl.missing_eos_value=-inf must be a finite number'),
  ({'rl.epochs': True}, 'config.rl.epochs=True must be a whole number'),
  ({'data.held_out_path': 'x'}, "config.data has no key 'held_out_path'"),
  ({'ptx.chat_template': 'hh'}, "config.ptx has no key 'chat_template'"),
  (
    {'evals': {'x': {'kind': 'loss'}}},
    "config.evals.x.kind='loss' needs an algorithm with a held-out loss",
  ),
  ({'rl.clip_low': 2.0}, 'config.rl.clip_low=2.0 must be in [0, 1]'),
  ({'rl.dual_clip': 0.5}, 'config.rl.dual_clip=0.5 must be above 1, or None'),
  ({'rl.clip_scores': -1.0}, 'config.rl.clip_scores=-1.0 must be positive, or None'),
  ({'rl.kl_estimator': 'k4'}, "config.rl.kl_estimator='k4' must be one of k1, "),
  ({'rl.kl_in': 'both'}, "config.rl.kl_in='both' must be one of reward, loss"),
  ({'rl.response': 'cut'}, "config.rl.response='cut' must be one of truncated, raw"),
  ({'rl.missing_eos': 'add'}, "config.rl.missing_eos='add' must be one of"),
  ({'rl.behaviour': 'old'}, "config.rl.behaviour='old' must be one of forward, minibatch, sampler"),
  (
    {'reference': 'x', 'model.unfrozen_layers': 1},
    "config.reference='x': with config.model.unfrozen_layers=1",
  ),
  ({'data.on_long': 'cut'}, "config.data.on_long='cut' must be one of error, truncate_left"),
  ({'rl.epochs': 0}, 'config.rl.epochs=0 must be positive'),
  ({'rl.minibatches': 0}, 'config.rl.minibatches=0 must be positive'),
  ({'rl.length_buckets': 0}, 'config.rl.length_buckets=0 must be positive'),
  ({'rl.minibatches': 3}, 'config.rl.minibatches=3 does not divide config.batch_size=64'),
  (
    {'rl.minibatches': 4, 'microbatch_size': 32},
    'config.microbatch_size=32 does not divide config.batch_size / config.rl.minibatches=16',
  ),
  (
    {'reward.function': None},
    'set exactly one of config.reward.model, config.reward.models, config.reward.function, '
    'config.reward.url and config.reward.parts (now none)',
  ),
  ({'reward.model': 'x'}, 'config.reward.parts (now model, function)'),
  ({'reward.models': ('x', 'y')}, 'config.reward.parts (now models, function)'),
  ({'reward.parts': {'a': {'model': 'x'}}}, 'config.reward.parts (now function, parts)'),
  (
    {'reward.function': None, 'reward.models': ('x',)},
    "config.reward.models=('x',) must name two or more folders, such as ('a', 'b')",
  ),
  ({'reward.ensemble': 'max'}, "config.reward.ensemble='max' must be one of mean, min, variance"),
  ({'reward.ensemble_coef': -1.0}, 'config.reward.ensemble_coef=-1.0 must be 0 or positive'),
  ({'reward.max_length': 0}, 'config.reward.max_length=0 must be positive, or None'),
  (
    {'reward.function': None, 'reward.model': 'x', 'reward.arguments': {'n': 1}},
    'config.reward.arguments needs config.reward.function',
  ),
  (
    {'evals': {'text': {'path': 'x', 'metrics': {'a': {'functoin': 'x:y'}}}}},
    "config.evals.text.metrics.a has no key 'functoin'. Did you mean 'function'?",
  ),
  (
    {'evals': {'text': {'path': 'x', 'metrics': {'a': {}}}}},
    'config.evals.text.metrics.a.function is empty',
  ),
  (PARTS | {'reward.parts': {'a': 'x'}}, "config.reward.parts.a='x' must be a dict, such as"),
  (
    PARTS | {'reward.parts': {'a': {'weight': 1.0}}},
    'set exactly one of config.reward.parts.a.model, config.reward.parts.a.models, '
    'config.reward.parts.a.function and config.reward.parts.a.url (now none)',
  ),
  (
    PARTS | {'reward.parts': {'a': {'modle': 'x'}}},
    "config.reward.parts.a has no key 'modle'. Did you mean 'model'?",
  ),
  (
    PARTS | {'reward.parts': {'a': {'model': 'x', 'weight': math.nan}}},
    'config.reward.parts.a.weight=nan must be a finite number',
  ),
  (
    PARTS | {'reward.parts': {'a': {'models': ('x', 'y'), 'ensemble': 'max'}}},
    "config.reward.parts.a.ensemble='max' must be one of",
  ),
  ({'sampling.temperature': 0.0}, 'config.sampling.temperature=0.0 must be positive: with greedy'),
  ({'sampling.max_new_tokens': 0}, 'config.sampling.max_new_tokens=0 must be positive'),
  ({'sampling.samples': 3}, 'config.sampling.samples=3 does not divide config.batch_size=64'),
  (
    {'sampling.samples': 16},
    'config.batch_size / config.sampling.samples=4 does not divide over the 8 data',
  ),
  ({'sampling.top_k': -1}, 'config.sampling.top_k=-1 must be positive, or None'),
  ({'sampling.top_p': 0.0}, 'config.sampling.top_p=0.0 must be in (0, 1]'),
  ({'sampling.max_concurrent': -1}, 'config.sampling.max_concurrent=-1 must be positive, or None'),
  (
    {'sampling.max_concurrent': 64, 'mesh.data': 1, 'mesh.tensor': 8},
    'config.sampling.max_concurrent=64 must be less than config.batch_size=64, or None',
  ),
  (
    {'sampling.max_concurrent': 12},
    'config.sampling.max_concurrent=12 does not divide over the 8 data shards of config.mesh=',
  ),
  (
    {'rl.kl_estimator': 'full', 'rl.kl_in': 'loss'},
    "config.rl.kl_estimator='full' works with config.rl.kl_in='reward' only",
  ),
  ({'rl.ptx_coef': 1.0}, 'config.rl.ptx_coef=1.0 and config.ptx.batch_size=None: set both'),
  ({'ptx.batch_size': 8}, 'config.rl.ptx_coef=0.0 and config.ptx.batch_size=8: set both'),
  (
    PTX | {'rl.minibatches': 16},
    'config.rl.minibatches=16 does not divide config.ptx.batch_size=8: change either',
  ),
  (PTX | {'ptx.path': None}, 'config.ptx.path is empty: name a file, a folder'),
  (PTX | {'ptx.kind': 'prompt'}, "config.ptx.kind='prompt' must be one of text, completion"),
  (PTX | {'ptx.batch_size': 12}, 'config.ptx.batch_size=12 does not divide over the 8 data'),
  (
    {'rl.missing_eos': 'subtract', 'rl.missing_eos_value': -1.0},
    "config.rl.missing_eos='subtract' subtracts config.rl.missing_eos_value=",
  ),
]
BAD_PPO = BAD_ON_POLICY + [
  ({'rl.gamma': 1.1}, 'config.rl.gamma=1.1 must be in [0, 1]'),
  ({'rl.lam': -0.1}, 'config.rl.lam=-0.1 must be in [0, 1]'),
  ({'rl.vf_coef': -0.1}, 'config.rl.vf_coef=-0.1 must be 0 or positive'),
  ({'rl.vf_coef': math.inf}, 'config.rl.vf_coef=inf must be a finite number'),
  ({'critic.learning_rate': -1.0}, 'config.critic.learning_rate=-1.0 must be positive, or None'),
  ({'rl.value_clip': 0.0}, 'config.rl.value_clip=0.0 must be positive, or None'),
  ({'rl.kl_controller': 'pid'}, "config.rl.kl_controller='pid' must be one of fixed, "),
  ({'rl.score_position': 'first'}, "config.rl.score_position='first' must be one of"),
  ({'rl.whiten_advantages': 'all'}, "config.rl.whiten_advantages='all' must be one of batch"),
  ({'critic.kind': 'none'}, "config.critic.kind='none' must be one of separate, trunk"),
  ({'critic.kind': 'adapters'}, "config.critic.kind='adapters' needs config.model.lora.targets"),
  (
    {'critic.kind': 'trunk', 'critic.path': 'x'},
    "it cannot start from config.critic.path='x'; use kind 'separate' or set the path to None",
  ),
  (
    {'rl.kl_controller': 'adaptive', 'rl.kl_coef': 0.0},
    "with config.rl.kl_controller='adaptive', config.rl.kl_coef, config.rl.kl_target ",
  ),
  (
    {'rl.score_position': 'last'},
    "config.rl.score_position='last' and config.rl.response='raw' must be set together",
  ),
  (
    {'rl.response': 'raw'},
    "config.rl.score_position='last' and config.rl.response='raw' must be set together",
  ),
]


@pytest.mark.parametrize(
  'algorithm, changes, message',
  [
    (algorithm, *case)
    for algorithm, cases in (('sft', BAD), ('reward_model', BAD_REWARD_MODEL), ('ppo', BAD_PPO))
    for case in cases
  ],
)
def test_contradictions(algorithm, changes, message):
  config = changed(good(algorithm), changes)
  with pytest.raises(errors.UserError) as caught:
    build.validate(config, 8)
  assert message in str(caught.value), caught.value


@pytest.mark.parametrize('evals, message', BAD_EVALS)
def test_evaluators_that_cannot_run_are_named(evals, message):
  config = good('sft')
  config.evals = evals
  with pytest.raises(errors.UserError) as raised:
    build.validate(config, 1)
  assert str(raised.value).startswith(message)


def test_an_evaluator_has_defaults():
  block = config_lib.evaluator('x', {'kind': 'prompts', 'path': 'p', 'reward': {'model': 'm'}})
  assert block.to_dict() == {
    'kind': 'prompts',
    'every': None,
    'path': 'p',
    'split': None,
    'columns': None,
    'count': None,
    'batch_size': 64,
    'sampling': {},
    'reward': {'model': 'm'},
  }


# Keys that do nothing.


GOOD_WORDS = {'function': 'tiny:good_words'}
MODELS = {'reward.function': None, 'reward.models': ('x', 'y')}
ONE_UPDATE = {'rl.epochs': 1, 'rl.minibatches': 1}
WITHOUT = [
  (
    'sft',
    {'data.separator': '\n\n'},
    "config.data.separator='\\n\\n' has no effect with config.data.path='data.jsonl': "
    'it separates the texts of a plain text file',
  ),
  (
    'sft',
    {'data.held_out': 0.1, 'evals': {}},
    'config.data.held_out=0.1 has no effect with config.evals={}: only',
  ),
  (
    'sft',
    {'evals': {'held_out': {'kind': 'loss', 'every': 5}}},
    'config.evals.held_out has no effect with config.data.held_out=None: set config.data.held_out,',
  ),
  ('sft', {'samples_every': 5}, "config.samples_every=5 has no effect with config.algorithm='sft'"),
  (
    'sft',
    {'model.lora.rslora': True},
    'config.model.lora.rslora=True has no effect with config.model.lora.targets=()',
  ),
  (
    'reward_model',
    {'preference.loss': 'rating', 'preference.centering': 0.1},
    "config.preference.centering=0.1 has no effect with config.preference.loss='rating'",
  ),
  (
    'reward_model',
    {'preference.normalize_path': 'x'},
    "config.preference.normalize_path='x' has no effect with config.preference.normalize='none'",
  ),
  (
    'ppo',
    {'rl.kl_target': 3.0},
    "config.rl.kl_target=3.0 has no effect with config.rl.kl_controller='fixed'",
  ),
  (
    'ppo',
    {'rl.kl_horizon': 3.0, 'rl.kl_controller': 'adaptive_per_token'},
    'config.rl.kl_horizon=3.0 has no effect',
  ),
  (
    'ppo',
    {'rl.missing_eos_value': -3.0},
    "config.rl.missing_eos_value=-3.0 has no effect with config.rl.missing_eos='none'",
  ),
  (
    'ppo',
    {'rl.kl_coef': 0.0, 'rl.kl_estimator': 'k3'},
    "config.rl.kl_estimator='k3' has no effect with config.rl.kl_coef=0.0",
  ),
  (
    'ppo',
    {'rl.length_buckets': 2},
    'config.rl.length_buckets=2 has no effect with config.microbatch_size=None',
  ),
  (
    'ppo',
    ONE_UPDATE | {'rl.clip_high': 0.3},
    'config.rl.clip_high=0.3 has no effect with config.rl.minibatches=1: '
    'with config.rl.epochs=1 there',
  ),
  (
    'ppo',
    {'rl.vf_coef': 0.0, 'critic.learning_rate': 1e-3},
    'config.critic.learning_rate=0.001 has no effect with',
  ),
  (
    'ppo',
    {'rl.whiten_advantages': 'none', 'rl.whiten_unbiased': True},
    'config.rl.whiten_unbiased=True has no effect',
  ),
  (
    'sft',
    {'optim.warmup_steps': 10},
    'config.optim.warmup_steps=10 is not below config.steps=10: the learning rate never reaches',
  ),
  (
    'ppo',
    {'optim.warmup_steps': 10, 'rl.minibatches': 2, 'rl.epochs': 2},
    'config.optim.warmup_steps=10 is not below config.steps=10: the learning rate never reaches',
  ),
  (
    'ppo',
    {'optim.warmup_from': 0.1},
    'config.optim.warmup_from=0.1 has no effect with config.optim.warmup_steps=0',
  ),
  (
    'ppo',
    {'rl.behaviour': 'minibatch', 'rl.minibatches': 1},
    "config.rl.behaviour='minibatch' has no effect with config.rl.minibatches=1: the first",
  ),
  ('ppo', {'ptx.path': 'x'}, "config.ptx.path='x' has no effect with config.rl.ptx_coef=0.0"),
  (
    'ppo',
    {'sampling.truncate_after': 5},
    'config.sampling.truncate_after=5 has no effect with config.sampling.truncate_at=None',
  ),
  (
    'ppo',
    {'sampling.gather_weights': True, 'sampling.max_concurrent': 8},
    'config.sampling.gather_weights=True has no effect',
  ),
  (
    'ppo',
    {'reward.max_length': 8},
    "config.reward.max_length=8 has no effect with config.reward.function='tiny:good_words'",
  ),
  (
    'ppo',
    {'reward.ensemble': 'min'},
    "config.reward.ensemble='min' has no effect with config.reward.models=()",
  ),
  (
    'ppo',
    MODELS | {'reward.ensemble_coef': 2.0},
    "config.reward.ensemble_coef=2.0 has no effect with config.reward.ensemble='mean'",
  ),
  (
    'ppo',
    PARTS | {'reward.parts': {'a': {'function': 'tiny:good_words', 'max_length': 3}}},
    'config.reward.parts.a.max_length=3 has no effect with '
    "config.reward.parts.a.function='tiny:good_words'",
  ),
  (
    'ppo',
    {'evals': {'prompts': {'path': 'p', 'reward': GOOD_WORDS | {'ensemble': 'min'}}}},
    "config.evals.prompts.reward.ensemble='min' has no effect with "
    'config.evals.prompts.reward.models=None',
  ),
]


@pytest.mark.parametrize('algorithm, changes, line', WITHOUT)
def test_keys_without_effect(algorithm, changes, line, monkeypatch):
  warned = []
  monkeypatch.setattr(build.logging, 'warning', lambda _, line: warned.append(line))
  build.validate(changed(good(algorithm), changes), 1)
  assert len(warned) == 1 and warned[0].startswith(line), warned


@pytest.mark.parametrize(
  'algorithm, changes',
  [
    ('ppo', {'optim.warmup_steps': 9, 'rl.minibatches': 2, 'rl.epochs': 2}),
    ('sft', {'optim.warmup_steps': 10, 'steps': None, 'data.epochs': 1.0}),
    ('ppo', {'rl.kl_target': 3.0, 'rl.kl_controller': 'adaptive'}),
    ('ppo', {'rl.clip_high': 0.3}),
    ('ppo', {'microbatch_size': 8, 'rl.length_buckets': 2}),
    ('sft', {'data.path': 'x.txt', 'data.separator': ''}),
    ('ppo', ONE_UPDATE | {'rl.behaviour': 'sampler', 'rl.clip_high': 0.3}),
    ('ppo', MODELS | {'reward.ensemble': 'variance', 'reward.ensemble_coef': 2.0}),
    # The heads of one model are an ensemble.
    ('ppo', {'reward.function': None, 'reward.model': 'x', 'reward.ensemble': 'min'}),
    ('sft', {'data.held_out': 0.1, 'evals': {'held_out': {'kind': 'loss', 'every': 5}}}),
    ('sft', {'evals': {'held_out': {'kind': 'loss', 'path': 'x'}}}),
  ],
)
def test_keys_with_an_effect(algorithm, changes):
  valid(changed(good(algorithm), changes), 1)


def test_the_table_names_keys_that_there_are():
  configs = [build.load(name).config() for name in BASES]
  for keys, other, _, _ in effects.TABLE:
    for key in [*keys.split(), other]:
      assert any(key in flat(config) for config in configs), key
  for keys, other, _, _ in effects.REWARDS:
    assert {*keys.split(), other} <= set(build.load('ppo').config().reward)


def flat(config, prefix=''):
  """Returns all dotted keys, including those of blocks."""
  found = set()
  for name, value in config.items():
    found |= {prefix + name} | (
      flat(value, f'{prefix}{name}.') if isinstance(value, ml_collections.ConfigDict) else set()
    )
  return found


# Blocks are locked.


@pytest.mark.parametrize(
  'name, hint',
  [
    ('critic', 'Take the config from the config() of that algorithm'),
    ('batch_siz', "Did you mean 'batch_size'"),
  ],
)
def test_a_config_of_another_algorithm(name, hint):
  config = changed(good('sft'), {name: {'kind': 'separate'}})
  with pytest.raises(errors.UserError) as raised:
    build.validate(config, 1)
  assert str(raised.value).startswith(f"algorithm 'sft' has no key config.{name}. {hint}")


@pytest.mark.parametrize('algorithm', BASES)
def test_a_key_that_does_not_exist_cannot_be_set(algorithm):
  config = build.load(algorithm).config()
  with pytest.raises(AttributeError, match='Did you mean "learning_rate"'):
    config.optim.learning_rat = 1.0
  with pytest.raises(KeyError, match='max_len'):
    config.data.update({'max_lenth': 3})
  with pytest.raises(AttributeError, match='"step" does not exist'):
    config.step = 3
  config.model.init.hidden_size = 8
  config.evals.mine = {'kind': 'text'}
  if 'reward' in config:
    config.reward.parts.length = {'function': 'tiny:good_words'}


def test_an_algorithm_may_add_keys_to_those_of_another():
  config = ppo.config()
  config.unlock().rl.bonus = 0.5
  config_keys.lock(config)
  config.rl.bonus = 1.0
  config.model.init.hidden_size = 8
  with pytest.raises(AttributeError):
    config.rl.bonsu = 1.0


def test_missing_wandb_is_reported_before_anything_is_loaded(monkeypatch):
  config = good('sft')
  config.wandb_project = 'mine'
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())
  build.validate(config, 1)
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda name: None if name == 'wandb' else object()
  )
  with pytest.raises(
    errors.UserError,
    match="config.wandb_project='mine' needs the package wandb: pip install 'wandb>=",
  ):
    build.validate(config, 1)
  assert f"'{config_lib.WANDB}'" in (CONFIGS[0].parents[1] / 'setup.py').read_text()
