"""Write trl_grpo.npz: updates of TRL's GRPOTrainer, to compare our advantages and losses with.

    pip install "trl==1.12.0" "torch==2.13.0" "transformers==5.23.0" accelerate datasets \
        pandas requests
    python tests/golden/make_trl_grpo.py [--out FILE]

Only this script needs torch and TRL; the test reads the .npz with NumPy. TRL's `train()` runs
unchanged. Responses, masks and scores enter through its `rollout_func`. A subclass records what
`_compute_loss` reads and returns, and differentiates that loss by the logprobs.

Letters: B batch of a generation (n responses of each prompt), R response length, S calls of
`_compute_loss` (2 iterations over the batch, each in several microbatches), b rows of each.

Contents of the file. All cases share model, reference, prompts and responses; C is a case's name.
  versions         JSON text
  settings         JSON text {C: hyperparameters}, with TRL's names; shared ones are repeated.
                   `per_device_train_batch_size` is b, `gradient_accumulation_steps`
                   microbatches are a minibatch, `steps_per_generation` microbatches an iteration
  scores [B]       of five groups; those of the second are equal, of the third 0 or 1
  mask [B, R]      bool; it has holes (tokens of an environment), and one row is empty
  old_logprobs, ref_logprobs [B, R]    before the first update; not 0 under the mask
  advantages_group, advantages_batch, advantages_none [B]    for each `scale_rewards`
  C/rows [S, b]    rows of the batch in each microbatch, shuffled by TRL
  C/logprobs, C/gradients [S, b, R]    of the policy, and d loss / d logprobs
  C/loss [S]       returned by `_compute_loss`
  C/kl, C/clip_low, C/clip_high [S]    logged: mean over tokens of the KL (0 without beta), and
                   fractions of tokens clipped from below and above, with 'sequence' of sequences
  overlong_settings, overlong_lengths, overlong_penalty    `get_soft_overlong_punishment`

Conventions of TRL 1.12, from its source, and checked by these numbers:
  * Advantages. Score minus the mean of its group, then / (std + 1e-4) with Bessel's correction.
    'batch' is the standard deviation of all scores of the generation batch, before the means of
    the groups are subtracted. Groups of equal scores are kept, and counted in the metric
    `frac_reward_zero_std`. There is no dynamic sampling as in DAPO.
  * Ratio. 'sequence' is GSPO's, length-normalized over the mask. 'sequence_token' exists in
    `trl.experimental.gspo_token` only. Old logprobs are those of the training forward pass;
    without an off-policy step they are the current ones, detached.
  * Clip. `epsilon_high` defaults to `epsilon`. `delta` caps the unclipped ratio, for either sign
    of the advantage; above 1 + epsilon_high it has an effect only on negative ones (dual clip).
  * KL. k3, added per token under the same mean as the policy loss. By default
    (`use_bias_correction_kl`) it is multiplied by the ratio, through which the gradient flows:
    DeepSeek-V3.2, not DeepSeekMath. With 'sequence' that is the sequence's ratio. Neither the
    clip nor `delta` affects this ratio. GSPO-token's trainer never multiplies. The logged `kl` is
    multiplied too.
  * Means. 'grpo': over the tokens of each sequence, then over all sequences, where an empty one
    counts with loss 0. 'bnpo': over the tokens of each microbatch, then over microbatches, so it
    depends on how a minibatch is split. 'dr_grpo': over sequences times `max_completion_length`,
    whatever the longest response is. 'dapo': over the tokens of the whole generation batch,
    scaled to a minibatch's part of the rows; minibatches with more tokens than others weigh
    more. With one minibatch an iteration it is the mean over tokens.
  * 'cispo' multiplies log p by the ratio, detached and at most `epsilon_high` itself, where other
    losses clip at 1 + `epsilon_high`; its mean is that of 'dapo'. 'sapo' has a sigmoid of the ratio
    in place of the clip, and the mean of 'grpo'. 'luspo' is GSPO's loss times the length of the
    sequence, averaged over sequences.
  * 'sequence' with 'bnpo', 'dr_grpo' or 'dapo' counts a sequence's one loss once per token; TRL
    warns about it. Only 'grpo' gives GSPO's objective.
  * Gradient accumulation. Each returned loss is the microbatch's part of the minibatch's, already
    divided; transformers is kept from dividing again.
"""

import argparse
import json
import pathlib
import tempfile

