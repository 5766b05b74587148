"""The last stage of red teaming: success of all attackers, the attacks by cluster, and the page."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from rlhf_jax import errors
from rlhf_jax import identity
from rlhf_jax import intervals
from rlhf_jax import metrics as metrics_lib
from rlhf_jax.evaluation import figures
from rlhf_jax.evaluation import sections
from rlhf_jax.evaluation import tables
from rlhf_jax.feedback import attacks as attacks_lib
from rlhf_jax.feedback import redteam
from rlhf_jax.rewards import functions

PAGE = 'red_team.html'
SHOWN = 12  # attacks of a round with a response on the page


@dataclasses.dataclass(frozen=True)
class Round:
  """The attacks on one target.

  Attributes:
    target: name of the target.
    ordinary: records of its answers to ordinary prompts; see redteam.run.
    again: records of its answers to the last attacks of the round before; [] if there are none.
    attacks: {method: records}.
    trained: set of the attacks that the target was trained on.
    curve: list of (step, harm) while the RL attacker was trained.
  """

  target: str
  ordinary: list[dict[str, Any]]
  again: list[dict[str, Any]]
  attacks: dict[str, list[dict[str, Any]]]
  trained: set[str]
  curve: list[tuple[int, float]]

  @classmethod
  def read(cls, workdir, target, ordinary, again, trained, training, methods):
    """Reads the files of the stages of a round; see `run`."""
    records = lambda stage: redteam.read((workdir / stage / redteam.ATTACKS,)) if stage else []
    logged = metrics_lib.read(workdir / training) if training else []
    curve = [(line['step'], line['reward/harm']) for line in logged if 'reward/harm' in line]
    attacks = {method: records(stage) for method, stage in methods}
    files = [workdir / stage / redteam.PROMPTS for stage in trained]
    prompts = {record['prompt'] for record in redteam.read(files)}
    return cls(target, records(ordinary), records(again), attacks, prompts, curve)


def run(folder, *, workdir, title, summary, rounds, gold, clusters, seed):
  """Prints and writes the success of all attackers on all targets; writes the page.

  Args:
    folder: pathlib.Path for results.json.
    workdir: Folder of the pipeline, for the page.
    title: Title of the page.
    summary: Sentence below it.
    rounds: (target, stage of its answers to ordinary prompts, stage of its answers to the last
      attacks of the round before or '', stages whose prompts.jsonl it was trained on, stage that
      trains the RL attacker or '', pairs (method, stage of its attacks)) of each round, in order.
    gold: 'package.module:function' of (prompt, response) -> quality of the answer to an ordinary
      prompt; '' for none.
    clusters: Largest number of clusters of the attacks of a round.
    seed: Random seed of the clusters.
  """
  workdir = pathlib.Path(workdir)
  read = [Round.read(workdir, *described) for described in rounds]
  quality = functions.load_gold(gold) if gold else None
  targets = [target_row(one, quality) for one in read]
  attackers = [attacker_row(one, method) for one in read for method in one.attacks]
  found = {one.target: clusters_of(one, clusters, seed) for one in read}
  print(tables.text(*attackers_table(attackers), title='Attackers', width=120))
  print(tables.text(*targets_table(targets), title='Targets', width=120))
  as_dicts = {name: [dataclasses.asdict(one) for one in group] for name, group in found.items()}
  results = {'attackers': attackers, 'targets': targets, 'clusters': as_dicts}
  identity.write_json(folder / 'results.json', results)
  parts = [
    success_section(attackers, read),
    targets_section(targets),
    *(cluster_section(name, group) for name, group in found.items()),
    *(attacks_section(one) for one in read),
  ]
  sections.write(workdir / PAGE, title=title, summary=summary, sections=parts)
  print(f'page: {workdir / PAGE}')


def check(*, gold, rounds, clusters, **_):
  """Checks the arguments of `run` before any stage runs; see pipeline.check."""
  if gold:
    functions.check_gold(gold)
  errors.need(rounds, 'rounds is empty: name the stages of at least one round')
  errors.need(clusters > 0, f'clusters={clusters} must be positive')


run.check = check


def attacker_row(one, method):
  """Computes the success of an attacker, on all its attacks and on those new to the target.

  Args:
    one: Round.
    method: Name of the attacker.

  Returns:
    {"target", "attacker"}, redteam.statistics of the attacks, and of those that the target was not
    trained on {"new": their number, "new_success", "new_success_se"}; the last two are None if
    there are none.
  """
  records = one.attacks[method]
  new = [record['success'] for record in records if record['prompt'] not in one.trained]
  return (
    {'target': one.target, 'attacker': method}
    | redteam.statistics(records)
    | {
      'new': len(new),
      'new_success': float(np.mean(new)) if new else None,
      'new_success_se': intervals.standard_error(new) if new else None,
    }
  )


def target_row(one, quality):
  """Computes how a target answers ordinary prompts and the attacks on the target before it.

  Args:
    one: Round.
    quality: Function (prompt, response) -> float, or None.

  Returns:
    {"target", "gold", "gold_se", "ordinary": fraction of harmful responses to ordinary prompts,
    "ordinary_se", "again": the same for the attacks, "again_se"}; None where it is not known.
  """
  row = {'target': one.target, 'gold': None, 'gold_se': None}
  if quality:
    pairs = [(r['prompt'], response) for r in one.ordinary for response in r['responses']]
    scores = [quality(*pair) for pair in pairs]
    error = intervals.standard_error(scores, [prompt for prompt, _ in pairs])
    row |= {'gold': float(np.mean(scores)), 'gold_se': error}
  for name, records in (('ordinary', one.ordinary), ('again', one.again)):
    success = [record['success'] for record in records]
    row[name] = float(np.mean(success)) if success else None
    row[f'{name}_se'] = intervals.standard_error(success) if success else None
  return row


def clusters_of(one, count, seed):
  """Returns attacks.Cluster of all attacks of a round."""
  records = [record for records in one.attacks.values() for record in records]
  return attacks_lib.clusters(
    [record['prompt'] for record in records],
    [record['success'] for record in records],
    count,
    seed,
  )


def with_error(value, error):
  """Formats a mean with its standard error; a dash if there is none."""
  return '–' if value is None else f'{value:.3f} ± {error:.3f}'


def attackers_table(rows):
  """Returns the titles and the cells of the table of attackers."""
  titles = ['Target', 'Attacker', 'Attacks', 'Success', 'New', 'Success of new']
  titles += ['Unique', 'Distinct-2', 'Self-BLEU']
  cells = [
    [
      row['target'],
      row['attacker'],
      str(row['attacks']),
      with_error(row['success'], row['success_se']),
      str(row['new']),
      with_error(row['new_success'], row['new_success_se']),
      *(f'{row[key]:.2f}' for key in ('unique', 'distinct_2', 'self_bleu')),
    ]
    for row in rows
  ]
  return titles, cells


def targets_table(rows):
  """Returns the titles and the cells of the table of targets."""
  titles = ['Target', 'Gold score', 'Harm, ordinary prompts', 'Harm, attacks of the round before']
  cells = [
    [
      row['target'],
      *(with_error(row[key], row[f'{key}_se']) for key in ('gold', 'ordinary', 'again')),
    ]
    for row in rows
  ]
  return titles, cells


def success_section(rows, rounds):
  """Returns the section on the success of the attackers.

  Args:
    rows: Rows of the table of attackers.
    rounds: Rounds.
  """
  named = {f'{row["target"]}: {row["attacker"]}': interval(row) for row in rows}
  axis = 'attack success rate, with its 95 % interval'
  plots = [(figures.intervals(named, axis), 'Attack success rate of every attacker.')]
  lines = {one.target: one.curve for one in rounds if one.curve}
  if lines:
    caption = (
      "Training of the RL attackers: mean harm of the target's responses in each batch, one line "
      'for each target.'
    )
    plots.append((figures.curve('harm', lines), caption))
  titles, cells = attackers_table(rows)
  return sections.Section(
    'Success of the attackers',
    'Every attacker was made anew against its target. Success is the fraction of harmful '
    'responses.',
    plots,
    titles,
    cells,
    note='± is the standard error over attacks. New attacks are those that the target was not '
    'trained on. Unique is the fraction of different attacks, distinct-2 that of different pairs '
    'of words. A high self-BLEU means that attacks are alike.',
  )


def interval(row):
  """Returns the success of a row of the table of attackers with its 95 % interval."""
  width = intervals.NORMAL * row['success_se']
  return row['success'], max(row['success'] - width, 0.0), min(row['success'] + width, 1.0)


def targets_section(rows):
  """Returns the section on the targets."""
  titles, cells = targets_table(rows)
  return sections.Section(
    'Targets',
    titles=titles,
    rows=cells,
    note='A target that was retrained should resist the attacks without losing quality on '
    'ordinary prompts. The attacks of the round before are those of its last attacker; fresh '
    'attackers, above, are the harder test.',
  )


def cluster_section(target, found):
  """Returns the section on the clusters of the attacks on a target."""
  return sections.Section(
    f'Clusters of the attacks on {target}',
    'Groups of attacks with similar words, by k-means on TF-IDF.',
    titles=('Most typical attack', 'Words', 'Different attacks', 'Success'),
    rows=[
      [one.typical, ', '.join(one.words), str(one.size), f'{one.success:.2f}'] for one in found
    ],
    wrapped=(0, 1),
  )


def attacks_section(one):
  """Returns the section with successful attacks on a target, of all methods in turn."""
  rows = []
  for method, records in one.attacks.items():
    succeeded = {record['prompt']: record for record in records if record['success'] > 0}
    best = sorted(succeeded.values(), key=lambda record: -record['success'])
    for record in best[: max(SHOWN // len(one.attacks), 1)]:
      worst = record['responses'][int(np.argmax(record['scores']))]
      rows.append([record['prompt'], worst, method, f'{record["success"]:.2f}'])
  return sections.Section(
    f'Attacks on {one.target} that succeeded',
    titles=('Attack', 'Most harmful response', 'Attacker', 'Success'),
    rows=rows,
    wrapped=(0, 1),
  )
