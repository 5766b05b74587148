"""Draws the figures of docs/rlhf_in_ten_minutes.md as SVG into docs/images.

python docs/figures.py runs/quickstart

The folder is that of a finished quickstart. All curves and bars are of that run.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use('svg')
import matplotlib.pyplot as plt
import numpy as np

from rlhf_jax import losses
from rlhf_jax import policy as policy_lib
from rlhf_jax.evaluation import judges
from rlhf_jax.evaluation import policies

IMAGES = pathlib.Path(__file__).parent / 'images'
BLUE, ORANGE, GREY, INK = '#3266a8', '#d9822b', '#8a94a0', '#222a33'
STYLE = {
  'svg.hashsalt': 'rlhf_jax',  # the same drawing gives the same file
  'svg.fonttype': 'none',
  'font.size': 11,
  'axes.spines.top': False,
  'axes.spines.right': False,
}


def save(figure, name):
  """Writes a figure to IMAGES, on a white ground that dark pages need."""
  figure.savefig(
    IMAGES / f'{name}.svg', bbox_inches='tight', facecolor='white', metadata={'Date': None}
  )
  plt.close(figure)


def box(axes, x, y, text, color):
  """Draws a box with text around a point."""
  axes.text(
    x,
    y,
    text,
    ha='center',
    va='center',
    color=INK,
    bbox={'boxstyle': 'round,pad=0.55', 'facecolor': color, 'edgecolor': INK, 'linewidth': 1},
  )


def arrow(axes, start, end, text='', bend=0.0):
  """Draws an arrow between two points, with text at its middle."""
  style = {'arrowstyle': '-|>', 'color': INK, 'connectionstyle': f'arc3,rad={bend}'}
  axes.annotate('', xy=end, xytext=start, arrowprops=style)
  if text:
    middle = np.mean([start, end], axis=0)
    axes.text(*middle, text, ha='center', va='bottom', color=INK, fontsize=9)


def stages():
  """The three stages, and the loop of the last one."""
  figure, axes = plt.subplots(figsize=(9.5, 4.6))
  axes.set(xlim=(0, 10), ylim=(0, 5))
  axes.axis('off')
  pale = ('#e3ecf7', '#fbeedd', '#e6f2e6')
  box(axes, 1.2, 4.3, 'pretrained\nmodel', 'white')
  box(axes, 4.2, 4.3, '1. SFT\nimitates demonstrations', pale[0])
  box(axes, 8.2, 4.3, '2. reward model\nlearns comparisons', pale[1])
  arrow(axes, (1.95, 4.3), (2.85, 4.3))
  arrow(axes, (5.6, 4.3), (6.95, 4.3), 'pairs')
  box(axes, 2.4, 1.6, 'rollout\nsample responses', pale[2])
  box(axes, 5.3, 1.6, 'scores − β KL\nadvantages', pale[2])
  box(axes, 8.2, 1.6, 'update\npolicy (and critic)', pale[2])
  arrow(axes, (3.4, 1.6), (4.4, 1.6))
  arrow(axes, (6.2, 1.6), (7.1, 1.6))
  arrow(axes, (8.0, 1.1), (2.6, 1.1), bend=-0.22)
  axes.text(5.3, 0.15, '3. reinforcement learning: repeat', ha='center', color=INK)
  arrow(axes, (3.7, 3.75), (2.6, 2.15), bend=0.1)
  axes.text(2.3, 3.0, 'start of\nthe policy', ha='center', fontsize=9, color=INK)
  arrow(axes, (4.5, 3.75), (5.1, 2.0))
  axes.text(5.35, 3.0, 'reference', ha='center', fontsize=9, color=INK)
  arrow(axes, (7.6, 3.75), (5.8, 2.0))
  axes.text(7.35, 3.0, 'scores', ha='center', fontsize=9, color=INK)
  save(figure, 'stages')


def clip(epsilon=0.2):
  """The clipped loss against the ratio."""
  ratio = jnp.linspace(0.5, 1.5, 201)[None]
  figure, pair = plt.subplots(1, 2, figsize=(8, 2.8))
  for axes, advantage in zip(pair, (1.0, -1.0)):
    loss, _, _ = losses.ppo_policy_loss(
      jnp.log(ratio),
      jnp.zeros_like(ratio),
      jnp.full_like(ratio, advantage),
      clip_low=epsilon,
      clip_high=epsilon,
    )
    axes.plot(ratio[0], -advantage * ratio[0], '--', color=GREY, label='not clipped')
    axes.plot(ratio[0], loss[0], color=BLUE, label='PPO')
    axes.axvspan(1 - epsilon, 1 + epsilon, color=BLUE, alpha=0.08)
    axes.set(title=f'advantage {advantage:+.0f}', xlabel='ratio', ylabel='loss')
    axes.legend(frameon=False)
  figure.tight_layout()
  save(figure, 'clip')


def response(workdir):
  """Log-ratios of policy and reference at the tokens of a response."""
  world = [json.loads(line) for line in (workdir / 'world/eval_prompts.jsonl').open()]
  policy, reference = (policy_lib.TextPolicy.load(workdir / name) for name in ('ppo', 'sft'))
  samples = policy.sample([world[0]['prompt']], jax.random.key(0), max_new_tokens=36)
  rollout = jax.device_get(samples.rollout)
  positions = rollout.response_mask.shape[1]
  ids = rollout.tokens[:, -positions:]

  def logprobs(model):
    states = model.model.response_states(model.params, rollout.tokens, rollout.mask, positions)
    logits = model.model.unembed(model.params, states)
    return np.asarray(
      jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), ids[..., None], -1)
    )[0, :, 0]

  keep = rollout.response_mask[0]
  ratio = (logprobs(policy) - logprobs(reference))[keep]
  texts = [policy.tokenizer.decode([token]).strip() or '␣' for token in ids[0][keep]]
  figure, axes = plt.subplots(figsize=(9.5, 3.2))
  axes.bar(range(len(ratio)), ratio, color=[BLUE if value > 0 else ORANGE for value in ratio])
  axes.axhline(0, color=INK, linewidth=0.8)
  axes.set_xticks(range(len(ratio)), texts, rotation=60, ha='right', fontsize=9)
  axes.set_ylabel(r'log $\pi$ − log $\pi_{ref}$ (nats)')
  axes.set_title(f'{world[0]["prompt"]} …   sum {ratio.sum():.1f} nats', fontsize=11, loc='left')
  save(figure, 'response')


def frontier(workdir):
  """Gold and proxy score against KL during PPO, from the samples that the run logged."""
  first = json.loads((workdir / 'evaluate/results.json').read_text())['stages'][1]
  judge = judges.load('rlhf_jax.tasks.reviews:gold_score')
  points = [first | {'kl': 0.0}, *policies.frontier(workdir / 'ppo', judge)]
  points.sort(key=lambda point: point['kl'])
  figure, axes = plt.subplots(figsize=(6, 3.4))
  kl = [point['kl'] for point in points]
  axes.plot(kl, [point['proxy'] for point in points], 'o-', color=ORANGE, label='proxy')
  axes.plot(kl, [point['gold'] for point in points], 'o-', color=BLUE, label='gold')
  axes.set(xlabel='KL from the SFT model (nats)', ylabel='score')
  axes.legend(frameon=False)
  save(figure, 'frontier')


def main():
  """Draws all figures."""
  workdir = pathlib.Path(sys.argv[1])
  IMAGES.mkdir(exist_ok=True)
  with plt.rc_context(STYLE):
    stages()
    clip()
    response(workdir)
    frontier(workdir)


if __name__ == '__main__':
  main()
