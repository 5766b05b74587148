"""Runs trlX's PPO or ILQL (0.7, https://github.com/CarperAI/trlx) on its own random walks.

python -m benchmarks.random_walks --model FOLDER

`examples/randomwalks/ppo_randomwalks.py` of trlX is run as it is, from the model in FOLDER, without
evaluations and checkpoints. An iteration is `make_experience`, in which scoring counts as part of
the rollout, and the optimizer steps until the next one. trlX fills its 128 rollouts with batches of
the 20 prompts, so an iteration has 140 responses, 4 epochs and 8 optimizer steps.

With `--algorithm ilql`, `ilql_randomwalks.py` is run, from a new model, and an iteration is an
epoch of 10 steps, after which it moves its targets.

trlX of 2023 imports deepspeed, ray, torchtyping and wandb, which this example does not need. The
stubs below stand in for them, so trlX runs with torch 2.13 and transformers 4.46.
"""

import contextlib
import importlib.machinery
import inspect
import pathlib
import shutil
import sys
import tempfile
import types

import torch
import transformers

from benchmarks.peers import protocol
from benchmarks.peers import torch_models


def stub(name, **attributes):
  """Puts a module with some names into sys.modules."""
  module = sys.modules[name] = types.ModuleType(name)
  module.__spec__ = importlib.machinery.ModuleSpec(name, None)
  for key, value in attributes.items():
    setattr(module, key, value)


def gathered_parameters(parameters, modifier_rank):
  """Stands for deepspeed.zero.GatheredParameters; here no parameter is partitioned."""
  del parameters, modifier_rank
  return contextlib.nullcontext()


class TensorType:
  """Stands for torchtyping's annotations, such as TensorType['batch']."""

  def __class_getitem__(cls, item):
    return cls


stub('deepspeed', zero=types.SimpleNamespace(GatheredParameters=gathered_parameters))
stub('wandb')
stub('torchtyping', TensorType=TensorType)
stub('ray.air', session=None)
stub('ray', is_initialized=lambda: False, air=sys.modules['ray.air'])

from examples.randomwalks import ilql_randomwalks  # noqa: E402  after the stubs
from examples.randomwalks import ppo_randomwalks  # noqa: E402
from trlx.models.modeling_ilql import AutoModelForCausalLMWithILQLHeads  # noqa: E402
from trlx.trainer import accelerate_base_trainer  # noqa: E402
from trlx.trainer.accelerate_ilql_trainer import AccelerateILQLTrainer  # noqa: E402
from trlx.trainer.accelerate_ppo_trainer import AcceleratePPOTrainer  # noqa: E402

NEVER = 10**9
HYPERPARAMETERS = {
  'train.epochs': NEVER,
  'train.total_steps': NEVER,
  'train.eval_interval': NEVER,
  'train.checkpoint_interval': NEVER,
  'train.tracker': None,
  'train.save_best': False,
}


def copy_with_torch_weights(model, folder):
  """Copies the folder of a model, and adds pytorch_model.bin, which trlX reads."""
  for path in pathlib.Path(model).iterdir():
    shutil.copyfile(path, pathlib.Path(folder, path.name))
  weights = transformers.AutoModelForCausalLM.from_pretrained(model).state_dict()
  torch.save(weights, pathlib.Path(folder, 'pytorch_model.bin'))


def take_turns(turns):
  """Makes the trainer wait for its turn before each `make_experience`, and report its times."""
  make_experience, begun = AcceleratePPOTrainer.make_experience, False

  def timed(trainer, *args, **kwargs):
    nonlocal begun
    if begun:
      turns.lap('update')
      turns.report()
    else:
      turns.ready(protocol.versions('trlx', 'torch', 'transformers'))
    begun = True
    turns.wait()
    make_experience(trainer, *args, **kwargs)
    turns.lap('rollout')

  AcceleratePPOTrainer.make_experience = timed


def take_turns_offline(turns):
  """Makes the trainer of ILQL wait for its turn before each epoch, and report its seconds."""
  prepare, finish = (
    AccelerateILQLTrainer.prepare_learning,
    AccelerateILQLTrainer.post_backward_callback,
  )

  def prepared(trainer):
    prepare(trainer)
    turns.ready(protocol.versions('trlx', 'torch', 'transformers'))
    turns.wait()

  def finished(trainer):
    finish(trainer)
    turns.lap('update')
    turns.report()
    turns.wait()

  AccelerateILQLTrainer.prepare_learning = prepared
  AccelerateILQLTrainer.post_backward_callback = finished


def main():
  options = protocol.arguments(__doc__, model='', algorithm='ppo')
  turns = torch_models.turns(options)
  accelerate_base_trainer.get_git_tag = lambda: ('', '')
  if options.algorithm == 'ilql':
    take_turns_offline(turns)
    # trlX sets this attribute for loaded models, but not for new ones.
    AutoModelForCausalLMWithILQLHeads.forward_kwargs = inspect.getfullargspec(
      transformers.GPT2LMHeadModel.forward
    ).args
    AccelerateILQLTrainer.evaluate = lambda trainer: {}
    ilql_randomwalks.main(HYPERPARAMETERS | {'tokenizer.tokenizer_path': options.model})
    return
  take_turns(turns)
  AcceleratePPOTrainer.evaluate = lambda trainer: {}
  with tempfile.TemporaryDirectory() as folder:
    copy_with_torch_weights(options.model, folder)
    paths = {'model.model_path': folder, 'tokenizer.tokenizer_path': folder}
    ppo_randomwalks.main(HYPERPARAMETERS | paths)


if __name__ == '__main__':
  main()
