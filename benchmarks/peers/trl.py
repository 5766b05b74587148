"""Runs TRL's PPOTrainer (`trl.experimental.ppo` of 1.12, the last release with one) on a workload.

python -m benchmarks.peers.trl --workload xs

It runs the trainer's `train()` on prompts in memory. Times: the rollout is `batch_generation`,
scoring lasts from there until the first epoch draws its permutation, and the update ends when the
loop requests the next prompts. TRL computes the behaviour policy's log-probabilities from the
logits of generation, so its scoring has one forward pass less than ours.

Tuned in its favour: all sequences in one pass, the glibc allocator settings of benchmarks/run.py,
no dropout, no logging to disk, TRL's default attention (sdpa) and default `use_cache`. On a GPU,
policy and critic have float32 weights and run under autocast to bfloat16. So does generation, which
TRL would run in float32. The frozen models are in bfloat16. The trainer's Accelerator ignores
`bf16=True` and reads the environment, so we also set the environment.
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
  """Wraps the trainer's dataloader, and waits for the peer's turn before each batch."""

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
  """Creates a tokenizer whose padding and EOS are outside of the models' vocabulary.

  So prompts do not contain them and responses do not end.
  """
  words = {'<pad>': vocab, '<eos>': vocab + 1}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<pad>'))
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token='<pad>', eos_token='<eos>', padding_side='left'
  )


def make_trainer(w, device, workdir):
  """Creates a PPOTrainer with random models and prompts, and practically no limit of episodes."""
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
