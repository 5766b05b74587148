"""Stages that the experiments on the generated reviews of the quickstart share. Not a config."""

import ml_collections
import quickstart

from rlhf_jax.algorithms import sft as sft_lib

base = quickstart.base  # the keys that all training stages share


def world(eval_prompts=512):
  """Returns the stage that writes texts, prompts and the tokenizer."""
  stage = quickstart.world()
  stage.eval_prompt_count = eval_prompts
  return stage


def pretrain(width=96, layers=3, heads=4):
  """Returns the pretraining stage of a Llama of some size, on the packed corpus."""
  stage = base(sft_lib.config(), None)
  stage.model.init = ml_collections.ConfigDict(
    {
      'family': 'llama',
      'hidden_size': width,
      'intermediate_size': 3 * width,
      'num_hidden_layers': layers,
      'num_attention_heads': heads,
      'num_key_value_heads': heads // 2,
      'max_position_embeddings': 64,
      'tie_word_embeddings': True,
      'rms_norm_eps': 1e-5,
    }
  )
  stage.data.update({'path': '$workdir/world/corpus.jsonl', 'max_length': 64, 'held_out': 0.01})
  stage.batch_size, stage.steps = 24, 600
  stage.optim.update({'learning_rate': 3e-3, 'schedule': 'cosine', 'warmup_steps': 20})
  return stage


def sft(model='$workdir/pretrain/model', epochs=2.0):
  """Returns the SFT stage of the initial policy, on demonstrations."""
  stage = base(sft_lib.config(), model)
  stage.data.update(
    {'path': '$workdir/world/demonstrations.jsonl', 'kind': 'completion', 'max_length': 48}
  )
  stage.batch_size, stage.data.epochs = 64, epochs
  stage.optim.update({'learning_rate': 5e-4, 'schedule': 'cosine', 'warmup_steps': 5})
  return stage
