"""Write trl_dpo.npz: losses of TRL's DPO, KTO, ORPO and CPO trainers, to compare ours with.

    pip install "trl==1.12.0" "torch==2.13.0" "transformers==5.23.0" accelerate datasets
    python tests/golden/make_trl_dpo.py [--out FILE]

Only this script needs torch and TRL; the test reads the .npz with NumPy. Each trainer tokenizes
the texts, makes the batch and computes its loss unchanged. All of them get log-probabilities from
`selective_log_softmax`, which is wrapped to record its results and their gradients.

Letters: G examples (pairs, or labelled completions of KTO).

Contents of the file; C is a case's name.
  versions        JSON text
  settings        JSON text {C: hyperparameters}, in TRL's names
  C/logps, C/ref_logps [2, G]    sums over completions, chosen and rejected, by policy and
                  reference; KTO: of the labelled completions, and of the mismatched ones
  C/lengths [2, G]               tokens of the completions, with the EOS
  C/gradients [2, G]             d loss / d logps by autograd; KTO: of the labelled ones, then 0
  C/labels [G]                   KTO only
  C/loss, C/METRIC               the loss and what TRL logs as METRIC; ORPO's loss is without the
                  SFT loss, which is in C/nll_loss

Conventions of TRL 1.12, from its source, and checked by these numbers:
  * Log-probabilities are sums over the tokens of the completion and its EOS. 'ipo' and
    'sigmoid_norm' divide the log-ratios by the lengths; ORPO and SimPO divide log-probabilities.
  * `label_smoothing` is used by 'robust' (and CPO's losses), not by 'sigmoid'.
  * KTO's batch must keep the order of the data: the mismatched completion of an example is that of
    the one before it in the batch. The loss is the mean over all examples of the batch, the logged
    rewards are means over the desirable and the undesirable ones.
  * ORPO logs beta times mean log-probabilities as rewards and mean log-probabilities as logps. Its
    SFT loss is a mean over the tokens of the batch, those of the prompts included.
"""

import argparse
import json
import pathlib
import tempfile

import datasets
import make_trl_grpo as shared
import make_trl_online_dpo as models
import numpy as np
import tokenizers
import torch
import transformers
import trl
from trl.experimental import cpo
from trl.experimental import orpo
from trl.experimental.cpo import cpo_trainer
from trl.experimental.orpo import orpo_trainer
from trl.trainer import dpo_trainer
from trl.trainer import kto_trainer

EXAMPLES = 6
# Name: (module of the trainer, trainer, config, settings).
DPO = dpo_trainer, trl.DPOTrainer, trl.DPOConfig
KTO = kto_trainer, trl.KTOTrainer, trl.KTOConfig
ORPO = orpo_trainer, orpo.ORPOTrainer, orpo.ORPOConfig
CPO = cpo_trainer, cpo.CPOTrainer, cpo.CPOConfig
CASES = {
  'sigmoid': (*DPO, dict(loss_type=['sigmoid'], beta=0.3)),
  'hinge': (*DPO, dict(loss_type=['hinge'], beta=0.3)),
  'ipo': (*DPO, dict(loss_type=['ipo'], beta=0.4)),
  'robust': (*DPO, dict(loss_type=['robust'], beta=0.3, label_smoothing=0.2)),
  'sigmoid_norm': (*DPO, dict(loss_type=['sigmoid_norm'], beta=2.0)),
  'kto': (*KTO, dict(beta=0.3, desirable_weight=1.0, undesirable_weight=1.3)),
  # The policy and the reference change places, and with them the sign of the KL estimate.
  'kto_swapped': (*KTO, dict(beta=0.3, desirable_weight=0.8, undesirable_weight=1.0)),
  'orpo': (*ORPO, dict(beta=0.3)),
  'simpo': (*CPO, dict(loss_type='simpo', beta=2.0, simpo_gamma=0.7, cpo_alpha=0.0)),
  'simpo_smooth': (
    *CPO,
    dict(loss_type='simpo', beta=2.0, simpo_gamma=0.7, cpo_alpha=0.0, label_smoothing=0.1),
  ),
}
METRICS = (
  'rewards/chosen',
  'rewards/rejected',
  'rewards/margins',
  'rewards/accuracies',
  'logps/chosen',
  'logps/rejected',
  'kl',
  'nll_loss',
)


def make_data():
  """Returns prompts, chosen and rejected texts of different lengths."""
  rng = np.random.default_rng(5)
  text = lambda length: ''.join(f' t{i}' for i in rng.integers(3, shared.VOCAB, length))
  rows = [
    (text(a), text(b), text(c))
    for a, b, c in zip((1, 4, 2, 3, 5, 2), (3, 1, 5, 2, 4, 6), (2, 6, 5, 1, 3, 4))
  ]
  return [list(column) for column in zip(*rows)]


