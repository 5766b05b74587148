"""Golden numbers from RL4LMs' own code (https://github.com/allenai/RL4LMs, torch).

python make_rl4lms.py CHECKOUT

Writes rl4lms.npz beside this file: the masks of both MaskLogitsProcessor classes of NLPO, the
masked distribution, the KL controller's demo, a step of A2C, and the rewards of the toy tasks for
random texts. CHECKOUT is a git checkout, of which this runs the files below. It stubs gym and
Stable-Baselines3, of which the functions called here use a base class and an annotation. The step
of A2C is the body of A2C.train without its logging, on arrays.
"""

import importlib.util
import pathlib
import sys
import types

import numpy as np
import torch
import transformers.modeling_utils

ROWS, VOCAB, SPECIAL = 6, 300, (0, 1, 2, 299)
KEPT, TOP = (1, 100), (0.5, 0.9, 1.0)
MASKABLE = 'rl4lms.algorithms.common.maskable'


def stub(name, **attributes):
  """Puts a module with some names into sys.modules."""
  module = sys.modules.setdefault(name, types.ModuleType(name))
  for key, value in attributes.items():
    setattr(module, key, value)


def load(checkout, name):
  """Imports a file of the checkout without its packages."""
  path = checkout / (name.replace('.', '/') + '.py')
  spec = importlib.util.spec_from_file_location(name, path)
  module = sys.modules[name] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def masks(processors, rng):
  """Returns the allowed tokens of both classes, {class/top/kept: [ROWS, VOCAB]}, and logits."""
  scale = np.array([0.1, 1, 2, 3, 5, 30])[:, None]
  logits = (scale * rng.normal(size=(ROWS, VOCAB))).astype(np.float32)
  model = lambda **inputs: types.SimpleNamespace(logits=torch.tensor(logits)[:, None])
  found = {'mask/logits': logits}
  for kind in ('CasualLM', 'Seq2SeqLM'):
    for top in TOP:
      for kept in KEPT:
        processor = getattr(processors, f'MaskLogitsProcessor{kind}')(
          model, types.SimpleNamespace(n=VOCAB), top, False, None, 'learned_top_p', kept
        )
        processor.all_special_ids = torch.tensor([SPECIAL] * ROWS)
        processor._prepare_inputs_for_model = lambda *_: {}
        scores = torch.zeros(ROWS, VOCAB)
        inputs = {'attention_mask': None} if kind == 'CasualLM' else {}
        out = processor(torch.zeros(ROWS, 1, dtype=torch.long), scores, inputs)
        found[f'mask/{kind}/{top}/{kept}'] = ~torch.isneginf(out).numpy()
  return found


def masked_logprobs(distributions, logits, mask):
  """Returns log p of each row's first allowed token, raw and masked, and the masked entropy."""
  tokens = torch.tensor(mask).int().argmax(dim=1)
  distribution = distributions.MaskableCategoricalDistribution(VOCAB)
  distribution.proba_distribution(action_logits=torch.tensor(logits))
  raw = distribution.log_prob(tokens)
  distribution.apply_masking(mask)
  return {
    'masked/tokens': tokens.numpy(),
    'masked/raw': raw.numpy(),
    'masked/logprobs': distribution.log_prob(tokens).numpy(),
    'masked/entropy': distribution.entropy().numpy(),
  }


def controller(module):
  """Returns the coefficients of the demo at the end of kl_controllers.py."""
  control = module.KLController(kl_coeff=0.1, target_kl=0.1)
  coefs = []
  for kl in (-0.2, 0.3, 0.4):
    control.step(torch.tensor(kl))
    coefs.append(control.kl_coeff)
  return {'controller/kl': np.array([-0.2, 0.3, 0.4]), 'controller/coefs': np.array(coefs)}


