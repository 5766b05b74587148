"""Random GPT-2 models and the clock of the peers that run on torch."""

import torch
import transformers

from benchmarks.peers import protocol


def language_model(w):
  """Policy or reference of a workload; it has no EOS, so nothing ends early."""
  config = transformers.GPT2Config(**w.gpt2, bos_token_id=None, eos_token_id=None)
  return transformers.GPT2LMHeadModel(config)


def scalar_model(w):
  """Critic or reward model of a workload."""
  config = transformers.GPT2Config(**w.gpt2, num_labels=1, bos_token_id=None, eos_token_id=None)
  return transformers.GPT2ForSequenceClassification(config)


def turns(options):
  """protocol.Turns of a process that computes with torch."""
  torch.set_num_threads(options.threads)
  torch.manual_seed(0)
  if options.device == 'cpu':
    return protocol.Turns()
  return protocol.Turns(wait=torch.cuda.synchronize, device_peak=torch.cuda.max_memory_allocated)
