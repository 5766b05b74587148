"""Simulated annotators behind the interface of people: they ask a store for tasks and judge them.

Each has an account in the store that is marked as simulated, and so are its judgements. It gets its
tasks as people do, beside people or alone, so the tasks it answers depend on what others did; its
answer to a task depends only on the seed, the annotator and the texts. A task that repeats another
asks again, so an annotator who errs may give another answer. See annotators.py.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

from rlhf_jax import errors
from rlhf_jax import identity
from rlhf_jax.feedback import annotators
from rlhf_jax.feedback import store as store_lib
from rlhf_jax.rewards import functions


@dataclasses.dataclass(frozen=True)
class Habits:
  """How simulated annotators answer, in units of their utility; see annotators.py.

  Attributes:
    tie: Two responses whose perceived utilities differ by less are a tie; 0 for no ties.
    strengths: Perceived differences from which a preference has the strength 2, 3 and 4; () for
      pairs without a strength.
    rating_middle: Utility of a response that is rated 4.
    rating_step: Difference of utility between one rating and the next.
  """

  tie: float = 0.0
  strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
  rating_middle: float = 0.0
  rating_step: float = 1.0

  def __post_init__(self):
    steps = tuple(self.strengths)
    for good, problem in (
      (self.tie >= 0, f'tie = {self.tie} must be at least 0'),
      (
        steps == () or len(steps) == 3 and steps == tuple(sorted(steps)) and steps[0] > 0,
        f'strengths = {steps} must be three rising positive numbers, or ()',
      ),
      (self.rating_step > 0, f'rating_step = {self.rating_step} must be positive'),
    ):
      errors.need(good, f'simulated annotators: {problem}')


def accounts(store: store_lib.Store, count: int) -> list[store_lib.Annotator]:
  """Returns the accounts 'simulated 0', 'simulated 1' and so on, which are added if missing.

  Raises:
    UserError: An account of such a name is not a simulated annotator's.
  """
  found = []
  for number in range(count):
    name = f'simulated {number}'
    account = store.annotator(name=name) or store.add_annotator(name, simulated=True)[0]
    errors.need(
      account.simulated, f'the store has a person named {name!r}: give this annotator another name'
    )
    found.append(account)
  return found


def answer(
  panel: annotators.SimulatedAnnotators,
  task: store_lib.Task,
  annotator: int,
  habits: Habits = Habits(),
) -> dict[str, Any]:
  """Returns the answer of a simulated annotator to a task; see answers.py for its form.

  It does not depend on the order in which the responses are displayed.

  Args:
    panel: The simulated annotators.
    task: The task.
    annotator: Number of the annotator in the panel.
    habits: How they answer.
  """
  if task.repeats_task_id is not None:
    panel = dataclasses.replace(panel, occasion=panel.occasion + 1)
  prompt, ids = task.prompt.text, [completion.id for completion in task.completions]
  texts = [completion.text for completion in task.completions]
  if task.kind == 'rate':
    scale = dict(middle=habits.rating_middle, step=habits.rating_step)
    ratings = [panel.rate(prompt, text, annotator, **scale) for text in texts]
    return {'rating': {str(i): rating for i, rating in zip(ids, ratings)}}
  if task.kind == 'best':
    return {'best': ids[panel.pick(prompt, texts, annotator)]}
  if task.kind == 'rank':
    return {'ranking': [[ids[i]] for i in panel.rank(prompt, texts, annotator)]}
  choice, strength = panel.grade(prompt, *texts, annotator, tie=habits.tie, steps=habits.strengths)
  if texts[0] == texts[1] or choice is None:
    return {'tie': True}
  return {'chosen': ids[choice]} | ({'strength': strength} if habits.strengths else {})


def judge(
  store: store_lib.Store,
  project: store_lib.Project,
  panel: annotators.SimulatedAnnotators,
  *,
  habits: Habits = Habits(),
  limit: int | None = None,
) -> dict[str, int]:
  """Lets simulated annotators take turns until there is no task left for any of them.

  Args:
    store: The store.
    project: The project.
    panel: The simulated annotators; number i has the account 'simulated i'.
    habits: How they answer.
    limit: Largest number of judgements; None for no limit.

  Returns:
    {name of the account: number of judgements made}.
  """
  waiting = list(enumerate(accounts(store, panel.count)))
  made = {account.name: 0 for _, account in waiting}
  while waiting:
    for entry in tuple(waiting):
      if limit is not None and sum(made.values()) >= limit:
        return made
      number, account = entry
      assignment = store.next_task(project, account)
      if assignment is None:
        waiting.remove(entry)
        continue
      given = answer(panel, assignment.task, number, habits)
      store.judge(assignment, account, given, token=assignment.token)
      made[account.name] += 1
  return made


def run(
  folder: pathlib.Path,
  *,
  store: str,
  project: str,
  gold: str,
  annotator_count: int,
  annotator_temperature: float,
  label_noise: float | Sequence[float],
  disagreement: float,
  seed: int,
  gold_path: str = '',
  tie: float = 0.0,
  strengths: Sequence[float] = Habits.strengths,
) -> None:
  """Lets simulated annotators answer all open tasks of a project, as a stage of a pipeline.

  A stage that was interrupted asks nobody twice. Writes results.json, the number of judgements of
  each annotator.

  Args:
    folder: Folder of the stage.
    store: File or URL of the store; see Store.open.
    project: Name of the project.
    gold: Gold score that the annotators follow; see functions.load_gold.
    annotator_count: Number of annotators; see annotators.SimulatedAnnotators.
    annotator_temperature: Temperature of their choices.
    label_noise: Probability that a label is flipped, or one for each annotator.
    disagreement: Standard deviation of their individual preferences.
    seed: Random seed of their answers.
    gold_path: Data set of the gold score; see functions.load_gold.
    tie: See Habits.
    strengths: See Habits.

  Raises:
    UserError: There is no such project, or an argument is wrong.
  """
  panel = annotators.SimulatedAnnotators(
    functions.load_gold(gold, gold_path),
    count=annotator_count,
    seed=seed,
    temperature=annotator_temperature,
    label_noise=label_noise,
    disagreement=disagreement,
  )
  habits = Habits(tie=tie, strengths=tuple(strengths))
  with store_lib.Store.open(store) as opened:
    made = judge(opened, opened.project(project), panel, habits=habits)
  identity.write_json(folder / 'results.json', {'simulated': True, 'judgements': made})
  print(f'{store}: {sum(made.values())} judgements by {annotator_count} simulated annotators')


def check(*, gold: str, gold_path: str = '', **_: Any) -> None:
  """Checks argument `gold` of `run` before any stage runs; see pipeline.check."""
  functions.check_gold(gold, gold_path)


run.check = check
