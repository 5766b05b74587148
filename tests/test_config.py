"""Arguments of configs, and every contradiction that is found before anything is compiled."""

import importlib.util
import math
import pathlib

import ml_collections
import pytest

from rlhf_jax import config as config_lib
from rlhf_jax import errors
from rlhf_jax import pipeline
from rlhf_jax.algorithms import ppo_settings

CONFIGS = sorted((pathlib.Path(__file__).resolve().parents[1] / 'configs').glob('*.py'))


# The string after the colon.


def test_arguments_have_the_type_of_their_defaults():
  parsed = config_lib.parse_arg('debug,rate=1,name=7,count=-3', debug=False, rate=0.5, name='',
                                count=1, left=2)
  assert parsed.to_dict() == {'debug': True, 'rate': 1.0, 'name': '7', 'count': -3, 'left': 2}
  assert isinstance(parsed.rate, float)
  assert config_lib.parse_arg('debug=False', debug=True).debug is False
  assert config_lib.parse_arg('path=a=b', path='').path == 'a=b'
  for empty in (None, ''):
    assert config_lib.parse_arg(empty, seed=3).to_dict() == {'seed': 3}


@pytest.mark.parametrize('arg, message', [
    ('debgu', "config argument 'debgu' is unknown; this config takes: debug, seed"),
    ('debug,sede=1', "config argument 'sede' is unknown; this config takes: debug, seed"),
    ('seed=one', "config argument seed='one' has to be of type int"),
    ('seed=1.5', "config argument seed='1.5' has to be of type int"),
    ('seed', "config argument seed='' has to be of type int"),
    ('seed=True', "config argument seed='True' has to be of type int"),
    ('debug=1', "config argument debug='1' has to be of type bool"),
])
def test_bad_arguments(arg, message):
  with pytest.raises(errors.UserError) as caught:
    config_lib.parse_arg(arg, debug=False, seed=0)
  assert str(caught.value) == message


def test_unknown_preset():
  with pytest.raises(errors.UserError, match="unknown PPO preset 'ppo2': one of openai2019, "):
    config_lib.ppo('ppo2')


# Every config of the project.


