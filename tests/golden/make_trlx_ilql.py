"""Golden numbers from trlX's own ILQL (https://github.com/CarperAI/trlx, torch).

python make_trlx_ilql.py CHECKOUT

Writes trlx_ilql.npz beside this file. CHECKOUT is a git checkout of trlX; torch, accelerate,
transformers 4.46, attrs, cattrs and rich must be installed. This stubs deepspeed, ray, torchtyping
and wandb, of which the functions called here use names only.

The data are dialogues of several turns. `make_experience` standardizes the returns and finds states
and actions, `ILQLHeads` computes V, Q and the targets, and `ILQLConfig.loss` the loss. The targets
move once, by `sync_target_q_heads`.

What is in the file. N dialogues, T tokens of the longest, D width, V vocabulary.
  tokens, outputs [N, T]   token ids, and whether a token is an output; 0 after the end
  returns [N]              before standardization
  hidden [N, T, D], logits [N, T, V]
  heads/NAME               parameters of V, Q1, Q2 and the targets, in the layout of torch.nn.Linear
  rewards [N, T]           standardized, at the position of the token
  C/tau, C/beta            settings of case C; gamma is 0.9, cql_scale 0.1, awac_scale 0.5
  C/loss, C/loss_v, C/loss_q, C/loss_cql, C/loss_awac
  C/grad/hidden, C/grad/logits, C/grad/NAME      gradients of the loss
  moved/NAME               targets after the move, alpha 0.3
"""

import importlib.machinery
import pathlib
import sys
import types

import numpy as np
import torch

N, D, V = 5, 6, 11
CASES = {'default': (0.7, 0.0), 'weighted': (0.9, 0.6)}


def stub(name, **attributes):
  """Puts a module with some names into sys.modules."""
  module = sys.modules[name] = types.ModuleType(name)
  module.__spec__ = importlib.machinery.ModuleSpec(name, None)
  for key, value in attributes.items():
    setattr(module, key, value)


class TensorType:
  """Stands for torchtyping's annotations."""

  def __class_getitem__(cls, item):
    return cls


def dialogues(rng, message):
  """Returns N dialogues of 1 to 3 turns: lists of trlX's DialogMessage."""
  found = []
  for _ in range(N):
    parts = []
    for turn in range(2 * rng.integers(1, 4)):
      size = rng.integers(1, 5)
      parts.append(message(turn % 2 == 1, tuple(rng.integers(0, V, size).tolist())))
    found.append(parts)
  return found


def main(checkout):
  """Computes all numbers and writes the file."""
  stub('deepspeed', zero=None)
  stub('wandb')
  stub('torchtyping', TensorType=TensorType)
  stub('ray.air', session=None)
  stub('ray', is_initialized=lambda: False, air=sys.modules['ray.air'])
  sys.path.insert(0, checkout)
  from trlx.models import modeling_ilql
  from trlx.pipeline import offline_pipeline
  from trlx.trainer import accelerate_ilql_trainer

  rng = np.random.default_rng(0)
  torch.manual_seed(0)
  samples = dialogues(rng, offline_pipeline.DialogMessage)
  returns = rng.normal(3.0, 2.0, N)
  store = accelerate_ilql_trainer.make_experience(samples, returns.tolist(), verbose=False)
  batch = offline_pipeline.ilql_collate_fn([store[i] for i in range(N)])
  length = batch.input_ids.shape[1]
  found = {
    'tokens': batch.input_ids.numpy(),
    'outputs': np.zeros((N, length), bool),
    'returns': returns,
    'rewards': np.zeros((N, length)),
  }
  for i in range(N):
    positions = store[i].actions_ixs.numpy() + 1
    found['outputs'][i, positions] = True
    found['rewards'][i, positions] = store[i].rewards.numpy()

  heads = modeling_ilql.ILQLHeads(D, V, True, 0.3, torch.float32)
  with torch.no_grad():
    for target in heads.target_q_heads.parameters():
      target.add_(0.3 * torch.randn_like(target))
  parameters = dict(heads.named_parameters())
  found |= {f'heads/{name}': x.detach().numpy().copy() for name, x in parameters.items()}
  hidden = torch.randn(N, length, D, requires_grad=True)
  logits = torch.randn(N, length, V, requires_grad=True)
  found |= {'hidden': hidden.detach().numpy(), 'logits': logits.detach().numpy()}
  for case, (tau, beta) in CASES.items():
    config = modeling_ilql.ILQLConfig(
      name='ilqlconfig',
      tau=tau,
      gamma=0.9,
      cql_scale=0.1,
      awac_scale=0.5,
      alpha=0.3,
      beta=beta,
      steps_for_target_q_sync=1,
      two_qs=True,
      gen_kwargs={},
    )
    qs, target_qs, vs = heads(hidden, states_ixs=batch.states_ixs, actions_ixs=batch.actions_ixs)
    loss, stats = config.loss((logits, (qs, target_qs, vs)), batch)
    trained = {name: x for name, x in parameters.items() if x.requires_grad}
    gradients = torch.autograd.grad(loss, [hidden, logits, *trained.values()])
    found |= {f'{case}/tau': tau, f'{case}/beta': beta}
    names = ('loss', 'loss_v', 'loss_q', 'loss_cql', 'loss_awac')
    found |= {f'{case}/{name}': stats[f'losses/{name}'] for name in names}
    found |= {
      f'{case}/grad/{name}': gradient.numpy()
      for name, gradient in zip(('hidden', 'logits', *trained), gradients)
    }
  heads.sync_target_q_heads()
  found |= {
    f'moved/{name}': x.detach().numpy() for name, x in parameters.items() if 'target' in name
  }
  found = {
    name: np.asarray(x, np.float32) if np.asarray(x).dtype == float else x
    for name, x in found.items()
  }
  np.savez_compressed(pathlib.Path(__file__).with_name('trlx_ilql.npz'), **found)


if __name__ == '__main__':
  main(sys.argv[1])
