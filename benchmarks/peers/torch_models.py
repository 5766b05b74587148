"""Random GPT-2 models and the clock, for the peers that run on PyTorch."""

import torch
import transformers

from benchmarks.peers import protocol


def language_model(w):
  """Creates the policy or reference of a workload, without an EOS, so no response ends early."""
  config = transformers.GPT2Config(**w.gpt2, bos_token_id=None, eos_token_id=None)
  return transformers.GPT2LMHeadModel(config)


def scalar_model(w):
  """Creates the critic or reward model of a workload."""
  config = transformers.GPT2Config(**w.gpt2, num_labels=1, bos_token_id=None, eos_token_id=None)
  return transformers.GPT2ForSequenceClassification(config)


def turns(options):
  """Returns the protocol.Turns of a process that computes with PyTorch."""
  torch.set_num_threads(options.threads)
  torch.manual_seed(0)
  if options.device == 'cpu':
    return protocol.Turns()
  return protocol.Turns(wait=torch.cuda.synchronize, device_peak=torch.cuda.max_memory_allocated)
