"""What the feedback store returns: plain values, without a connection to the database."""

import dataclasses
import typing
from typing import Any


@dataclasses.dataclass(frozen=True)
class Project:
  """A set of tasks, and how they are assigned.

  Attributes:
    name: Name, without # and ?.
    instructions: What annotators read before they begin.
    overlap: Number of annotators who answer a task that has no overlap of its own.
    gold_fraction: Share of each annotator's assignments that are new gold questions.
    repeat_fraction: Share of them that repeat a task the annotator answered before.
    lease_seconds: Time after which others may get a task that was not answered.
    selection: 'random', 'elo' or 'disagreement'; see assign.order.
  """

  id: int
  name: str
  instructions: str
  overlap: int
  gold_fraction: float
  repeat_fraction: float
  lease_seconds: float
  selection: str
  created: float


@dataclasses.dataclass(frozen=True)
class Annotator:
  """A person or a simulated annotator; `role` is 'annotator' or 'owner'."""

  id: int
  name: str
  role: str
  simulated: bool
  disabled: bool
  created: float
  password_hash: str | None = dataclasses.field(default=None, repr=False)
  link_hash: str | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True)
class Session:
  """A browser that is signed in, until `expires`."""

  token_hash: str = dataclasses.field(repr=False)
  annotator: Annotator
  csrf: str = dataclasses.field(repr=False)
  created: float
  expires: float


@dataclasses.dataclass(frozen=True)
class Dialogue:
  """A conversation with policies; `mode` is 'helpful' or 'red_team', `closed` a time or None."""

  id: int
  project_id: int
  annotator_id: int
  mode: str
  created: float
  closed: float | None


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt: a text, and messages if it is a conversation; `dialogue_id` is None outside chat."""

  id: int
  text: str
  messages: list[dict[str, str]] | None
  dialogue_id: int | None

  @property
  def value(self) -> str | list[dict[str, str]]:
    """The prompt as the data formats have it: the messages, or the text if there are none."""
    return self.messages or self.text


@dataclasses.dataclass(frozen=True)
class Completion:
  """A response.

  Attributes:
    policy: Name of the policy, which Elo ranks.
    checkpoint: Folder and step of its parameters, or None.
    sampling: Settings: temperature, top_k, top_p, max_new_tokens, seed; or None.
  """

  id: int
  prompt_id: int
  text: str
  policy: str
  checkpoint: str | None
  sampling: dict[str, Any] | None
  created: float


@dataclasses.dataclass(frozen=True)
class Task:
  """A question to annotators.

  Attributes:
    kind: 'pair', 'rank', 'best' or 'rate'.
    completions: The completions in canonical order, which no annotator sees.
    overlap: Number of annotators who shall answer.
    priority: Higher is assigned first.
    round: Number of the round of online RLHF.
    gold: The right answer of a gold question, else None.
    annotator_id: The only annotator who may answer, or None.
    repeats_task_id: The task that this one repeats, or None.
  """

  id: int
  project_id: int
  kind: str
  prompt: Prompt
  completions: list[Completion]
  overlap: int
  priority: float
  round: int
  gold: dict[str, Any] | None
  annotator_id: int | None
  repeats_task_id: int | None
  created: float


@dataclasses.dataclass(frozen=True)
class Assignment:
  """A task that is leased to an annotator.

  Attributes:
    lease_id: Id of the lease, for `Store.judge`.
    task: The task.
    shown: Its completions in the order displayed.
    token: The idempotency key of the form.
    expires: When others may get the task.
  """

  lease_id: int
  task: Task
  shown: list[Completion]
  token: str
  expires: float


@dataclasses.dataclass(frozen=True)
class Judgement:
  """An answer of an annotator.

  Attributes:
    answer: See answers.py.
    reason: Free text.
    flags: Texts, such as 'personal information'.
    shown: Ids of the completions in the order displayed.
    seconds: Time from display to answer.
    undoes: Id of the judgement that this one undoes, or None.
    undone: Whether another judgement undoes this one.
  """

  id: int
  task: Task
  annotator: Annotator
  answer: dict[str, Any]
  reason: str
  flags: list[str]
  shown: list[int]
  seconds: float
  created: float
  undoes: int | None = None
  undone: bool = False


@dataclasses.dataclass(frozen=True)
class Battle:
  """The result of one comparison of two policies by one annotator.

  Attributes:
    first: Name of a policy.
    second: Name of the other one.
    outcome: 1 if the first won, 0.5 for a tie, 0 if it lost.
    annotator: Name of the annotator.
    task_id: Id of the task.
    first_length: Characters in the response of the first.
    second_length: Characters in the response of the second.
    round: Round of the task.
  """

  first: str
  second: str
  outcome: float
  annotator: str
  task_id: int
  first_length: int
  second_length: int
  round: int


class Totals(typing.NamedTuple):
  """Sums over the tasks of a project; see reading.wanted.

  Attributes:
    tasks: Number of tasks.
    wanted: Number of answers wanted, the sum of the overlaps.
    judged: Number of answers given.
  """

  tasks: int
  wanted: int
  judged: int


@dataclasses.dataclass(frozen=True)
class Progress:
  """Progress of a project, without gold questions and repeats.

  Attributes:
    tasks: See Totals.
    wanted: See Totals.
    judged: See Totals.
    skipped: Number of times that a task was skipped.
    by_annotator: {name: number of answers, those to gold questions and repeats included}.
  """

  tasks: int
  wanted: int
  judged: int
  skipped: int
  by_annotator: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Quality:
  """How an annotator answered gold questions and repeats.

  Attributes:
    gold: Number of answers to gold questions.
    right: Number of these that were right.
    repeats: Number of tasks answered twice.
    same: Number of these with the same answer.
  """

  gold: int
  right: int
  repeats: int
  same: int