@pytest.mark.parametrize('arg', [None, 'debug', 'debug,seed=3'])
@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_configs_build_and_every_stage_is_valid(path, arg, tmp_path):
  spec = importlib.util.spec_from_file_location(f'a_config_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(arg)
  assert config.seed == (3 if arg and 'seed' in arg else 0)
  if 'stages' in config:
    names = pipeline.chosen(config)
    assert len(set(names)) == len(names) >= 3
    for name in names:
      stage = pipeline.resolve(config[name], tmp_path, config.seed)
      assert stage.get('seed', 0) >= 0  # the pipeline's, or one of its own
      assert '$' not in str(stage.to_dict())
      if 'algorithm' in stage:
        config_lib.validate(stage, 1)
      else:
        pipeline.check(name, stage)
  else:  # a run by itself, on as many devices as its mesh needs at least
    config_lib.validate(config, math.prod(max(size, 1) for size in dict(config.mesh).values()))
  with pytest.raises(errors.UserError, match='this config takes: debug, seed'):
    module.get_config('no_such_argument=1')


# Contradictions.


def good(algorithm):
  """The smallest valid config."""
  config = {'sft': config_lib.sft, 'reward_model': config_lib.reward_model,
            'ppo': config_lib.ppo}[algorithm]()
  config.data.path, config.model.path, config.steps = 'data.jsonl', 'model', 10
  if algorithm == 'ppo':
    config.reward.function = 'rewards:length'
  return config


@pytest.mark.parametrize('algorithm', config_lib.KINDS)
@pytest.mark.parametrize('devices', [1, 8])
def test_defaults_are_valid(algorithm, devices):
  config_lib.validate(good(algorithm), devices)


@pytest.mark.parametrize('preset', ppo_settings.PRESETS)
def test_presets_are_valid(preset):
  config = config_lib.ppo(preset)
  config.update(data={'path': 'p'}, model={'path': 'm'}, reward={'model': 'r'}, steps=1)
  if config.ppo.ptx_coef:
    config.ptx.update({'path': 'p', 'batch_size': 8})
  config_lib.validate(config, 8)


BAD = [
    ({'algorithm': 'dpq'}, "config.algorithm='dpq' has to be one of sft, reward_model, ppo"),
    ({'steps': 0}, 'set one of config.steps (now 0) and config.epochs (now 0.0) to a positive'),
    ({'epochs': 1.0}, 'set one of config.steps (now 10) and config.epochs (now 1.0)'),
    ({'steps': -5, 'epochs': 1.0}, 'set one of config.steps (now -5) and config.epochs (now 1.0)'),
    ({'batch_size': 0}, 'config.batch_size=0 has to be positive'),
    ({'optim.name': 'sgd'}, "config.optim.name='sgd' has to be one of adam, tf_adam"),
    ({'optim.schedule': 'step'}, "config.optim.schedule='step' has to be one of constant, "),
    ({'optim.learning_rate': -1.0}, 'config.optim.learning_rate=-1.0 has to be 0 or positive'),
    ({'optim.learning_rate': float('nan')}, 'config.optim.learning_rate=nan has to be'),
    ({'optim.warmup_steps': -1}, 'config.optim.warmup_steps=-1 has to be 0 or positive'),
    ({'optim.weight_decay': -0.1}, 'config.optim.weight_decay=-0.1 has to be 0 or positive'),
    ({'optim.clip_norm': -1.0}, 'config.optim.clip_norm=-1.0 has to be 0 or positive'),
    ({'data.on_error': 'ignore'}, "config.data.on_error='ignore' has to be one of stop, skip"),
    ({'data.kind': 'prompt'}, "config.data.kind='prompt' has to be one of text, completion"),
    ({'data.path': ''}, 'config.data.path is empty: name a file, a folder, a hub data set or tfds'),
    ({'data.columns': 'prompt'}, "config.data.columns='prompt' has to read new=stored,new=stored"),
    ({'data.max_length': 0}, 'config.data.max_length=0 has to be positive'),
    ({'data.held_out': 1.0}, 'config.data.held_out=1.0 has to be in [0, 1)'),
    ({'data.held_out': 0.1, 'data.held_out_path': 'x'},
     "config.data.held_out=0.1 and config.data.held_out_path='x': set one of them"),
    ({'model.path': ''}, 'config.model.path and config.model.init are both empty: name a'),
    ({'model.path': '', 'model.init': {'family': 'llama'}},
     'config.tokenizer is empty and there is no config.model.path to take it from'),
    ({'model.dtype': 'float16'}, "config.model.dtype='float16' has to be one of float32, bfloat16"),
    ({'model.param_dtype': 'int8'}, "config.model.param_dtype='int8' has to be one of"),
    ({'model.unfrozen_layers': -2}, 'config.model.unfrozen_layers=-2 has to be -1 (all) or more'),
    ({'model.lora.targets': (('up(', 1, 1.0),)}, "config.model.lora.targets: 'up(' is no regular"),
    ({'model.lora.targets': (('up', 0, 1.0),)}, "targets has ('up', 0, 1.0): each has to be (regex"),
    ({'model.lora.targets': ('up',)}, "config.model.lora.targets has 'up': each has to be (regex"),
    ({'model.lora.targets': (('up', 1, 1.0),), 'model.lora.path': 'adapter'},
     "config.model.lora.path='adapter' brings its own targets"),
    ({'optim.ema': 1.0}, 'config.optim.ema=1.0 has to be in [0, 1)'),
    ({'optim.master_dtype': 'float16'}, "config.optim.master_dtype='float16' has to be one of"),
    ({'keep_checkpoints': 0}, 'config.keep_checkpoints=0 has to be positive'),
    ({'checkpoint_every': -1}, 'config.checkpoint_every=-1 has to be positive, or 0 for the end'),
    ({'microbatch_size': 5}, 'config.microbatch_size=5 does not divide config.batch_size=32: '),
    ({'microbatch_size': -1}, 'config.microbatch_size=-1 does not divide config.batch_size=32'),
    ({'batch_size': 12}, 'config.batch_size=12 does not divide over the 8 data shards of'),
    ({'mesh.data': 3}, 'does not fit 8 devices'),
    ({'mesh.data': 4}, 'does not fit 8 devices'),
    ({'mesh.fsdp': -1}, 'only one axis can be -1'),
    ({'mesh.tensor': 0}, 'config.mesh.tensor=0 has to be positive, or -1'),
]
BAD_REWARD_MODEL = [
    ({'data.kind': 'text'}, "config.data.kind='text' has to be one of comparison"),
    ({'reward.loss': 'hinge'}, "config.reward.loss='hinge' has to be one of pairwise, pick_best"),
    ({'reward.normalize': 'all'}, "config.reward.normalize='all' has to be one of none, gain_bias"),
    ({'reward.token_dropout': 1.0}, 'config.reward.token_dropout=1.0 has to be in [0, 1)'),
    ({'microbatch_size': 3}, 'config.microbatch_size=3 does not divide config.batch_size=32'),
]
PTX = {'ppo.ptx_coef': 1.0, 'ptx.batch_size': 8, 'ptx.path': 'p'}
BAD_PPO = [
    ({'ppo.gamma': 1.1}, 'config.ppo.gamma=1.1 has to be in [0, 1]'),
    ({'ppo.lam': -0.1}, 'config.ppo.lam=-0.1 has to be in [0, 1]'),
    ({'ppo.clip_low': 2.0}, 'config.ppo.clip_low=2.0 has to be in [0, 1]'),
    ({'ppo.dual_clip': 0.5}, 'config.ppo.dual_clip=0.5 has to be above 1, or 0 for none'),
    ({'ppo.kl_estimator': 'k4'}, "config.ppo.kl_estimator='k4' has to be one of k1, "),
    ({'ppo.kl_controller': 'pid'}, "config.ppo.kl_controller='pid' has to be one of fixed, "),
    ({'ppo.kl_in': 'both'}, "config.ppo.kl_in='both' has to be one of reward, loss"),
    ({'ppo.response': 'cut'}, "config.ppo.response='cut' has to be one of truncated, raw"),
    ({'ppo.score_position': 'first'}, "config.ppo.score_position='first' has to be one of"),
    ({'ppo.missing_eos': 'add'}, "config.ppo.missing_eos='add' has to be one of"),
    ({'ppo.whiten_advantages': 'all'}, "config.ppo.whiten_advantages='all' has to be one of batch"),
    ({'ppo.behaviour': 'old'}, "config.ppo.behaviour='old' has to be one of forward, sampler"),
    ({'critic.kind': 'none'}, "config.critic.kind='none' has to be one of separate, trunk"),
    ({'critic.kind': 'adapters'}, "config.critic.kind='adapters' needs config.model.lora.targets"),
    ({'reference': 'x', 'model.unfrozen_layers': 1}, "config.reference='x': with config.model.unfrozen_layers=1"),
    ({'critic.kind': 'trunk', 'critic.path': 'x'},
     "it cannot start from config.critic.path='x'; use 'separate' or leave the path empty"),
    ({'data.on_long': 'cut'}, "config.data.on_long='cut' has to be one of error, truncate_left"),
    ({'ppo.epochs': 0}, 'config.ppo.epochs=0 has to be positive'),
    ({'ppo.minibatches': 0}, 'config.ppo.minibatches=0 has to be positive'),
    ({'ppo.length_buckets': 0}, 'config.ppo.length_buckets=0 has to be positive'),
    ({'ppo.minibatches': 3}, 'config.ppo.minibatches=3 does not divide config.batch_size=64'),
    ({'ppo.minibatches': 4, 'microbatch_size': 32},
     'config.microbatch_size=32 does not divide config.batch_size / config.ppo.minibatches=16'),
    ({'reward.function': ''}, 'set one of config.reward.model and config.reward.function, not'),
    ({'reward.model': 'x'}, 'set one of config.reward.model and config.reward.function, not both'),
    ({'sampling.temperature': 0.0}, 'config.sampling.temperature=0.0 has to be positive: PPO'),
    ({'sampling.max_new_tokens': 0}, 'config.sampling.max_new_tokens=0 has to be positive'),
    ({'sampling.top_k': -1}, 'config.sampling.top_k=-1 has to be positive, or 0 for all'),
    ({'sampling.top_p': 0.0}, 'config.sampling.top_p=0.0 has to be in (0, 1]'),
    ({'sampling.rows': -1, 'mesh.data': 1, 'mesh.tensor': 8},
     'config.sampling.rows=-1 has to be less than config.batch_size=64, or 0'),
    ({'sampling.rows': 64, 'mesh.data': 1, 'mesh.tensor': 8},
     'config.sampling.rows=64 has to be less than config.batch_size=64, or 0'),
    ({'sampling.rows': 12}, 'config.sampling.rows=12 does not divide over the 8 data shards of config.mesh='),
    ({'ppo.kl_controller': 'adaptive', 'ppo.kl_coef': 0.0},
     "config.ppo.kl_controller='adaptive' multiplies config.ppo.kl_coef: it, kl_target and"),
    ({'ppo.kl_estimator': 'full', 'ppo.kl_in': 'loss'},
     "config.ppo.kl_estimator='full' works with config.ppo.kl_in='reward' only"),
    ({'ppo.score_position': 'last'},
     "config.ppo.score_position='last' and config.ppo.response='raw' belong together"),
    ({'ppo.response': 'raw'},
     "config.ppo.score_position='last' and config.ppo.response='raw' belong together"),
    ({'ppo.ptx_coef': 1.0}, 'config.ppo.ptx_coef=1.0 and config.ptx.batch_size=0: set both'),
    ({'ptx.batch_size': 8}, 'config.ppo.ptx_coef=0.0 and config.ptx.batch_size=8: set both'),
    (PTX | {'ppo.minibatches': 16},
     'config.ppo.minibatches=16 does not divide config.ptx.batch_size=8: change either'),
    (PTX | {'ptx.path': ''}, 'config.ptx.path is empty: name the pretraining data to mix in'),
    (PTX | {'ptx.kind': 'prompt'}, "config.ptx.kind='prompt' has to be one of text, completion"),
    (PTX | {'ptx.batch_size': 12}, 'config.ptx.batch_size=12 does not divide over the 8 data'),
    ({'ppo.missing_eos': 'subtract', 'ppo.missing_eos_value': -1.0},
     "config.ppo.missing_eos='subtract' takes missing_eos_value off the score: a negative one"),
]


@pytest.mark.parametrize('algorithm, changes, message', [
    (algorithm, *case) for algorithm, cases in
    (('sft', BAD), ('reward_model', BAD_REWARD_MODEL), ('ppo', BAD_PPO)) for case in cases])
def test_contradictions(algorithm, changes, message):
  config = good(algorithm)
  for key, value in changes.items():
    if key == 'model.init':
      config.model.init = ml_collections.ConfigDict(value)
    else:
      config.update_from_flattened_dict({key: value})
  with pytest.raises(errors.UserError) as caught:
    config_lib.validate(config, 8)
  assert message in str(caught.value), caught.value
