"""People as the judge of a comparison of policies, by their judgements in a feedback store.

Pairs of responses that nobody has judged become tasks of the project. The comparison then stops;
once people have answered, the same command samples the same responses and finds their judgements.
"""

import itertools

import numpy as np

from rlhf_jax import errors
from rlhf_jax.feedback import source


def outcomes(path, samples):
  """Returns who wins between each two policies, from judgements of their responses.

  Args:
    path: 'feedback:URL#PROJECT', with the options `round` and `simulated`; see feedback/source.py.
      New tasks are of that round, by default 0.
    samples: {name of a policy: Samples} with the same n prompts.

  Returns:
    {(first, second): [n] float}, the mean over judgements of 1 if the first policy won, 0.5 for a
    tie, 0 if it lost. Equal responses are a tie.

  Raises:
    UserError: There is no such project, or some pairs wait for judgements.
  """
  from rlhf_jax.feedback import store as store_lib  # needs the extra 'feedback'

  parts = source.parse(path)
  errors.need(
    not parts.options.keys() - {'round', 'simulated'},
    f'judge={path}: a judge has the options round and simulated only',
  )
  with store_lib.Store.open(parts.url) as store:
    project = store.project(parts.project)
    number = parts.options.get('round')
    known = _judged(store.judgements(project, round=number), parts.options.get('simulated'))
    pairs = list(itertools.combinations(samples, 2))
    missing = {
      key: names
      for names in pairs
      for key in _keys(samples, *names)
      if key not in known and key[1] != key[2]
    }
    if missing:
      asked = set(itertools.chain.from_iterable(map(_of_task, store.tasks(project, round=number))))
      new = {key: names for key, names in missing.items() if key not in asked}
      store.add_tasks(project, [_task(key, names, number or 0) for key, names in new.items()])
      raise errors.UserError(
        f'judge={path}: {len(missing)} pairs of responses wait for judgements, of which {len(new)} '
        f'are new tasks of the project. Label them with `rlhf label --db={parts.url}`, then run '
        'the same command again: it samples the same responses.'
      )
  value = lambda key: 0.5 if key[1] == key[2] else float(np.mean(known[key]))
  return {names: np.array([value(key) for key in _keys(samples, *names)]) for names in pairs}


def _keys(samples, first, second):
  """Returns (prompt, response of the first, response of the second) of each prompt."""
  a, b = samples[first], samples[second]
  return list(zip(a.prompts, a.responses, b.responses, strict=True))


def _task(key, names, number):
  prompt, *texts = key
  completions = [{'text': text, 'policy': name} for text, name in zip(texts, names, strict=True)]
  return {'prompt': prompt, 'completions': completions, 'round': number}


def _of_task(task):
  """Yields the keys of all pairs of completions of a task, in both orders."""
  if task.kind != 'rate':
    for a, b in itertools.permutations(task.completions, 2):
      yield task.prompt.text, a.text, b.text


def _judged(judgements, simulated):
  """Returns {key: outcomes of the first response}, in both orders."""
  from rlhf_jax.feedback import answers
  from rlhf_jax.feedback import reading

  found = {}
  for item in judgements:
    task, ids = item.task, [completion.id for completion in item.task.completions]
    if not reading.is_ordinary(task) or answers.skipped(item.answer) or task.kind == 'rate':
      continue
    if simulated is not None and item.annotator.simulated != simulated:
      continue
    order = answers.ranks(task.kind, ids, item.answer)
    for i, j in itertools.permutations(range(len(ids)), 2):
      if task.kind == 'best' and order[i] == order[j]:
        continue  # all but the best one
      key = task.prompt.text, task.completions[i].text, task.completions[j].text
      outcome = 0.5 if order[i] == order[j] else float(order[i] < order[j])
      found.setdefault(key, []).append(outcome)
  return found
