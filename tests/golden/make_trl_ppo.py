"""Write trl_ppo.npz: one full update of TRL's PPOTrainer, to compare ours with.

    pip install "trl==1.12.0" "torch==2.13.0" "transformers==5.23.0" accelerate datasets pandas
    python tests/golden/make_trl_ppo.py [--out FILE]

Only this script needs torch and TRL; the test reads the .npz with NumPy. TRL 1.12 is the last
release with a PPOTrainer (`trl.experimental.ppo`). Its `train()` runs unchanged: a fixed rollout
replaces generation, `np.random.permutation` is recorded, and the trainer's `log` reads the local
variables of `train()` after the update.

Letters: B batch, P prompt length, R response length, E epochs, M minibatches.

Contents of the file. Both cases share models, prompts and responses; C is a case's name.
  cases            names: "plain" (k1, missing EOS, two minibatches), "whitened" (k3, whitened
                   rewards, one minibatch, gamma < 1);  C/settings: JSON text, hyperparameters
  versions, config, reward_config   JSON texts; the latter two hold fields of a Hugging Face
                   config.json (tiny Llama, grouped-query attention, untied)
  policy/*, reference/*, value/*, reward/*    parameters before the update, by HF tensor name
  queries [B, P]   left-padded prompts;  responses [B, R]: right-padded, EOS kept
  C/raw_scores [B] reward model at the last real token;  C/scores [B]: minus the EOS penalty
  C/logprobs, ref_logprobs, values, rewards, advantages, returns, kl    [B, R], padded as in TRL
  C/padding_mask, padding_mask_p1    [B, R] bool, True where TRL ignores
  C/permutations [E, B]    rows in the order of each epoch; minibatch m is the m-th of M blocks
  C/pg_loss, vf_loss, approxkl, clipfrac, vf_clipfrac, entropy, ratio    [E, M], as TRL has them
  C/metrics        JSON text of what TRL logs for the iteration
  C/policy_after/*, C/value_after/*  parameters after the update

Conventions of TRL 1.12, from its source, and checked by these numbers:
  * Tokens. Left-padded prompts, attention mask `token != pad` (so pad must differ from EOS),
    positions are the exclusive cumulative sum of the mask. The stop token is kept in the
    response; padding follows it. PPO trains on the truncated response.
  * Temperature. Sampling, reference and loss divide logits by T + 1e-7. Behaviour logprobs come
    from the sampler's (temperature-scaled) logits, here by the same forward pass as in training,
    so that the first ratio is 1.
  * Two masks. `padding_mask` hides what follows the last real token: it serves the policy loss,
    advantage whitening and the logged entropy. `padding_mask_p1` leaves one more slot, the state
    after the last real token, if it fits in R: it serves the value loss, the value clip fraction
    and reward whitening. The value at slot t is that of the state before token t, so the extra
    slot holds the value of the finished text.
  * Score. Added at the first slot after the last real token if that is < R, else at the last real
    token (a response of full length, with or without EOS). So the score of a short response comes
    one step after its EOS, and affects the policy loss only through GAE.
  * Missing EOS. `scores -= penalty` where the response holds no EOS: subtract, not replace.
  * KL. k1 = logp - ref_logp or k3 = exp(-k1) - 1 + k1. Padded logprobs are set to 1.0 on both
    sides and so give 0. reward = -kl_coef * kl (+ score).
  * Whitening. (x - mean) * rsqrt(var + 1e-8), Bessel-corrected. Rewards: mean added back, then
    0 at padding. Advantages: once over the whole rollout, mean not added back.
  * GAE over all R slots; rewards and values beyond `padding_mask_p1` are 0, the value after slot
    R - 1 is 0. returns = advantages before whitening + values.
  * Losses are means over the unmasked slots of the minibatch. Policy: the larger of two negated
    products. Value: half the mean of the larger of two squares, clipped around the old values.
    Total: policy + vf_coef * value. Gradient accumulation would give a mean of the microbatches'
    means; here a minibatch is one microbatch, and each takes a step.
  * Optimizer. One AdamW over policy and value model, betas 0.9/0.999, eps 1e-8, no weight decay;
    its rate is constant within an iteration. Gradients are NOT clipped: `train()` never reads
    `max_grad_norm` (1e-3 below, which would change the result).
  * Logged without a mask: approxkl, ratio and policy/entropy_avg are means over all B * R slots,
    including padding, where the log-ratio is 0 and the entropy is the model's at padding tokens.
    clipfrac, vf_clipfrac and objective/entropy are masked; objective/kl is the sum over a
    response, then the mean over B.
  * Heads. `score` of LlamaForSequenceClassification has no bias.
"""