import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl
from trl.experimental import gspo_token
from trl.rewards import get_soft_overlong_punishment

PAD, BOS, EOS, VOCAB = 0, 1, 2, 31
PROMPTS, N, R, MAX_LENGTH = 5, 4, 8, 11
B = PROMPTS * N
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
WHOLE = dict(per_device_train_batch_size=B, gradient_accumulation_steps=1, steps_per_generation=1)
SPLIT = dict(
  per_device_train_batch_size=B // 4, gradient_accumulation_steps=2, steps_per_generation=4
)
COMMON = dict(
  scale_rewards='group',
  beta=0.0,
  use_bias_correction_kl=False,
  delta=None,
  num_generations=N,
  num_iterations=2,
  max_completion_length=MAX_LENGTH,
  learning_rate=2e-2,
)
TOKEN = COMMON | dict(importance_sampling_level='token', epsilon=0.2, epsilon_high=0.28)
SEQUENCE = COMMON | dict(importance_sampling_level='sequence', epsilon=0.1, epsilon_high=0.15)


def make_cases():
  """Returns {name of a case: settings}."""
  cases = {}
  for loss_type in ('grpo', 'bnpo', 'dr_grpo', 'dapo'):
    for settings in (TOKEN, SEQUENCE):
      base = settings | dict(loss_type=loss_type)
      name = f'{loss_type}-{settings["importance_sampling_level"]}'
      cases[name] = base | WHOLE
      cases[f'{name}-kl'] = base | WHOLE | dict(beta=0.1)
      cases[f'{name}-kl-ratio'] = base | WHOLE | dict(beta=0.1, use_bias_correction_kl=True)
      cases[f'{name}-split'] = base | SPLIT | dict(beta=0.1)
  for scale in ('batch', 'none'):
    cases[f'scale-{scale}'] = TOKEN | WHOLE | dict(loss_type='grpo', scale_rewards=scale)
  cases['delta'] = TOKEN | WHOLE | dict(loss_type='dapo', delta=1.4)
  cispo = TOKEN | dict(loss_type='cispo', epsilon_high=1.1)
  cases['cispo'] = cispo | WHOLE
  cases['cispo-split'] = cispo | SPLIT | dict(beta=0.1)
  cases['sapo'] = TOKEN | WHOLE | dict(loss_type='sapo', sapo_temperature_neg=1.3)
  cases['luspo'] = SEQUENCE | WHOLE | dict(loss_type='luspo')
  per_token = SEQUENCE | dict(importance_sampling_level='sequence_token', loss_type='grpo')
  cases['gspo-token'] = per_token | WHOLE
  cases['gspo-token-kl'] = per_token | WHOLE | dict(beta=0.1)
  return cases


def make_data():
  """Returns the prompts (a list of lists), responses, masks and scores of one generation."""
  rng = np.random.default_rng(1)
  prompts = [[BOS, *rng.integers(3, VOCAB, n).tolist()] for n in (1, 4, 2, 3, 5)]
  lengths = rng.integers(1, R, B)
  lengths[[3, 9]] = R
  responses = [rng.integers(3, VOCAB, n - 1).tolist() + [EOS] for n in lengths]
  mask = (np.arange(R) < lengths[:, None]) & (rng.random((B, R)) < 0.8)
  mask[np.arange(B), lengths - 1] = True
  mask[6] = False
  scores = rng.normal(size=B)
  scores[4:8] = 0.3
  scores[8:12] = [1, 0, 0, 1]
  return prompts, responses, mask, scores.astype(np.float32)


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