def a2c(rng):
  """Runs three steps of A2C.train with its defaults on logprobs and values as parameters."""
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  logits, values = draw(12, 7), 3 * draw(12)
  actions, advantages, returns = rng.integers(0, 7, 12), draw(12), draw(12)
  found = {
    'a2c/logits': logits,
    'a2c/values': values,
    'a2c/actions': actions,
    'a2c/advantages': advantages,
    'a2c/returns': returns,
  }
  parameters = [torch.nn.Parameter(torch.tensor(x)) for x in (logits, values)]
  optimizer = torch.optim.RMSprop(parameters, lr=7e-4, alpha=0.99, eps=1e-5, weight_decay=0)
  for step in range(3):
    distribution = torch.distributions.Categorical(logits=parameters[0])
    log_prob = distribution.log_prob(torch.tensor(actions))
    policy_loss = -(torch.tensor(advantages) * log_prob).mean()
    value_loss = torch.nn.functional.mse_loss(torch.tensor(returns), parameters[1])
    loss = policy_loss + 0.0 * -torch.mean(distribution.entropy()) + 0.5 * value_loss
    optimizer.zero_grad()
    loss.backward()
    if not step:
      found |= {
        'a2c/policy_loss': policy_loss.item(),
        'a2c/value_loss': value_loss.item(),
        'a2c/loss': loss.item(),
        'a2c/logits_gradient': parameters[0].grad.numpy().copy(),
        'a2c/values_gradient': parameters[1].grad.numpy().copy(),
      }
    for parameter in parameters:  # separately, as we do; RL4LMs clips their joint norm
      torch.nn.utils.clip_grad_norm_([parameter], 0.5)
    optimizer.step()
  found['a2c/new_logits'] = parameters[0].detach().numpy()
  found['a2c/new_values'] = parameters[1].detach().numpy()
  return found


def toy_texts(rng):
  """Draws texts of words, lists of numbers that increase for a while, and texts with dates."""
  words = 'apples 7, nan inf 1e2 1_0 -4 .5 + 2014-03-12 2014-3-12 x1999-12-31y ٣ ² 0x1 3a'.split()
  texts = ['', ' ', '5']
  for _ in range(120):
    count = int(rng.integers(1, 25))
    numbers = [str(number) for number in rng.integers(30, size=count)]
    mixed = [str(rng.choice(words)) if rng.random() < 0.3 else number for number in numbers]
    rising = sorted(rng.choice(99, count, replace=False).tolist())
    part = int(rng.integers(count + 1))
    texts += [' '.join(mixed), '\n'.join([*map(str, rising[:part]), *numbers[part:]])]
  return texts


def toys(module):
  """Returns random texts and the rewards of both toy tasks."""
  texts = toy_texts(np.random.default_rng(1))
  increasing = module.RewardIncreasingNumbers.reward_increasing_numbers_in_text
  return {
    'toys/texts': np.array(texts),
    'toys/increasing_numbers': np.array([increasing(text, 20) for text in texts], float),
    'toys/dates': np.array([module.RewardSentencesWithDates.date_in_text(text) for text in texts]),
  }


def main(checkout):
  """Writes rl4lms.npz."""
  stub('gym', spaces=types.SimpleNamespace(Space=object))
  stub('stable_baselines3')
  stub('stable_baselines3.common')
  stub('stable_baselines3.common.distributions', Distribution=type('Distribution', (), {}))
  if not hasattr(transformers.modeling_utils, 'unwrap_model'):
    transformers.modeling_utils.unwrap_model = lambda model: model
  environment = 'rl4lms.envs.text_generation'
  for name in ('rl4lms', 'rl4lms.envs', environment):
    stub(name)
  stub(f'{environment}.observation', Observation=object)
  stub(f'{environment}.reward', RewardFunction=object)
  distributions = load(checkout, f'{MASKABLE}.distributions')
  processors = load(checkout, f'{MASKABLE}.logits_processor')
  rng = np.random.default_rng(0)
  found = masks(processors, rng)
  mask = found['mask/CasualLM/0.9/1']
  found |= masked_logprobs(distributions, found['mask/logits'], mask)
  found |= controller(load(checkout, f'{environment}.kl_controllers')) | a2c(rng)
  found |= toys(load(checkout, f'{environment}.test_reward'))
  np.savez_compressed(pathlib.Path(__file__).with_name('rl4lms.npz'), **found)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