import argparse
import inspect
import json
import pathlib
import tempfile
import unittest.mock

import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl
from trl.experimental.ppo import ppo_trainer
from trl.experimental.ppo import PPOConfig
from trl.experimental.ppo import PPOTrainer

PAD, BOS, EOS, VOCAB = 0, 1, 2, 31
B, R = 16, 7
PROMPT_LENGTHS = [1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 3, 5, 2, 4, 1, 5]
# Length of a response and whether it has an EOS: EOS only, early, in the last slot, or no EOS.
RESPONSES = [
  (1, True),
  (2, True),
  (3, True),
  (7, True),
  (7, False),
  (5, True),
  (6, True),
  (7, False),
  (4, True),
  (7, True),
  (3, True),
  (7, False),
  (5, True),
  (6, True),
  (7, False),
  (2, True),
]
MODEL = dict(
  vocab_size=VOCAB,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=32,
  tie_word_embeddings=False,
  initializer_range=0.25,
  pad_token_id=PAD,
  bos_token_id=BOS,
  eos_token_id=EOS,
)
COMMON = dict(kl_coef=0.05, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, learning_rate=1e-3)
CASES = {
  'plain': COMMON
  | dict(
    num_ppo_epochs=2,
    num_mini_batches=2,
    temperature=0.7,
    missing_eos_penalty=1.0,
    whiten_rewards=False,
    kl_estimator='k1',
    gamma=1.0,
    lam=0.95,
  ),
  'whitened': COMMON
  | dict(
    num_ppo_epochs=4,
    num_mini_batches=1,
    temperature=1.3,
    missing_eos_penalty=None,
    whiten_rewards=True,
    kl_estimator='k3',
    gamma=0.97,
    lam=0.9,
  ),
}
PER_TOKEN = ('logprobs', 'ref_logprobs', 'values', 'rewards', 'advantages', 'returns', 'kl')
MASKS = ('padding_mask', 'padding_mask_p1')
PER_MINIBATCH = {
  'pg_loss': 'pg_loss_stats',
  'vf_loss': 'vf_loss_stats',
  'approxkl': 'approxkl_stats',
  'clipfrac': 'pg_clipfrac_stats',
  'vf_clipfrac': 'vf_clipfrac_stats',
  'entropy': 'entropy_stats',
  'ratio': 'ratio_stats',
}


class RecordingTrainer(PPOTrainer):
  """A PPOTrainer that copies the local variables of its `train()` when it logs."""

  def log(self, metrics, *args, **kwargs):
    seen = inspect.currentframe().f_back.f_locals
    whole = ('queries', 'responses', 'scores')
    names = (*PER_TOKEN, *MASKS, *PER_MINIBATCH.values(), *whole)
    self.record = {name: seen[name].clone() for name in names}
    timing = ('eps', 'episode')
    self.record['metrics'] = {k: float(v) for k, v in metrics.items() if k not in timing}


def make_models():
  """Returns a policy, a reference near it, a value model and a reward model; all are random."""
  config = transformers.LlamaConfig(**MODEL, attn_implementation='eager')
  scalar = transformers.LlamaConfig(**MODEL, num_labels=1, attn_implementation='eager')
  torch.manual_seed(0)
  policy = transformers.LlamaForCausalLM(config)
  reference = transformers.LlamaForCausalLM(config)
  value = transformers.LlamaForSequenceClassification(scalar)
  reward = transformers.LlamaForSequenceClassification(scalar)
  with torch.no_grad():
    for near, exact in zip(reference.parameters(), policy.parameters(), strict=True):
      near.copy_(exact + 0.05 * torch.randn_like(exact))
    for model in (policy, reference, value, reward):
      for name, parameter in model.named_parameters():
        if 'norm' in name:  # not all 1, so that an omitted weight changes the result
          parameter.add_(0.1 * torch.randn_like(parameter))
  return {'policy': policy, 'reference': reference, 'value': value, 'reward': reward}


def make_rollout():
  """Returns prompts (a list of lists) and responses [B, R] with padding after the EOS."""
  rng = np.random.default_rng(1)
  prompts = [[BOS, *rng.integers(3, VOCAB, n - 1).tolist()] for n in PROMPT_LENGTHS]
  responses = np.full((B, R), PAD)
  for row, (length, ends) in zip(responses, RESPONSES, strict=True):
    row[:length] = rng.integers(3, VOCAB, length)
    if ends:
      row[length - 1] = EOS
  return prompts, torch.tensor(responses)


