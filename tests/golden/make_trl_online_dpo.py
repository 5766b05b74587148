"""Write trl_online_dpo.npz: updates of TRL's OnlineDPOTrainer, to compare our online DPO with.

    pip install "trl==1.12.0" "torch==2.13.0" "transformers==5.23.0" accelerate datasets
    python tests/golden/make_trl_online_dpo.py [--out FILE]

Only this script needs torch and TRL; the test reads the .npz with NumPy. TRL's `train()` runs
unchanged. A subclass returns fixed responses from `_generate`, records the
log-probabilities that `_forward` returns, and differentiates the loss by those of the policy.

Letters: G prompts, B = 2 G responses, R response length, S optimizer steps.

Contents of the file. All cases share models, prompts and responses; C is a case's name.
  versions        JSON text
  settings        JSON text {C: hyperparameters}, in TRL's names
  mask [B, R]     bool; it has holes
  ended [B]       bool, responses with an EOS
  scores [B]      of the reward function, without ties
  ref_logprobs [B, R]    not 0 outside the mask
  C/logprobs, C/gradients [S, B, R]    of the policy, and d loss / d logprobs
  C/loss, C/METRIC [S]    the loss and what TRL logs as METRIC

The two responses to a prompt are adjacent here, as in our batches. TRL has all first responses
before all second ones; this script reorders.

Conventions of TRL 1.12, from its source, and checked by these numbers:
  * The response with the higher score is chosen; of two equal scores, the first.
  * Log-probabilities are those at temperature 1, whatever the sampler's temperature is, summed over
    the completion mask. The loss is the mean over pairs. IPO takes sums too, where the paper and
    TRL's offline trainer have means.
  * `missing_eos_penalty` is subtracted from the scores before they are compared.
  * objective/kl and what is derived from it sum over all positions, those of the padding too. Our
    `objective/kl` is masked, so it is not compared.
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
from trl.experimental import online_dpo

PAD, BOS, EOS, VOCAB = shared.PAD, shared.BOS, shared.EOS, shared.VOCAB
PROMPTS, R = 6, 8
B = 2 * PROMPTS
CASES = {
  'sigmoid': dict(loss_type='sigmoid', beta=0.3, missing_eos_penalty=None),
  'ipo': dict(loss_type='ipo', beta=0.2, missing_eos_penalty=None),
  'eos': dict(loss_type='sigmoid', beta=0.1, missing_eos_penalty=2.0),
}
LOGGED = (
  'objective/scores',
  'objective/scores_margin',
  'rewards/chosen',
  'rewards/rejected',
  'rewards/margins',
  'rewards/accuracies',
  'logps/chosen',
  'logps/rejected',
  'val/contain_eos_token',
)
# From our order of the responses (adjacent) to TRL's (all first, then all second), and back.
TO_TRL = np.arange(B).reshape(PROMPTS, 2).T.ravel()
FROM_TRL = np.argsort(TO_TRL)


def make_data():
  """Returns prompts, responses [B, R], masks [B, R] and scores [B], in our order."""
  rng = np.random.default_rng(3)
  prompts = [[BOS, *rng.integers(3, VOCAB, n).tolist()] for n in (1, 4, 2, 3, 5, 2)]
  lengths = rng.integers(2, R, B)
  lengths[[3, 8, 9]] = R
  tokens = rng.integers(3, VOCAB, (B, R))
  tokens[np.arange(R) >= lengths[:, None]] = PAD
  ends = np.flatnonzero(lengths < R)
  tokens[ends, lengths[ends] - 1] = EOS
  mask = (np.arange(R) < lengths[:, None]) & (rng.random((B, R)) < 0.8)
  mask[np.arange(B), lengths - 1] = True
  scores = rng.normal(size=B).astype(np.float32)
  scores[3] = scores[2] + 0.5  # without an EOS: with the penalty it loses
  return prompts, tokens, mask, scores


class Recording(online_dpo.OnlineDPOTrainer):
  """The trainer with fixed responses; records the inputs and results of its loss."""

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self.record = []

  def _generate(self, model, prompts, images=None):
    del model, images
    assert len(prompts) == PROMPTS
    queries, tokens, mask, _ = make_data()
    length = max(map(len, queries))
    padded = np.array([[PAD] * (length - len(query)) + query for query in queries] * 2)
    tokens, mask = torch.tensor(tokens[TO_TRL]), torch.tensor(mask[TO_TRL].astype(int))
    return torch.tensor(padded), torch.tensor((padded != PAD).astype(int)), tokens, mask

  def _forward(self, *args):
    output = super()._forward(*args)
    if output.requires_grad:
      output.retain_grad()
    self.passes.append(output)
    return output

  def training_step(self, *args, **kwargs):
    self.passes = []
    loss = super().training_step(*args, **kwargs)
    policy, reference = self.passes
    self.record.append(
      {name: np.float32(self.stats[name][-1]) for name in LOGGED}
      | {
        'loss': loss.item(),
        'logprobs': policy.detach().numpy()[FROM_TRL],
        'gradients': policy.grad.numpy()[FROM_TRL],
        'ref_logprobs': reference.numpy()[FROM_TRL],
      }
    )
    return loss


def make_model(seed, noise=0.0):
  """Returns a random Llama; `noise` changes it a little."""
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared.MODEL))
  torch.manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(noise * torch.randn_like(parameter))
  return model


def run_case(settings, workdir):
  """Trains two steps and returns the record of both."""
  scores = make_data()[3]
  args = online_dpo.OnlineDPOConfig(
    output_dir=str(workdir),
    per_device_train_batch_size=PROMPTS,
    max_steps=2,
    learning_rate=2e-2,
    max_new_tokens=R,
    max_length=64,
    use_cpu=True,
    bf16=False,
    disable_dropout=True,
    report_to=[],
    save_strategy='no',
    gradient_checkpointing=False,
    **{name: value for name, value in settings.items() if value is not None},
  )
  trainer = Recording(
    model=make_model(0),
    ref_model=make_model(1, noise=0.05),
    reward_funcs=lambda prompts, completions, **_: scores[TO_TRL].tolist(),
    args=args,
    processing_class=shared.make_tokenizer(),
    train_dataset=datasets.Dataset.from_dict({'prompt': [f't{i + 3}' for i in range(PROMPTS)]}),
  )
  trainer.train()
  return trainer.record


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  default = pathlib.Path(__file__).with_name('trl_online_dpo.npz')
  parser.add_argument('--out', type=pathlib.Path, default=default)
  out = parser.parse_args().out
  torch.set_num_threads(1)
  _, tokens, mask, scores = make_data()
  arrays = {
    'versions': json.dumps({p.__name__: p.__version__ for p in (trl, torch, transformers)}),
    'settings': json.dumps(CASES),
    'mask': mask,
    'ended': (tokens == EOS).any(1),
    'scores': scores,
  }
  for name, settings in CASES.items():
    with tempfile.TemporaryDirectory() as workdir:
      record = run_case(settings, pathlib.Path(workdir))
    for key in record[0]:
      values = np.stack([np.float32(step[key]) for step in record])
      if key == 'ref_logprobs':
        assert np.array_equal(arrays.setdefault(key, values[0]), values[1])
      else:
        arrays[f'{name}/{key}'] = values
    for key in ('loss', 'rewards/margins', 'rewards/accuracies'):
      print(f'{name}: {key}', arrays[f'{name}/{key}'])
  np.savez_compressed(out, **arrays)
  print(f'{out}: {out.stat().st_size / 1024:.0f} KB, {len(arrays)} arrays')


if __name__ == '__main__':
  main()
