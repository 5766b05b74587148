"""python -m rlhf_jax.tasks.review_samples --out=DIR [--quickstart=RUN]

Writes responses of several policies to the same prompts of the quickstart's task, {"prompt",
"completion"}, one file for each policy: what the labelling page needs. They are those of the
quickstart's report if RUN has one. Otherwise nothing is trained: reviews of the grammar take their
place, as clumsy, fluent and favourable as the policies of the quickstart's stages are.
"""

import argparse
import json
import pathlib

from rlhf_jax.data import sources
from rlhf_jax.tasks import reviews

REVIEWS = 600  # of each policy, from which those of common prompts are taken


def write(folder, *, quickstart, count, seed):
  """Writes POLICY.jsonl for each policy.

  Args:
    folder: Output folder.
    quickstart: Folder of a run of the quickstart, which need not exist.
    count: Maximum number of prompts.
    seed: Random seed.

  Returns:
    The paths.
  """
  report = pathlib.Path(quickstart) / 'report.json'
  if report.exists():
    samples = of_report(json.loads(report.read_text(encoding='utf-8')))
  else:
    samples = of_grammar(seed)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  common = set.intersection(*map(set, samples.values()))
  prompts = sorted(common)[:count]
  paths = []
  for policy, responses in samples.items():
    paths.append(folder / f'{policy}.jsonl')
    records = [{'prompt': prompt, 'completion': responses[prompt]} for prompt in prompts]
    sources.write(paths[-1], records)
  return paths


def of_report(parts):
  """Returns {policy: {prompt: response}} of the samples in the report of a quickstart."""
  return {
    policy: {sample['prompt']: sample[side] for sample in parts['samples']}
    for policy, side in (('sft', 'before'), ('ppo', 'after'))
  }


def of_grammar(seed):
  """Returns {policy: {prompt: response}} of generated reviews."""
  texts = [record['text'] for record in reviews.corpus(REVIEWS, seed)]
  clumsy = [text.partition(':') for text in texts]
  records = {
    'clumsy': [{'prompt': prompt + colon, 'completion': rest} for prompt, colon, rest in clumsy],
    'fluent': reviews.demonstrations(REVIEWS, seed + 1),
    'favourable': reviews.ideal(REVIEWS, seed + 2),
  }
  return {
    policy: {record['prompt']: record['completion'] for record in found}
    for policy, found in records.items()
  }


def main():
  """Reads the command line and writes the files."""
  parser = argparse.ArgumentParser(
    'python -m rlhf_jax.tasks.review_samples', description=__doc__, allow_abbrev=False
  )
  parser.add_argument('--out', required=True, help='output folder')
  parser.add_argument('--quickstart', default='runs/quickstart', help='run of the quickstart')
  parser.add_argument('--count', type=int, default=60, help='number of prompts')
  options = parser.parse_args()
  write(options.out, quickstart=options.quickstart, count=options.count, seed=0)


if __name__ == '__main__':
  main()