def make_tokenizer():
  words = {'<pad>': PAD, '<bos>': BOS, '<eos>': EOS} | {f't{i}': i for i in range(3, VOCAB)}
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<pad>'))
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=model,
    pad_token='<pad>',
    bos_token='<bos>',
    eos_token='<eos>',
    padding_side='left',
  )


def run_case(settings, workdir):
  """Runs one update by TRL; returns what the trainer recorded and the parameters after it."""
  models, (prompts, responses) = make_models(), make_rollout()
  orders = []

  def fixed_generation(model, queries, rows, pad_token_id, generation_config):
    tokens = torch.cat([queries, responses], 1)
    logits = ppo_trainer.forward(model, tokens, pad_token_id).logits
    logits = logits[:, queries.shape[1] - 1 : -1]
    return tokens, logits / generation_config.temperature

  permutation = np.random.permutation

  def recorded_permutation(n):
    orders.append(permutation(n))
    return orders[-1]

  args = PPOConfig(
    output_dir=workdir,
    total_episodes=B,
    per_device_train_batch_size=B,
    gradient_accumulation_steps=1,
    local_rollout_forward_batch_size=B,
    response_length=R,
    stop_token='eos',
    num_sample_generations=0,
    lr_scheduler_type='constant',
    max_grad_norm=1e-3,
    seed=3,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    report_to='none',
    save_strategy='no',
    disable_tqdm=True,
    **settings,
  )
  data = datasets.Dataset.from_dict({'input_ids': prompts})
  trainer = RecordingTrainer(
    args=args,
    processing_class=make_tokenizer(),
    train_dataset=data,
    eval_dataset=data,
    model=models['policy'],
    ref_model=models['reference'],
    reward_model=models['reward'],
    value_model=models['value'],
  )
  np.random.seed(4)
  with (
    unittest.mock.patch.object(ppo_trainer, 'batch_generation', fixed_generation),
    unittest.mock.patch.object(np.random, 'permutation', recorded_permutation),
  ):
    trainer.train()
  group = trainer.optimizer.param_groups[0]
  print('optimizer', {k: group[k] for k in ('lr', 'betas', 'eps', 'weight_decay')})
  return trainer.record, np.stack(orders), models


def parameters(model, prefix):
  """Returns every tensor of a model by its Hugging Face name."""
  return {f'{prefix}/{name}': x.numpy().copy() for name, x in model.state_dict().items()}


def case_arrays(name):
  """Runs a case; returns its arrays by their names in the file."""
  settings = CASES[name]
  with tempfile.TemporaryDirectory() as workdir:
    record, orders, after = run_case(settings, workdir)
  for key, value in record['metrics'].items():
    print(f'{name}: {key} = {value:.6g}')
  ended = (record['responses'] == EOS).any(1).numpy()
  penalty = np.where(ended, 0.0, settings['missing_eos_penalty'] or 0.0).astype(np.float32)
  arrays = {
    'settings': json.dumps(settings),
    'metrics': json.dumps(record['metrics']),
    'permutations': orders.astype(np.int32),
    'scores': record['scores'].numpy(),
    'raw_scores': record['scores'].numpy() + penalty,
  }
  arrays |= {key: record[key].numpy() for key in (*PER_TOKEN, *MASKS)}
  arrays |= {key: record[local][..., 0].numpy() for key, local in PER_MINIBATCH.items()}
  arrays |= parameters(after['policy'], 'policy_after')
  arrays |= parameters(after['value'], 'value_after')
  arrays = {f'{name}/{key}': value for key, value in arrays.items()}
  shared = {key: record[key].numpy().astype(np.int32) for key in ('queries', 'responses')}
  return arrays, shared


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  default = pathlib.Path(__file__).with_name('trl_ppo.npz')
  parser.add_argument('--out', type=pathlib.Path, default=default)
  out = parser.parse_args().out
  torch.set_num_threads(1)
  packages = (trl, torch, transformers)
  arrays = {
    'versions': json.dumps({p.__name__: p.__version__ for p in packages}),
    'config': json.dumps({'model_type': 'llama', **MODEL}),
    'reward_config': json.dumps({'model_type': 'llama', **MODEL, 'num_labels': 1}),
    'cases': list(CASES),
  }
  for role, model in make_models().items():
    arrays |= parameters(model, role)
  for name in CASES:
    own, shared = case_arrays(name)
    for key, value in shared.items():  # with this seed, all cases shuffle prompts alike
      assert np.array_equal(arrays.setdefault(key, value), value)
    arrays |= own
  np.savez_compressed(out, **arrays)
  print(f'{out}: {out.stat().st_size / 1024:.0f} KB, {len(arrays)} arrays')


if __name__ == '__main__':
  main()
