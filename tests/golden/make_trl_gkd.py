"""Write trl_gkd.npz: divergences of TRL's GKDTrainer, to compare ours with.

    pip install "trl==1.12.0" "torch==2.13.0" "transformers==5.23.0" accelerate datasets
    python tests/golden/make_trl_gkd.py [--out FILE]

Only this script needs torch and TRL; the test reads the .npz with NumPy.
`GKDTrainer.generalized_jsd_loss` runs unchanged on random logits.

Letters: B sequences, R response length, V vocabulary.

Contents of the file. C is a case's name.
  versions        JSON text
  settings        JSON text {C: {'beta', 'temperature'}}
  logits [B, R, V], teacher_logits [B, R, V]
  mask [B, R]     bool; it has holes, and the last sequence has no token
  C/loss          scalar, the mean over the mask
  C/gradients [B, R, V]    d loss / d logits

Conventions of TRL 1.12, from its source, and checked by these numbers:
  * beta 0 is KL(teacher || student), beta 1 is KL(student || teacher): the limits of the
    generalized divergence after a division by beta or 1 - beta.
  * Both logits are divided by the temperature; the loss is not multiplied by its square.
  * The loss is the mean over the tokens of all responses.
"""

import argparse
import json
import pathlib

import numpy as np
import torch
import transformers
import trl
from trl.experimental import gkd

B, R, V = 4, 6, 11
CASES = {
  'forward_kl': dict(beta=0.0, temperature=1.0),
  'reverse_kl': dict(beta=1.0, temperature=1.0),
  'reverse_kl_0.7': dict(beta=1.0, temperature=0.7),
  'jsd_0.1': dict(beta=0.1, temperature=1.0),
  'jsd_0.5': dict(beta=0.5, temperature=0.9),
  'jsd_0.9': dict(beta=0.9, temperature=1.5),
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  default = pathlib.Path(__file__).with_name('trl_gkd.npz')
  parser.add_argument('--out', type=pathlib.Path, default=default)
  out = parser.parse_args().out
  rng = np.random.default_rng(5)
  arrays = {
    'versions': json.dumps({p.__name__: p.__version__ for p in (trl, torch, transformers)}),
    'settings': json.dumps(CASES),
    'logits': rng.normal(size=(B, R, V), scale=2.0).astype(np.float32),
    'teacher_logits': rng.normal(size=(B, R, V), scale=2.0).astype(np.float32),
    'mask': (rng.random((B, R)) < 0.7) & (np.arange(B) < B - 1)[:, None],
  }
  labels = torch.tensor(np.where(arrays['mask'], 1, -100))
  for name, settings in CASES.items():
    logits = torch.tensor(arrays['logits'], requires_grad=True)
    loss = gkd.GKDTrainer.generalized_jsd_loss(
      logits, torch.tensor(arrays['teacher_logits']), labels=labels, **settings
    )
    loss.backward()
    arrays[f'{name}/loss'] = np.float32(loss.item())
    arrays[f'{name}/gradients'] = logits.grad.numpy()
    print(name, loss.item())
  np.savez_compressed(out, **arrays)
  print(f'{out}: {out.stat().st_size / 1024:.0f} KB, {len(arrays)} arrays')


if __name__ == '__main__':
  main()
