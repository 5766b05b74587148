"""The store of human feedback: projects, tasks, annotators, and every judgement that was made.

`Store.open` opens a file of SQLite or a database of PostgreSQL. All methods may be called by
several threads and processes at once. No judgement is changed or deleted: an undo is a row of its
own. Each method commits all that it writes, or raises an error and writes nothing.
"""
# ruff: noqa: E402 (the extra is checked before the modules that need it are imported)

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import secrets
from typing import Any

from rlhf_jax.errors import UserError

try:
  import alembic
  import sqlalchemy as sa
except ImportError as error:
  raise UserError(
    f"the feedback store needs the extra 'feedback' ({error}): pip install 'rlhf_jax[feedback]'"
  ) from error
del alembic

from rlhf_jax.feedback import accounts
from rlhf_jax.feedback import answers
from rlhf_jax.feedback import database as database_lib
from rlhf_jax.feedback import judging
from rlhf_jax.feedback import leasing
from rlhf_jax.feedback import questions
from rlhf_jax.feedback import ratings as ratings_lib
from rlhf_jax.feedback import reading
from rlhf_jax.feedback import schema
from rlhf_jax.feedback.types import Annotator
from rlhf_jax.feedback.types import Assignment
from rlhf_jax.feedback.types import Battle
from rlhf_jax.feedback.types import Completion
from rlhf_jax.feedback.types import Dialogue
from rlhf_jax.feedback.types import Judgement
from rlhf_jax.feedback.types import Progress
from rlhf_jax.feedback.types import Project
from rlhf_jax.feedback.types import Prompt
from rlhf_jax.feedback.types import Quality
from rlhf_jax.feedback.types import Task


