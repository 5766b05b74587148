"""Cards of samples in the report, which can be filtered, searched and sorted.

A card is a dict with `prompt`, `texts` (a list of {"side", "label", "text"}), `scores` ({name:
number}) and `groups` (the names of its groups).
"""

import math

MAX_SAMPLES = 8  # samples in a group


def pairs(samples):
  """Returns cards of responses before and after training.

  Args:
    samples: List of {"prompt", "before", "after"} and, if known, "scores": {"before": {name:
      number}, "after": {name: number}}.
  """
  cards = []
  for sample in samples:
    scores = {
      f'{name} {side}': value
      for side in ('after', 'before')
      for name, value in ((sample.get('scores') or {}).get(side) or {}).items()
      if _is_number(value)
    }
    texts = [
      {'side': side, 'label': _label(side, scores, f' {side}'), 'text': sample[side].strip()}
      for side in ('before', 'after')
    ]
    cards.append({'prompt': sample['prompt'], 'texts': texts, 'scores': scores, 'groups': []})
  return cards


def logged(samples):
  """Returns cards of one run: samples of its first and last logged step.

  Those of the last step include its highest and lowest scores.

  Args:
    samples: Records of samples.jsonl, in order.
  """
  texts = [sample for sample in samples if 'response' in sample]
  if not texts:
    return []
  steps = texts[0]['step'], texts[-1]['step']
  last = [sample for sample in texts if sample['step'] == steps[1]]
  ranked = sorted(
    (sample for sample in last if _is_number(sample.get('score'))),
    key=lambda sample: sample['score'],
    reverse=True,
  )
  groups = {}
  if steps[0] != steps[1]:
    first = [sample for sample in texts if sample['step'] == steps[0]]
    groups[f'first logged, step {steps[0]}'] = first[:MAX_SAMPLES]
  groups |= {
    f'last logged, step {steps[1]}': last[:MAX_SAMPLES],
    f'highest scores of step {steps[1]}': ranked[: MAX_SAMPLES // 2],
    f'lowest scores of step {steps[1]}': ranked[::-1][: MAX_SAMPLES // 2],
  }
  cards = {}
  for group, members in groups.items():
    for sample in members:
      cards.setdefault(id(sample), _card(sample))['groups'].append(group)
  for card in cards.values():
    label = card['texts'][0]['label']
    card['texts'][0]['label'] = ' · '.join([', '.join(card['groups']), *([label] if label else [])])
  return list(cards.values())


def _card(sample):
  scores = {
    name: value
    for name, value in sample.items()
    if name not in ('step', 'prompt', 'response') and _is_number(value)
  }
  if scores.get('postprocessed_score') == scores.get('score'):
    scores.pop('postprocessed_score', None)
  scores |= {
    name: value for name, value in (sample.get('parts') or {}).items() if _is_number(value)
  }
  text = {'side': '', 'label': _label('', scores), 'text': sample['response'].strip()}
  return {'prompt': sample.get('prompt', ''), 'texts': [text], 'scores': scores, 'groups': []}


def _label(side, scores, suffix=''):
  """Returns 'after · gold 1.20 · proxy 0.80' for the scores whose names end with `suffix`."""
  parts = [side] if side else []
  parts += [
    f'{name.removesuffix(suffix)} {value:.2f}'
    for name, value in scores.items()
    if name.endswith(suffix)
  ]
  return ' · '.join(parts)


def _is_number(value):
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
