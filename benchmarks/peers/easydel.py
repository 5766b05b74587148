"""Runs EasyDeL's PPOTrainer (0.3) on a workload.

python -m benchmarks.peers.easydel --workload xs

It runs the trainer's `train()` on prompts in memory with its compiled generation. The trainer runs
one epoch whatever `num_ppo_epochs` is, and its value head shares the policy's trunk, so it does a
fraction of the other peers' work. EasyDeL has no GPT-2 reward model. We use its Llama instead, with
the same attention heads, tied embeddings, and a gated feed-forward layer of two thirds of the
width, which has as many weights and FLOPs.

Times: the rollout is `generate_unified`, scoring is the rest of `_preprocess_batch_input`, and the
update is the rest of `_execute_train_step`. Tuned in its favour: no filtering in the sampler, no
logging, no checkpoints, and the glibc allocator settings of benchmarks/run.py.
"""

import tempfile

import datasets
import easydel
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import transformers

from benchmarks import workloads
from benchmarks.peers import jax_device
from benchmarks.peers import protocol


def make_tokenizer(vocab):
  """Creates a tokenizer with a word for every id, and an EOS that models cannot sample."""
  words = {f't{i}': i for i in range(vocab - 1)} | {'<pad>': vocab - 1, '<eos>': vocab}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<pad>'))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token='<pad>', eos_token='<eos>', padding_side='left'
  )


def make_model(kind, w, seed, device):
  """Creates a random Llama with as many weights and FLOPs as a workload's GPT-2."""
  config = easydel.LlamaConfig(
    vocab_size=w.vocab,
    hidden_size=w.width,
    intermediate_size=16 * round(w.mlp / 24),
    num_hidden_layers=w.layers,
    num_attention_heads=w.heads,
    num_key_value_heads=w.heads,
    head_dim=w.width // w.heads,
    max_position_embeddings=w.length,
    tie_word_embeddings=True,
    eos_token_id=w.vocab,
    pad_token_id=w.vocab - 1,
    num_labels=1,
  )
  dtype = jnp.float32 if device == 'cpu' else jnp.bfloat16
  model = kind(config=config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(seed))
  model.generation_config = transformers.GenerationConfig(
    eos_token_id=w.vocab, pad_token_id=w.vocab - 1
  )
  return model


def make_trainer(w, device, workdir):
  """Creates a PPOTrainer with random models and prompts, and no limit of steps."""
  rows = np.random.default_rng(0).integers(0, w.vocab - 1, (16 * w.batch, w.prompt))
  data = datasets.Dataset.from_dict(
    {'input_ids': rows.tolist(), 'attention_mask': np.ones_like(rows).tolist()}
  )
  tokenizer = make_tokenizer(w.vocab)
  arguments = easydel.PPOConfig(
    save_directory=workdir,
    total_batch_size=w.batch,
    num_train_epochs=10**6,
    max_training_steps=10**6,
    max_prompt_length=w.prompt,
    max_completion_length=w.response,
    num_ppo_epochs=workloads.EPOCHS,
    kl_coef=workloads.KL_COEF,
    cliprange=workloads.CLIP,
    cliprange_value=workloads.VALUE_CLIP,
    vf_coef=workloads.VALUE_COEF,
    gamma=workloads.GAMMA,
    lam=workloads.LAM,
    temperature=1.0,
    top_p=1.0,
    top_k=None,
    generation_top_p=1.0,
    generation_top_k=0,
    generation_do_sample=True,
    use_esurge_generation=False,
    learning_rate=workloads.LEARNING_RATE,
    report_metrics=False,
    use_wandb=False,
    do_last_save=False,
    save_optimizer_state=False,
    track_memory=False,
    log_steps=10**6,
    report_steps=10**6,
    progress_bar_type='json',
  )
  return easydel.PPOTrainer(
    arguments=arguments,
    model=make_model(easydel.LlamaForCausalLM, w, 0, device),
    reward_funcs=make_model(easydel.LlamaForSequenceClassification, w, 1, device),
    train_dataset=data,
    processing_class=tokenizer,
    reward_processing_classes=tokenizer,
  )


def take_times(trainer, turns):
  """Patches the trainer's methods so that they wait for their turn and time the parts."""
  generate, preprocess, step = (
    trainer.generate_unified,
    trainer._preprocess_batch_input,
    trainer._execute_train_step,
  )

  def timed_generate(*args, **kwargs):
    out = jax.block_until_ready(generate(*args, **kwargs))
    turns.lap('rollout')
    return out

  def timed_preprocess(*args, **kwargs):
    out = jax.block_until_ready(preprocess(*args, **kwargs))
    turns.lap('scoring')
    return out

  def timed_step(*args, **kwargs):
    turns.wait()
    state, metrics, error = step(*args, **kwargs)
    if error is not None:
      raise error
    turns.lap('update')
    turns.report()
    return state, metrics, None

  trainer.generate_unified, trainer._preprocess_batch_input = timed_generate, timed_preprocess
  trainer._execute_train_step = timed_step


def main():
  options = protocol.arguments(__doc__)
  turns = protocol.Turns(device_peak=jax_device.peak)
  with tempfile.TemporaryDirectory() as workdir:
    trainer = make_trainer(options.workload, options.device, workdir)
    take_times(trainer, turns)
    turns.ready(
      protocol.versions('easydel', 'jax', 'flax'),
      epochs=1,
      note='always one epoch, value head on the trunk; Llama with as many weights and FLOPs',
    )
    trainer.train()


if __name__ == '__main__':
  main()