class Store:
  """The feedback in a database; see the top of the file. A context manager, which closes it."""

  def __init__(self, database: database_lib.Database):
    """Wraps a database; `open` is what callers use."""
    self.database = database
    self._ratings = ratings_lib.Ratings()

  @classmethod
  def open(cls, url: str, *, create: bool = True) -> 'Store':
    """Opens a store, creates its tables if there are none, and upgrades those of older versions.

    Args:
      url: 'x.db' or 'sqlite:///x.db', or 'postgresql://USER:PASSWORD@HOST/NAME'.
      create: Whether to make the file, or the tables, if there are none.

    Raises:
      UserError: It cannot be opened, or a newer version of the library made it.
    """
    return cls(database_lib.Database(str(url), create=create))

  def close(self) -> None:
    """Closes all connections."""
    self.database.close()

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self.close()

  # Projects.

  def add_project(
    self,
    name: str,
    *,
    instructions: str = '',
    overlap: int = 1,
    gold_fraction: float = 0.0,
    repeat_fraction: float = 0.0,
    lease_seconds: float = 600.0,
    selection: str = 'random',
  ) -> Project:
    """Adds a project, or returns the one of this name as it is; see types.Project.

    Raises:
      UserError: A value is out of range.
    """
    settings = {
      'overlap': overlap,
      'gold_fraction': gold_fraction,
      'repeat_fraction': repeat_fraction,
      'lease_seconds': lease_seconds,
      'selection': selection,
    }
    return questions.add_project(self.database, name, instructions, settings)

  def project(self, name: str) -> Project:
    """Returns the project of a name.

    Raises:
      UserError: There is none; the message names those there are.
    """
    found = self.projects()
    for project in found:
      if project.name == name:
        return project
    names = ', '.join(repr(project.name) for project in found) or 'none'
    raise UserError(f'{self.database.url} has no project {name!r}; its projects: {names}')

  def projects(self) -> list[Project]:
    """Returns all projects, oldest first."""
    with self.database.read() as session:
      rows = session.scalars(sa.select(schema.Project).order_by(schema.Project.id))
      return [reading.project(row) for row in rows]

  # Prompts, completions and tasks.

  def add_prompt(
    self,
    project: Project,
    text: str,
    messages: list[dict[str, str]] | None = None,
    dialogue: Dialogue | int | None = None,
  ) -> Prompt:
    """Adds a prompt, as text and as messages if it is a conversation, or returns the same one.

    `dialogue` is the dialogue of which it is a turn, or its id.
    """
    dialogue_id = dialogue.id if isinstance(dialogue, Dialogue) else dialogue
    with self.database.write(project.id) as session:
      row = questions.add_prompt(session, project.id, text, messages, dialogue_id)
      return reading.prompt(row)

  def add_completion(
    self,
    prompt: Prompt,
    text: str,
    *,
    policy: str,
    checkpoint: str | None = None,
    sampling: dict[str, Any] | None = None,
  ) -> Completion:
    """Adds a response to a prompt; see types.Completion for what made it."""
    with self.database.write() as session:
      row = questions.add_completion(session, prompt.id, text, policy, checkpoint, sampling)
      return reading.completion(row)

  def add_task(
    self,
    project: Project,
    kind: str,
    prompt: Prompt,
    completions: Sequence[Completion],
    *,
    overlap: int | None = None,
    priority: float = 0.0,
    round: int = 0,
    gold: answers.Answer | None = None,
    annotator: Annotator | None = None,
  ) -> Task:
    """Adds a task; see types.Task for the arguments.

    Raises:
      UserError: The completions or the gold answer do not fit.
    """
    options = questions.Options(
      overlap=overlap,
      priority=priority,
      round=round,
      gold=gold,
      annotator_id=annotator and annotator.id,
    )
    with self.database.write(project.id) as session:
      row = questions.add_task(session, project, kind, prompt.id, completions, options)
      return reading.tasks(session, [row])[0]

  def add_tasks(self, project: Project, rows: Iterable[Mapping[str, Any]]) -> list[Task]:
    """Adds tasks with their prompts and completions: all of them, or none if one does not fit.

    Args:
      project: The project.
      rows: Dicts with `prompt`, a text or messages, `completions`, a list of {"text", "policy"} and
        perhaps "checkpoint" and "sampling", and any of `kind` (by default 'pair'), `messages`,
        `overlap`, `priority`, `round` and `gold`, an answer with positions from 0 for ids.

    Raises:
      UserError: A row does not fit; the message names it, from 0.
    """
    with self.database.write(project.id) as session:
      added = [
        questions.add_row(session, project, row, f'task {number}')
        for number, row in enumerate(rows)
      ]
      return reading.tasks(session, added)

  def tasks(self, project: Project, *, round: int | None = None) -> list[Task]:
    """Returns the tasks of a project, or of one round of it, oldest first; without repeats."""
    row = schema.Task
    query = sa.select(row).where(row.project_id == project.id, row.repeats_task_id.is_(None))
    query = query if round is None else query.where(row.round == round)
    with self.database.read() as session:
      return reading.tasks(session, list(session.scalars(query.order_by(row.id))))

  def checkpoints(self, project: Project) -> dict[str, list[str]]:
    """Returns {policy: checkpoints that gave its completions}, sorted, without unknown ones."""
    row = schema.Completion
    query = sa.select(row.policy, row.checkpoint).distinct()
    query = query.join(schema.Prompt, row.prompt_id == schema.Prompt.id)
    query = query.where(schema.Prompt.project_id == project.id, row.checkpoint.is_not(None))
    found: dict[str, list[str]] = {}
    with self.database.read() as session:
      for policy, checkpoint in session.execute(query.order_by(row.policy, row.checkpoint)):
        found.setdefault(policy, []).append(checkpoint)
    return found

  # Annotators; more about them in `accounts`.

  def add_annotator(
    self,
    name: str,
    *,
    role: str = 'annotator',
    password_hash: str | None = None,
    simulated: bool = False,
  ) -> tuple[Annotator, str | None]:
    """Adds an annotator, and returns it with the token of a personal link.

    The store keeps only a hash of the token. A simulated annotator gets none and cannot sign in.

    Raises:
      UserError: The name is taken or not printable, or the role unknown.
    """
    token = None if simulated else secrets.token_urlsafe(32)
    row = accounts.new_row(
      name, role=role, password_hash=password_hash, token=token, simulated=simulated
    )
    return accounts.add(self.database, row), token

  def annotator(
    self, name: str | None = None, id: int | None = None, token: str | None = None
  ) -> Annotator | None:
    """Returns the annotator with a name, an id or the token of a personal link, or None."""
    return accounts.find(self.database, name=name, id=id, token=token)

  def annotators(self) -> list[Annotator]:
    """Returns all annotators, oldest first."""
    return accounts.everyone(self.database)

  def disable(self, annotator: Annotator) -> Annotator:
    """Takes the right to sign in and to judge from an annotator; their judgements stay."""
    return accounts.change(self.database, annotator, disabled=True)

  # Labelling.

  def next_task(
    self, project: Project, annotator: Annotator, now: float | None = None
  ) -> Assignment | None:
    """Returns the open assignment of an annotator, or else assigns a task; None if none is left.

    Turns of dialogues are not assigned: see `lease`. `now` is the time in seconds, for tests.

    Raises:
      UserError: The annotator is disabled.
    """
    now = judging.now_or(now)
    ratings = self._ratings.get(self.database, project) if project.selection == 'elo' else {}
    with self.database.write(project.id) as session:
      judging.check_enabled(session, annotator)
      lease = leasing.next_lease(session, project, annotator.id, now, ratings)
      return lease and leasing.assignment(session, lease)

  def lease(self, project: Project, task: Task, annotator: Annotator) -> Assignment:
    """Assigns one task, such as a turn of a dialogue, to the only annotator who may answer it.

    Raises:
      UserError: The task belongs to nobody, to another annotator, or has been answered.
    """
    with self.database.write(project.id) as session:
      judging.check_enabled(session, annotator)
      lease = leasing.own_lease(session, project, task.id, annotator, judging.now_or(None))
      return leasing.assignment(session, lease)

  def judge(
    self,
    assignment: Assignment | int,
    annotator: Annotator,
    answer: answers.Answer,
    *,
    reason: str = '',
    flags: Sequence[str] = (),
    seconds: float = 0.0,
    token: str,
    now: float | None = None,
  ) -> Judgement:
    """Stores the answer to an assignment, or to the id of its lease; see types.Judgement.

    Args:
      token: Idempotency key: with a token that was used before, the first judgement is returned.

    Raises:
      UserError: The answer does not fit the task; the task is assigned to another annotator, or was
        taken by others after the lease had expired; the judgement of the token was undone; the
        database cannot be written.
    """
    lease_id = assignment.lease_id if isinstance(assignment, Assignment) else assignment
    form = judging.Form(answer=answer, reason=reason, flags=flags, seconds=seconds, token=token)
    return judging.judge(self.database, lease_id, annotator, form, judging.now_or(now))

  def undo(
    self,
    project: Project,
    annotator: Annotator,
    *,
    judgement: int | None = None,
    now: float | None = None,
  ) -> Judgement | None:
    """Undoes the newest judgement of an annotator that counts, and assigns its task to them again.

    Turns of dialogues and imported judgements stay.

    Args:
      judgement: Id of the one to undo: if it is not the newest, as when a form is sent twice,
        nothing is undone.

    Returns:
      The row that undoes it, or None if nothing is undone.
    """
    return judging.undo(self.database, project, annotator, judgement, judging.now_or(now))

  # Reading.

  def progress(self, project: Project) -> Progress:
    """Returns how many judgements are wanted and there."""
    with self.database.read() as session:
      return reading.progress(session, project.id)

  def judgements(
    self,
    project: Project,
    *,
    round: int | None = None,
    include_undone: bool = False,
    until: int | None = None,
  ) -> list[Judgement]:
    """Returns judgements, oldest first; see `reading.judgements`."""
    with self.database.read() as session:
      return reading.judgements(
        session, project.id, round=round, include_undone=include_undone, until=until
      )

  def battles(self, project: Project, *, round: int | None = None) -> list[Battle]:
    """Returns the results between policies; see `reading.battles`."""
    return reading.battles(self.judgements(project, round=round))

  def quality(self, project: Project) -> dict[str, Quality]:
    """Returns {name: answers of each annotator to gold questions and repeats}."""
    return reading.quality(self.judgements(project))

  def records(
    self,
    project: Project,
    *,
    form: str = 'pairs',
    round: int | None = None,
    simulated: bool | None = None,
    until: int | None = None,
  ) -> list[dict[str, Any]]:
    """Returns the judgements in the library's data formats; see `reading.records`."""
    found = self.judgements(project, round=round, until=until)
    return [record for record, _ in reading.records(found, form=form, simulated=simulated)]

  def fingerprint(
    self,
    project: Project,
    *,
    form: str = 'pairs',
    round: int | None = None,
    simulated: bool | None = None,
    until: int | None = None,
  ) -> str:
    """Returns a hash of what `records` returns for the same arguments."""
    found = self.judgements(project, round=round, until=until)
    return reading.fingerprint(reading.records(found, form=form, simulated=simulated))

  def last(self, project: Project) -> int:
    """Returns the id of the newest judgement; 0 if there is none."""
    with self.database.read() as session:
      return reading.last(session, project.id)