def rollout(prompts, trainer):
  """TRL's `rollout_func`: returns the fixed responses, with masks and scores."""
  del trainer
  queries, responses, mask, scores = make_data()
  assert len(prompts) == B
  return {
    'prompt_ids': [queries[i // N] for i in range(B)],
    'completion_ids': responses,
    'logprobs': None,
    'env_mask': [row[: len(r)].astype(int).tolist() for row, r in zip(mask, responses)],
    'score': scores.tolist(),
  }


def recording(trainer_class):
  """Returns the trainer's class, extended to record the inputs and outputs of its loss."""

  class Recording(trainer_class):
    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      self.record, self.batch = [], None

    def _generate_and_score_completions(self, inputs):
      output = super()._generate_and_score_completions(inputs)
      self.batch = {k: v.clone() for k, v in output.items()}
      return output | {'rows': torch.arange(B)}  # shuffled and split like the rest

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
      output = super()._get_per_token_logps_and_entropies(*args, **kwargs)
      self.logprobs = output[0]
      return output

    def _compute_loss(self, model, inputs):
      loss = super()._compute_loss(model, inputs)
      (gradient,) = torch.autograd.grad(loss, self.logprobs, retain_graph=True)
      logged = {'kl': 'kl', 'clip_low': 'clip_ratio/low_mean', 'clip_high': 'clip_ratio/high_mean'}
      metrics = {k: (self._metrics['train'].get(v) or [0.0])[-1] for k, v in logged.items()}
      self.record.append(
        metrics
        | {
          'rows': inputs['rows'].numpy().astype(np.int32),
          'loss': loss.item(),
          'logprobs': self.logprobs.detach().numpy().copy(),
          'gradients': gradient.numpy(),
        }
      )
      return loss

  return Recording


def make_model(workdir):
  """Returns a folder with the tiny policy; TRL needs a path for its reference."""
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL))
  model.save_pretrained(workdir / 'model')
  return str(workdir / 'model')


def run_case(settings, workdir):
  """Runs one generation and its updates by TRL; returns the records per call, and the batch."""
  iteration = settings['steps_per_generation'] // settings['gradient_accumulation_steps']
  args = trl.GRPOConfig(
    output_dir=str(workdir),
    max_steps=2 * iteration,
    lr_scheduler_type='constant',
    model_init_kwargs={'dtype': 'float32'},
    seed=3,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    shuffle_dataset=False,
    report_to='none',
    save_strategy='no',
    logging_strategy='no',
    disable_tqdm=True,
    **settings,
  )
  token_level = settings['importance_sampling_level'] == 'sequence_token'
  trainer_class = gspo_token.GRPOTrainer if token_level else trl.GRPOTrainer
  trainer = recording(trainer_class)(
    model=make_model(workdir),
    args=args,
    processing_class=make_tokenizer(),
    reward_funcs=lambda score, **_: score,
    rollout_func=rollout,
    train_dataset=datasets.Dataset.from_dict({'prompt': [f't{i + 3}' for i in range(PROMPTS)]}),
  )
  if trainer.ref_model is not None:
    torch.manual_seed(1)
    with torch.no_grad():
      for parameter in trainer.ref_model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
  trainer.train()
  return trainer.record, trainer.batch


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  default = pathlib.Path(__file__).with_name('trl_grpo.npz')
  parser.add_argument('--out', type=pathlib.Path, default=default)
  out = parser.parse_args().out
  torch.set_num_threads(1)
  cases = make_cases()
  _, _, mask, scores = make_data()
  versions = {p.__name__: p.__version__ for p in (trl, torch, transformers)}
  arrays = {
    'versions': json.dumps(versions),
    'settings': json.dumps(cases),
    'mask': mask,
    'scores': scores,
  }

  def share(name, value):
    """Stores an array once; all cases that share it must agree on it."""
    assert np.array_equal(arrays.setdefault(name, value), value), name

  for name, settings in cases.items():
    with tempfile.TemporaryDirectory() as workdir:
      record, batch = run_case(settings, pathlib.Path(workdir))
    assert np.array_equal((batch['completion_mask'] * batch['tool_mask']).numpy() > 0, mask)
    share(f'advantages_{settings["scale_rewards"]}', batch['advantages'].numpy())
    share('old_logprobs', batch['old_per_token_logps'].numpy())
    if settings['beta']:
      share('ref_logprobs', batch['ref_per_token_logps'].numpy())
    for key in record[0]:
      dtype = np.float32 if np.ndim(record[0][key]) == 0 else None
      arrays[f'{name}/{key}'] = np.stack([np.asarray(call[key], dtype) for call in record])
    for key in ('loss', 'kl', 'clip_low', 'clip_high'):
      print(f'{name}: {key}', arrays[f'{name}/{key}'])
  overlong = dict(max_completion_len=10, soft_punish_cache=4)
  lengths = np.arange(13, dtype=np.int32)
  penalty = get_soft_overlong_punishment(**overlong)([[0] * n for n in lengths])
  arrays |= {
    'overlong_settings': json.dumps(overlong),
    'overlong_lengths': lengths,
    'overlong_penalty': np.asarray(penalty, np.float32),
  }
  np.savez_compressed(out, **arrays)
  print(f'{out}: {out.stat().st_size / 1024:.0f} KB, {len(arrays)} arrays')


if __name__ == '__main__':
  main()
