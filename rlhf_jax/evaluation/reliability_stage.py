"""A stage that compares reward models with and without reliabilities of simulated annotators.

It compares what was learned with the truth, which is known, and the models on the same gold pairs.
"""

from collections.abc import Hashable
from collections.abc import Sequence
import pathlib

from jaxtyping import Bool
import numpy as np
from scipy import stats

from rlhf_jax import errors
from rlhf_jax import identity
from rlhf_jax import intervals
from rlhf_jax.data import sources
from rlhf_jax.evaluation import annotators
from rlhf_jax.evaluation import figures
from rlhf_jax.evaluation import reward_models
from rlhf_jax.evaluation import sections
from rlhf_jax.evaluation import tables

PAIRS = 'pairs.jsonl'


def compare(noise: Sequence[float], values: dict[str, float]) -> dict:
  """Compares learned reliabilities with the noise of simulated annotators.

  Args:
    noise: Probability of a flipped label of annotators '0', '1' and so on; 0.5 is random.
    values: {annotator: learned reliability}.

  Returns:
    'spearman', the rank correlation of reliability and -noise; 'random_lowest', whether those with
    a noise of 0.5 are the least reliable ones, None if there are none; and the 'annotators',
    dicts.

  Raises:
    UserError: An annotator has no reliability.
  """
  names = [str(number) for number in range(len(noise))]
  errors.need(
    set(names) == set(values),
    f'the reward model knows annotators {sorted(values)}, but noise has {len(noise)} values',
  )
  lowest = sorted(names, key=values.get)[: sum(value == 0.5 for value in noise)]
  learned = [values[name] for name in names]
  return {
    'spearman': float(stats.spearmanr(learned, [-value for value in noise]).statistic),
    'random_lowest': all(noise[int(name)] == 0.5 for name in lowest) if lowest else None,
    'annotators': [
      {'annotator': name, 'noise': float(flipped), 'reliability': value}
      for name, flipped, value in zip(names, noise, learned, strict=True)
    ],
  }


def paired(
  right: Bool[np.ndarray, ' n'], baseline: Bool[np.ndarray, ' n'], prompts: Sequence[Hashable]
) -> dict:
  """Compares the accuracies of two reward models on the same pairs.

  Args:
    right: [n], whether the first model orders each pair as the data do.
    baseline: [n], the same of the second model.
    prompts: n prompts; pairs of one prompt are not independent.

  Returns:
    'difference' of the accuracies, first minus second, and 'low' and 'high' of its 95 % interval,
    Tango's for paired proportions (see intervals.rate); 'only_first' and 'only_second', numbers of
    pairs that only one of them orders rightly; and 'pairs', n.
  """
  signs = right.astype(float) - baseline
  low, high = intervals.rate((signs + 1) / 2, prompts)
  return {
    'difference': float(signs.mean()),
    'low': 2 * low - 1,
    'high': 2 * high - 1,
    'only_first': int((signs > 0).sum()),
    'only_second': int((signs < 0).sum()),
    'pairs': len(signs),
  }


def pooled(folders: Sequence[str | pathlib.Path]) -> dict:
  """Compares two reward models on the pairs of several pipelines, such as those of other seeds.

  Args:
    folders: Folders of stages that called `run`.

  Returns:
    See `paired`. Pairs of one prompt in one folder are clustered.
  """
  rows = [(str(folder), row) for folder in folders for row in _read_pairs(folder)]
  first, second = (np.array([row[key] for _, row in rows], bool) for key in ('first', 'second'))
  return paired(first, second, [(folder, row['prompt']) for folder, row in rows])


def run(
  folder: pathlib.Path,
  *,
  workdir: str,
  title: str,
  summary: str,
  noise: Sequence[float],
  reliability: str,
  baseline: str,
  held_out: str,
  page: str,
) -> None:
  """Compares reward models with and without reliabilities, as a stage of a pipeline.

  Prints the results, and writes results.json, pairs.jsonl ({"prompt", "first", "second"}: whether
  the model with reliabilities and the one without order a pair rightly) and a page.

  Args:
    folder: Folder for results.json and pairs.jsonl.
    workdir: Folder of the pipeline, for the page.
    title: Title of the page.
    summary: One or two sentences below the title.
    noise: See `compare`.
    reliability: Stage of the reward model that learned reliabilities.
    baseline: Stage of the reward model that did not.
    held_out: Comparisons on which both are compared.
    page: File name of the page in the workdir.
  """
  root, stages = pathlib.Path(workdir), (reliability, baseline)
  results = compare(noise, annotators.learned(root / reliability))
  scorers = [reward_models.RewardModel.load(root / stage / 'model') for stage in stages]
  gaps, prompts = zip(*(reward_models.pair_gaps(scorer, held_out) for scorer in scorers))
  first, second = (gap > 0 for gap in gaps)  # equal scores are wrong
  results['accuracy'] = {
    stage: [float(right.mean()), *intervals.rate(right, prompts[0])]
    for stage, right in zip(stages, (first, second))
  }
  results['paired'] = paired(first, second, prompts[0])
  rows = zip(prompts[0], first.tolist(), second.tolist())
  sources.write(folder / PAIRS, [dict(zip(('prompt', 'first', 'second'), row)) for row in rows])
  identity.write_json(folder / 'results.json', results)
  sections.write(root / page, title=title, summary=summary, sections=_sections(results, title))
  print(f'page: {root / page}')


def _read_pairs(folder):
  return [record.fields for record in sources.read(str(pathlib.Path(folder) / PAIRS))]


def _sections(results, title):
  """Prints the table of accuracies, and returns the sections of the page."""
  titles = ['Reward model', 'Accuracy on gold pairs', '95 % interval']
  values = {
    **results['accuracy'],
    'difference': [results['paired'][key] for key in ('difference', 'low', 'high')],
  }
  cells = [
    [name, f'{value:.3f}', f'[{low:.3f}, {high:.3f}]']
    for name, (value, low, high) in values.items()
  ]
  only = results['paired']
  text = (
    f'Of {only["pairs"]} pairs, {only["only_first"]} are ordered rightly only by the first model, '
    f'and {only["only_second"]} only by the second. Equal scores are wrong.'
  )
  order = f'Rank correlation with the truth: {results["spearman"]:.2f}.'
  print('\n'.join([tables.text(titles, cells, title=title), text, order]))
  found = results['annotators']
  figure = figures.points_and_curves(
    [{'label': 'annotators', 'points': [(row['noise'], row['reliability']) for row in found]}],
    x='probability of a flipped label; 0.5 is random',
    y='learned reliability',
    title='Reliability of the annotators',
  )
  rows = [[row['annotator'], f'{row["noise"]:g}', f'{row["reliability"]:.2f}'] for row in found]
  heads = ('Annotator', 'Noise', 'Reliability')
  return [
    sections.Section('Accuracy', text, titles=titles, rows=cells),
    sections.Section('Annotators', order, [(figure, '')], heads, rows),
  ]
