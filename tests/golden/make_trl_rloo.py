"""Write trl_rloo.npz: updates of TRL's RLOOTrainer, to compare our advantages and losses with.

    pip install "trl==1.12.0" "torch==2.13.0" "transformers==5.23.0" accelerate datasets \
        pandas requests
    python tests/golden/make_trl_rloo.py [--out FILE]

Only whoever renews the numbers needs torch and TRL; the test reads the .npz with NumPy. TRL's
`train()` runs as it is. A subclass returns the responses of make_trl_grpo.py in place of sampling,
copies what `_compute_loss` reads and returns, and differentiates that loss by the logprobs.

Letters: B batch of a generation (n responses of each prompt), R response length, S calls of
`_compute_loss` (2 iterations over the batch, each in one or more minibatches), b rows of each.

What is in the file. All cases share model, reference, prompts and responses; C is a case's name.
  versions         JSON text
  settings         JSON text {C: hyperparameters}, in TRL's names; those that all share are in each
  scores [B]       one is NaN
  mask [B, R]      bool, without holes
  old_logprobs, ref_logprobs [B, R]    before the first update; not 0 under the mask
  C/advantages [B]
  C/rows [S, b]    rows of the batch in each minibatch, shuffled by TRL
  C/logprobs, C/gradients [S, b, R]    of the policy, and d loss / d logprobs
  C/loss [S]       returned by `_compute_loss`
  C/clip_low, C/clip_high [S]    logged: fractions of responses clipped from below and above

Conventions of TRL 1.12, read off its source and checked by the numbers here:
  * Scores are clipped, then lose beta times the KL of the response: k1, summed over its tokens. The
    KL is that of the policy that sampled; it has no gradient.
  * Advantage. Score less the mean of the other scores of the group that are numbers. With
    `normalize_advantages` less their mean and over (std + 1e-4), over the whole batch and with
    Bessel's correction. Responses without a score have advantage 0 and count in the mean loss.
  * Ratio. exp(sum of log p - log p_old over the tokens), not normalized by length; clipped as in
    PPO. The loss is a mean over responses.
"""

import argparse
import json
import pathlib
import tempfile

import datasets
import make_trl_grpo as shared
import numpy as np
import torch
import transformers
import trl

B, N = shared.B, shared.N
COMMON = dict(
  beta=0.0,
  normalize_advantages=False,
  reward_clip_range=None,
  epsilon=0.2,
  epsilon_high=None,
  num_generations=N,
  num_iterations=2,
  max_completion_length=shared.MAX_LENGTH,
  learning_rate=5e-3,
  gradient_accumulation_steps=1,
)
WHOLE = dict(per_device_train_batch_size=B, steps_per_generation=1)
HALVES = dict(per_device_train_batch_size=B // 2, steps_per_generation=2)
CASES = {
  'plain': COMMON | WHOLE,
  'kl': COMMON | WHOLE | dict(beta=0.1),
  'kl-halves': COMMON | HALVES | dict(beta=0.1, epsilon=0.1, epsilon_high=0.15),
  'normalized': COMMON | WHOLE | dict(beta=0.1, normalize_advantages=True),
  'clipped': COMMON | WHOLE | dict(reward_clip_range=(-0.5, 0.5)),
}


def make_data():
  """Prompts, responses, mask without holes, and scores, one of them None."""
  queries, responses, mask, scores = shared.make_data()
  mask = np.arange(mask.shape[1]) < np.array([len(r) for r in responses])[:, None]
  scores = scores.tolist()
  scores[13] = None
  return queries, responses, mask, scores


class Recording(trl.RLOOTrainer):
  """RLOOTrainer with given responses, and a record of what enters its loss and what comes out."""

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self.record, self.batch, self.passes = [], None, []

  def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
    assert len(prompt_ids) == B
    return make_data()[1]

  def _generate_and_score_completions(self, inputs):
    self.passes = []
    output = super()._generate_and_score_completions(inputs)
    old, *ref = self.passes
    self.batch = {'mask': output['completion_mask'], 'advantages': output['advantages'].clone()}
    self.batch |= {'old_logprobs': old} | ({'ref_logprobs': ref[0]} if ref else {})
    return output | {'rows': torch.arange(B)}  # shuffled and split like the rest

  def _get_per_token_logps_and_entropies(self, *args, **kwargs):
    output = super()._get_per_token_logps_and_entropies(*args, **kwargs)
    self.passes.append(output[0])
    return output

  def _compute_loss(self, model, inputs):
    loss = super()._compute_loss(model, inputs)
    logprobs = self.passes[-1]
    (gradient,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
    logged = {'clip_low': 'clip_ratio/low_mean', 'clip_high': 'clip_ratio/high_mean'}
    self.record.append(
      {name: self._metrics['train'][key][-1] for name, key in logged.items()}
      | {
        'rows': inputs['rows'].numpy().astype(np.int32),
        'loss': loss.item(),
        'logprobs': logprobs.detach().numpy().copy(),
        'gradients': gradient.numpy(),
      }
    )
    return loss


def run_case(settings, workdir):
  """One generation and its updates by TRL. Returns the record per call, and the batch."""
  scores = iter([make_data()[3]] * 2)
  args = trl.RLOOConfig(
    output_dir=str(workdir),
    max_steps=2 * settings['steps_per_generation'],
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
  prompts = [' '.join(f't{i}' for i in query[1:]) for query in make_data()[0]]
  trainer = Recording(
    model=shared.make_model(workdir),
    args=args,
    processing_class=shared.make_tokenizer(),
    reward_funcs=lambda **_: next(scores),
    train_dataset=datasets.Dataset.from_dict({'prompt': prompts}),
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
  default = pathlib.Path(__file__).with_name('trl_rloo.npz')
  parser.add_argument('--out', type=pathlib.Path, default=default)
  out = parser.parse_args().out
  torch.set_num_threads(1)
  _, _, mask, scores = make_data()
  versions = {p.__name__: p.__version__ for p in (trl, torch, transformers)}
  arrays = {
    'versions': json.dumps(versions),
    'settings': json.dumps(CASES),
    'mask': mask,
    'scores': np.array(scores, np.float32),
  }
  for name, settings in CASES.items():
    with tempfile.TemporaryDirectory() as workdir:
      record, batch = run_case(settings, pathlib.Path(workdir))
    assert np.array_equal(batch.pop('mask').numpy() > 0, mask)
    arrays[f'{name}/advantages'] = batch.pop('advantages').numpy()
    for key, value in batch.items():  # cases that share an array must agree on it
      value = value.detach().numpy()
      assert np.array_equal(arrays.setdefault(key, value), value), key
    for key in record[0]:
      dtype = np.float32 if np.ndim(record[0][key]) == 0 else None
      arrays[f'{name}/{key}'] = np.stack([np.asarray(call[key], dtype) for call in record])
    for key in ('loss', 'clip_low', 'clip_high'):
      print(f'{name}: {key}', arrays[f'{name}/{key}'])
  np.savez_compressed(out, **arrays)
  print(f'{out}: {out.stat().st_size / 1024:.0f} KB, {len(arrays)} arrays')


if __name__ == '__main__':
  main()