def make_dataset(name):
  prompts, chosen, rejected = make_data()
  if not name.startswith('kto'):
    return datasets.Dataset.from_dict({'prompt': prompts, 'chosen': chosen, 'rejected': rejected})
  labels = [True, False, False, True, False, False]
  completions = [c if label else r for c, r, label in zip(chosen, rejected, labels)]
  return datasets.Dataset.from_dict({'prompt': prompts, 'completion': completions, 'label': labels})


def run_case(name, workdir):
  """Returns the record of one batch."""
  module, trainer_class, config_class, settings = CASES[name]
  with_reference = module in (dpo_trainer, kto_trainer)
  policy, reference = models.make_model(1, noise=0.05), models.make_model(0)
  if name == 'kto_swapped':
    policy, reference = reference, policy
  tokenizer = shared.make_tokenizer()
  tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  args = config_class(
    output_dir=str(workdir),
    per_device_train_batch_size=EXAMPLES,
    max_length=64,
    max_steps=1,
    use_cpu=True,
    bf16=False,
    disable_dropout=True,
    report_to=[],
    gradient_checkpointing=False,
    **settings,
  )
  trainer = trainer_class(
    model=policy,
    args=args,
    processing_class=tokenizer,
    train_dataset=make_dataset(name),
    **({'ref_model': reference} if with_reference else {}),
  )
  batch = next(iter(trainer.get_train_dataloader()))
  calls, softmax = [], module.selective_log_softmax

  def recording(logits, index, **kwargs):
    result = softmax(logits, index, **kwargs)
    if result.requires_grad:
      result.retain_grad()
    calls.append(result)
    return result * 1.0  # TRL writes zeros into it

  module.selective_log_softmax = recording
  trainer.model.train()
  loss = trainer.compute_loss(trainer.model, batch)
  module.selective_log_softmax = softmax
  loss.backward()
  record = {'loss': loss.item()}
  logged = getattr(trainer, '_metrics', None) or trainer._stored_metrics
  record |= {key: logged['train'][key][-1] for key in METRICS if key in logged['train']}
  if name == 'orpo':
    record['loss'] -= record['nll_loss']
  return record | sums(name, batch, calls)


def sums(name, batch, calls):
  """Returns sums of log-probabilities over completions, lengths and gradients."""
  if name.startswith('kto'):
    masks = [batch[key][:, 1:] == 1 for key in ('completion_mask', 'KL_completion_mask')]
    mismatched, policy, ref_mismatched, reference = calls
    total = lambda pair: [sum_over(x, mask) for x, mask in zip(pair, masks)]
    gradients = np.stack([first(policy.grad, masks[0]), np.zeros(EXAMPLES)])
    return {
      'logps': total((policy, mismatched)),
      'ref_logps': total((reference, ref_mismatched)),
      'lengths': [mask.sum(1).numpy() for mask in masks],
      'gradients': gradients,
      'labels': np.array(batch['label'].tolist()),
    }
  if len(calls) == 2:  # DPO: chosen, then rejected
    masks = batch['completion_mask'][:, 1:] == 1
  else:
    parts = [batch[f'{side}_labels'] for side in ('chosen', 'rejected')]
    width = calls[0].shape[1] + 1
    parts = [
      torch.nn.functional.pad(part, (0, width - part.shape[1]), value=-100) for part in parts
    ]
    masks = (torch.cat(parts) != -100)[:, 1:]
  both = lambda x: np.reshape(x, (2, EXAMPLES))
  record = {
    'logps': both(sum_over(calls[0], masks)),
    'lengths': both(masks.sum(1).numpy()),
    'gradients': both(first(calls[0].grad, masks)),
  }
  if len(calls) == 2:
    record['ref_logps'] = both(sum_over(calls[1], masks))
  return record


def sum_over(logprobs, mask):
  return (logprobs.detach() * mask).sum(1).numpy()


def first(gradients, mask):
  """Returns the gradient of each row at its first token, which all tokens share."""
  gradients = gradients.numpy()
  rows = np.arange(len(gradients))
  found = gradients[rows, mask.numpy().argmax(1)]
  np.testing.assert_allclose(gradients, np.where(mask, found[:, None], 0.0), rtol=1e-4, atol=1e-7)
  return found


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  default = pathlib.Path(__file__).with_name('trl_dpo.npz')
  parser.add_argument('--out', type=pathlib.Path, default=default)
  out = parser.parse_args().out
  torch.set_num_threads(1)
  arrays = {
    'versions': json.dumps({p.__name__: p.__version__ for p in (trl, torch, transformers)}),
    'settings': json.dumps({name: settings for name, (*_, settings) in CASES.items()}),
  }
  for name in CASES:
    with tempfile.TemporaryDirectory() as workdir:
      record = run_case(name, pathlib.Path(workdir))
    for key, value in record.items():
      value = np.array(value)
      arrays[f'{name}/{key}'] = value.astype(np.float32) if value.dtype.kind == 'f' else value
    print(name, {key: float(record[key]) for key in ('loss', *METRICS) if key in record})
  np.savez_compressed(out, **arrays)
  print(f'{out}: {out.stat().st_size / 1024:.0f} KB, {len(arrays)} arrays')


if __name__ == '__main__':
  main()
