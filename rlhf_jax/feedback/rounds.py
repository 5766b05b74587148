"""Stages of iterated online RLHF that use the feedback store.

See Bai et al. 2022, §4.5 (https://arxiv.org/abs/2204.05862): people compare the responses of the
newest policies, and the next reward model learns from the comparisons of all rounds. `collect` adds
comparisons to the store, `evaluate` adds tasks that measure reward models and rank policies, and
`wait` waits for the answers of people; simulate.py answers in their place.

The tasks of a round are added in one transaction. A stage that was killed and runs again finds them
and adds none, so nobody is asked twice. Rounds count from 1.

A policy is a pair (name, folder of a language model or of the run that trained it); the store and
the Elo table know it by its name.
"""

import collections
import dataclasses
import itertools
import random
import time

import jax
import tqdm

from rlhf_jax import errors
from rlhf_jax import policy as policy_lib
from rlhf_jax import progress
from rlhf_jax.feedback import store as store_lib

INSTRUCTIONS = 'Which response is better? If you cannot tell, they are tied.'
POLL_SECONDS = 2.0  # between two looks at the store while people answer


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Samples responses of policies as completions of tasks.

  Attributes:
    policies: {name: policy.TextPolicy}.
    folders: {name: folder}.
    max_new_tokens: Maximum length of a response.
    temperature: Sampling temperature.
    seed: Random seed; policies and calls with different prompts need not have different ones.
  """

  policies: dict[str, policy_lib.TextPolicy]
  folders: dict[str, str]
  max_new_tokens: int
  temperature: float
  seed: int

  @classmethod
  def load(cls, policies, max_new_tokens, temperature, seed):
    """Loads policies; see `collect` for the arguments."""
    folders = {name: str(folder) for name, folder in policies}
    loaded = {name: policy_lib.TextPolicy.load(folder) for name, folder in folders.items()}
    return cls(loaded, folders, max_new_tokens, temperature, seed)

  def choose_prompts(self, path, count, *purpose):
    """Returns `count` texts of a data set, at random with every text equally often up to one.

    Args:
      path: Data set.
      count: Number of texts.
      *purpose: What they are for; each purpose has its own order.
    """
    texts = list(dict.fromkeys(next(iter(self.policies.values())).read_prompts(path)))
    rng, chosen = random.Random(repr((self.seed, *purpose))), []
    while len(chosen) < count:
      chosen += rng.sample(texts, len(texts))
    return chosen[:count]

  def completions(self, name, prompts, *purpose):
    """Returns one completion of a policy for each prompt, as Store.add_tasks takes them.

    Args:
      name: Name of the policy.
      prompts: List of texts.
      *purpose: Texts and numbers that tell this call from others; each has its own random key.
    """
    number = random.Random(repr((self.seed, name, *purpose))).getrandbits(31)
    samples = self.policies[name].sample(
      prompts,
      jax.random.key(number),
      max_new_tokens=self.max_new_tokens,
      temperature=self.temperature,
    )
    settings = {
      'max_new_tokens': self.max_new_tokens,
      'temperature': self.temperature,
      'seed': number,
    }
    return [
      {'text': text, 'policy': name, 'checkpoint': self.folders[name], 'sampling': settings}
      for text in samples.responses
    ]

  def tasks(self, prompts, names, round):
    """Returns tasks that rank responses, or compare two, as Store.add_tasks takes them.

    Prompts with an empty response, which a reward model cannot read, are left out, and those with a
    NUL character in a response, which a database cannot store.

    Args:
      prompts: List of texts.
      names: For each prompt, the names of the policies that respond to it.
      round: Number of the round.
    """
    responses = [[None] * len(row) for row in names]
    for policy in self.policies:
      places = [
        (i, j) for i, row in enumerate(names) for j, name in enumerate(row) if name == policy
      ]
      found = self.completions(policy, [prompts[i] for i, _ in places], round) if places else []
      for (i, j), completion in zip(places, found, strict=True):
        responses[i][j] = completion
    return [
      {
        'kind': 'pair' if len(row) == 2 else 'rank',
        'prompt': prompt,
        'completions': row,
        'round': round,
      }
      for prompt, row in zip(prompts, responses)
      if all(completion['text'].strip() and '\0' not in completion['text'] for completion in row)
    ]


def respondents(names, count, responses, newest):
  """Returns the names of the policies that respond to each prompt.

  Args:
    names: Names of the policies, the newest last.
    count: Number of prompts.
    responses: Number of responses to a prompt.
    newest: How many of them are of the newest policy, if there are others. The rest are of the
      others in turn.

  Returns:
    List of `count` lists.
  """
  *others, last = names
  turns = itertools.cycle(others or [last])
  return [[last] * newest + list(itertools.islice(turns, responses - newest)) for _ in range(count)]


def collect(
  folder,
  *,
  store,
  project,
  round,
  policies,
  prompts,
  count,
  responses,
  newest,
  max_new_tokens,
  temperature,
  seed,
):
  """Samples responses and adds the tasks of a round to the store: which responses are better.

  Every task has several responses of the newest policy, so that the reward model learns to tell
  them apart, and some of earlier policies, each of them equally often, so that Elo can rank the
  policies.

  Args:
    folder: pathlib.Path of the stage, which is not used: the tasks are in the store.
    store: URL or path of the store.
    project: Name of the project; a new one is added.
    round: Number of the round.
    policies: Policies, the newest one last.
    prompts: Data set of prompts; they are repeated if there are too few.
    count: Number of tasks.
    responses: Number of responses that a task compares: two, or more to rank.
    newest: How many of them are of the newest policy, unless it is the only one.
    max_new_tokens: Maximum length of a response.
    temperature: Sampling temperature.
    seed: Random seed.

  Raises:
    UserError: The store has comparisons of other policies in this project and round.
  """
  del folder
  with store_lib.Store.open(store) as opened:
    found = opened.add_project(project, instructions=INSTRUCTIONS)
    if has_tasks(opened, found, round, policies):
      return
    sampler = Sampler.load(policies, max_new_tokens, temperature, seed)
    texts = sampler.choose_prompts(prompts, count, project, round)
    names = respondents(list(sampler.policies), count, responses, newest)
    rows = sampler.tasks(texts, names, round)
    opened.add_tasks(found, rows)
    print(f'{store}: {len(rows)} tasks of round {round} in project {project!r}')


def evaluate(
  folder,
  *,
  store,
  project,
  rounds,
  policies,
  prompts,
  count,
  responses,
  rankings,
  max_new_tokens,
  temperature,
  seed,
):
  """Adds the tasks that measure reward models and rank policies, which nothing is trained on.

  The tasks of round i, for every i up to `rounds`, compare responses of the policy that this round
  starts from: policy i - 1. Those of round `rounds` + 1 rank one response of every policy.

  Args:
    folder: pathlib.Path of the stage, which is not used.
    store: URL or path of the store.
    project: Name of a project of its own.
    rounds: Number of rounds.
    policies: Policies: that before the first round, those of all rounds, and any others.
    prompts: Data set of prompts that no policy was trained on.
    count: Number of tasks about each policy.
    responses: See `collect`.
    rankings: Number of rankings of all policies.
    max_new_tokens: See `collect`.
    temperature: See `collect`.
    seed: See `collect`.

  Raises:
    UserError: See `collect`.
  """
  del folder
  with store_lib.Store.open(store) as opened:
    found = opened.add_project(project, instructions=INSTRUCTIONS)
    if has_tasks(opened, found, None, policies):
      return
    sampler = Sampler.load(policies, max_new_tokens, temperature, seed)
    names, rows = list(sampler.policies), []
    for number, name in enumerate(names[:rounds], 1):
      texts = sampler.choose_prompts(prompts, count, project, number)
      rows += sampler.tasks(texts, [[name] * responses] * count, number)
    texts = sampler.choose_prompts(prompts, rankings, project, 'rankings')
    ranked = sampler.tasks(texts, [names] * rankings, rounds + 1)
    rows += [row | {'kind': 'rank'} for row in ranked]
    opened.add_tasks(found, rows)
    print(f'{store}: {len(rows)} tasks in project {project!r}')


def has_tasks(store, project, round, policies):
  """Returns whether the tasks of a round are in the store.

  Args:
    store: store.Store.
    project: types.Project.
    round: Number of the round; None for any.
    policies: Policies that may be in the tasks.

  Raises:
    UserError: The tasks are about the policies of another run.
  """
  tasks = store.tasks(project, round=round)
  known = {(name, str(folder)) for name, folder in policies}
  for completion in (completion for task in tasks for completion in task.completions):
    if (completion.policy, completion.checkpoint) not in known:
      raise errors.UserError(
        f'{store.database.url}: project {project.name!r} has comparisons of policy '
        f'{completion.policy!r} in {completion.checkpoint}, which is not a policy of this run. '
        'Name another project or store.'
      )
  return bool(tasks)


def wait(folder, *, store, project, round):
  """Waits until people have answered all tasks of a round, with a progress bar.

  A task counts as answered if as many annotators as its overlap have judged or skipped it. Between
  two looks at the store nothing is open or locked.

  Args:
    folder: pathlib.Path of the stage, which is not used.
    store: URL or path of the store.
    project: Name of the project.
    round: Number of the round; None for all.
  """
  del folder
  with store_lib.Store.open(store) as opened:
    found = opened.project(project)
    done, wanted = answered(opened, found, round)
    print(f'waiting for {wanted - done} answers: rlhf label --db={store} --project={project}')
    with tqdm.tqdm(total=wanted, initial=done, desc='answered', **progress.display()) as bar:
      while done < wanted:
        time.sleep(POLL_SECONDS)
        done, wanted = answered(opened, found, round)
        bar.total = wanted
        bar.update(done - bar.n)


def answered(store, project, round):
  """Returns how many answers to the tasks of a round there are, and how many are wanted.

  Args:
    store: store.Store.
    project: types.Project.
    round: Number of the round; None for all.
  """
  counts = collections.Counter(item.task.id for item in store.judgements(project, round=round))
  tasks = store.tasks(project, round=round)
  return sum(min(counts[task.id], task.overlap) for task in tasks), sum(t.overlap for t in tasks)
