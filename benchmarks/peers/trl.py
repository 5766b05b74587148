"""TRL's PPOTrainer (`trl.experimental.ppo` of 1.12, the last release that has one) on a workload.

python -m benchmarks.peers.trl --workload xs

Its own `train()`, on prompts in memory. The clock: generation is `batch_generation`; scoring is
what follows until the first epoch draws its permutation; the update ends where the loop asks for
the next prompts. The behaviour's log-probabilities come from the logits of generation, so scoring
has one forward pass less than ours.

Tuned in its favour: all rows in one pass, glibc's allocator as benchmarks/run.py sets it, dropout
off, no logging to disk, TRL's own default attention (sdpa), `use_cache` as it is. On a GPU policy
and critic have float32 weights and run under autocast to bfloat16, generation too, which TRL leaves
in float32; the frozen models are bfloat16. `bf16=True` alone would not reach the trainer's own
Accelerator: it reads the environment.
"""

import os
import tempfile
import unittest.mock

import datasets
import numpy as np
import tokenizers
import torch
import transformers
from trl.experimental.ppo import ppo_trainer
from trl.experimental.ppo import PPOConfig
from trl.experimental.ppo import PPOTrainer

from benchmarks import workloads
from benchmarks.peers import protocol
from benchmarks.peers import torch_models


class Prompts:
  """The trainer's dataloader, which waits for its turn before each batch."""

  def __init__(self, loader, turns):
    self._loader, self._turns = loader, turns
    self._begun = False

  def __iter__(self):
    for batch in self._loader:
      if self._begun:
        self._turns.lap('update')
        self._turns.report()
      self._begun = True
      self._turns.wait()
      yield batch


def make_tokenizer(vocab):
  """Padding and EOS lie outside of the vocabulary: no prompt has them and no response ends."""
  words = {'<pad>': vocab, '<eos>': vocab + 1}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<pad>'))
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token='<pad>', eos_token='<eos>', padding_side='left'
  )


def make_trainer(w, device, workdir):
  """PPOTrainer with random models and prompts, set to run on."""
  rows = w.rows or w.batch
  if device != 'cpu':
    os.environ['ACCELERATE_MIXED_PRECISION'] = 'bf16'
  args = PPOConfig(
    output_dir=workdir,
    total_episodes=10**6 * w.batch,
    per_device_train_batch_size=rows,
    gradient_accumulation_steps=w.batch // rows,
    num_mini_batches=1,
    local_rollout_forward_batch_size=w.batch,
    num_ppo_epochs=workloads.EPOCHS,
    response_length=w.response,
    temperature=1.0,
    stop_token=None,
    missing_eos_penalty=None,
    kl_coef=workloads.KL_COEF,
    cliprange=workloads.CLIP,
    cliprange_value=workloads.VALUE_CLIP,
    vf_coef=workloads.VALUE_COEF,
    gamma=workloads.GAMMA,
    lam=workloads.LAM,
    learning_rate=workloads.LEARNING_RATE,
    lr_scheduler_type='constant',
    num_sample_generations=0,
    use_cpu=device == 'cpu',
    bf16=device != 'cpu',
    gradient_checkpointing=False,
    report_to='none',
    save_strategy='no',
    disable_tqdm=True,
  )
  prompts = np.random.default_rng(0).integers(0, w.vocab, (16 * w.batch, w.prompt))
  data = datasets.Dataset.from_dict({'input_ids': prompts.tolist()})
  with torch.device('cpu' if device == 'cpu' else 'cuda'):
    policy, reference = (torch_models.language_model(w) for _ in range(2))
    reward, critic = (torch_models.scalar_model(w) for _ in range(2))
  reference.load_state_dict(policy.state_dict())
  if device != 'cpu':
    reference.to(torch.bfloat16), reward.to(torch.bfloat16)
  return PPOTrainer(
    args=args,
    processing_class=make_tokenizer(w.vocab),
    train_dataset=data,
    eval_dataset=data,
    model=policy,
    ref_model=reference,
    reward_model=reward,
    value_model=critic,
  )


def main():
  options = protocol.arguments(__doc__)
  turns = torch_models.turns(options)
  generation, permutation = ppo_trainer.batch_generation, np.random.permutation
  epochs = 0

  def timed_generation(*args, **kwargs):
    with torch.autocast('cuda', torch.bfloat16, enabled=options.device != 'cpu'):
      out = generation(*args, **kwargs)
    turns.lap('rollout')
    return out

  def timed_permutation(rows):
    nonlocal epochs
    if epochs % workloads.EPOCHS == 0:
      turns.lap('scoring')
    epochs += 1
    return permutation(rows)

  with tempfile.TemporaryDirectory() as workdir:
    trainer = make_trainer(options.workload, options.device, workdir)
    trainer.log = lambda metrics, *args, **kwargs: None
    trainer.dataloader = Prompts(trainer.dataloader, turns)
    with (
      unittest.mock.patch.object(ppo_trainer, 'batch_generation', timed_generation),
      unittest.mock.patch.object(np.random, 'permutation', timed_permutation),
    ):
      turns.ready(protocol.versions('trl', 'torch', 'transformers'))
      trainer.train()


if __name__ == '__main__':
  main()
