"""The tables of the feedback store, as SQLAlchemy maps them.

A row of `judgements` is never updated or deleted: an undo is a row of its own. Times are seconds
since 1970, UTC. A change of a table needs a migration in `migrations/versions` and a new `VERSION`.
"""

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.orm import Mapped
from sqlalchemy.orm import mapped_column

VERSION = '0001'  # the newest migration
KINDS = ('pair', 'rank', 'best', 'rate')
SELECTIONS = ('random', 'elo', 'disagreement')
ROLES = ('annotator', 'owner')
MODES = ('helpful', 'red_team')

OPEN = 'judged < overlap'  # condition of the tasks that wait for judgements

JSON = sa.JSON(none_as_null=True)


class Base(orm.DeclarativeBase):
  """Base of all tables, whose constraints have names that a migration can refer to."""

  metadata = sa.MetaData(
    naming_convention={
      'ix': 'ix_%(table_name)s_%(column_0_N_name)s',
      'uq': 'uq_%(table_name)s_%(column_0_N_name)s',
      'fk': 'fk_%(table_name)s_%(column_0_N_name)s',
      'pk': 'pk_%(table_name)s',
    }
  )


def _key(table: str, *, index: bool = False, optional: bool = False, unique: bool = False):
  """Returns a column that refers to the id of a row of a table."""
  return mapped_column(sa.ForeignKey(f'{table}.id'), index=index, nullable=optional, unique=unique)


class Project(Base):
  """A set of tasks with one way to assign them.

  Columns: settings, the arguments of `Store.add_project` as JSON.
  """

  __tablename__ = 'projects'
  id: Mapped[int] = mapped_column(primary_key=True)
  name: Mapped[str] = mapped_column(unique=True)
  instructions: Mapped[str]
  settings: Mapped[dict] = mapped_column(JSON)
  created: Mapped[float]


class Annotator(Base):
  """A person who labels, or a simulated annotator.

  Columns: link_hash, the SHA-256 of the token of the personal link; password_hash, by argon2.
  """

  __tablename__ = 'annotators'
  id: Mapped[int] = mapped_column(primary_key=True)
  name: Mapped[str] = mapped_column(unique=True)
  role: Mapped[str]
  password_hash: Mapped[str | None]
  link_hash: Mapped[str | None] = mapped_column(unique=True)
  simulated: Mapped[bool]
  disabled: Mapped[bool]
  created: Mapped[float]


class Session(Base):
  """A browser that is signed in."""

  __tablename__ = 'sessions'
  token_hash: Mapped[str] = mapped_column(primary_key=True)
  annotator_id: Mapped[int] = _key('annotators', index=True)
  csrf: Mapped[str]
  created: Mapped[float]
  expires: Mapped[float]


class Dialogue(Base):
  """A conversation of an annotator with policies; its turns are prompts."""

  __tablename__ = 'dialogues'
  id: Mapped[int] = mapped_column(primary_key=True)
  project_id: Mapped[int] = _key('projects', index=True)
  annotator_id: Mapped[int] = _key('annotators', index=True)
  mode: Mapped[str]
  created: Mapped[float]
  closed: Mapped[float | None]


class Prompt(Base):
  """A prompt.

  Columns: digest, of text, messages and dialogue; dialogue_id, null outside chat.
  """

  __tablename__ = 'prompts'
  __table_args__ = (sa.UniqueConstraint('project_id', 'digest'),)
  id: Mapped[int] = mapped_column(primary_key=True)
  project_id: Mapped[int] = _key('projects')
  dialogue_id: Mapped[int | None] = _key('dialogues', index=True, optional=True)
  text: Mapped[str]
  messages: Mapped[list | None] = mapped_column(JSON)
  digest: Mapped[str]


class Completion(Base):
  """A response to a prompt, and what made it."""

  __tablename__ = 'completions'
  id: Mapped[int] = mapped_column(primary_key=True)
  prompt_id: Mapped[int] = _key('prompts', index=True)
  text: Mapped[str]
  policy: Mapped[str]
  checkpoint: Mapped[str | None]
  sampling: Mapped[dict | None] = mapped_column(JSON)
  created: Mapped[float]


class Task(Base):
  """A question to annotators about one or more completions of a prompt.

  Columns:
    policies: names of the policies of its completions, sorted, as a JSON list; empty text for gold
      questions and repeats, which say nothing about policies.
    shuffle: number in [0, 1) that orders tasks of equal priority at random.
    judged: number of judgements that count, without those that skip the task.
  """

  __tablename__ = 'tasks'
  __table_args__ = (
    sa.Index(
      'ix_tasks_open',
      'project_id',
      sa.text('priority DESC'),
      'shuffle',
      sqlite_where=sa.text(OPEN),
      postgresql_where=sa.text(OPEN),
    ),
    sa.Index('ix_tasks_policies', 'project_id', 'policies', 'judged'),
  )
  id: Mapped[int] = mapped_column(primary_key=True)
  project_id: Mapped[int] = _key('projects')
  kind: Mapped[str]
  prompt_id: Mapped[int] = _key('prompts', index=True)
  completion_ids: Mapped[list] = mapped_column(JSON)
  policies: Mapped[str]
  overlap: Mapped[int]
  priority: Mapped[float]
  shuffle: Mapped[float]
  round: Mapped[int]
  gold: Mapped[dict | None] = mapped_column(JSON)
  annotator_id: Mapped[int | None] = _key('annotators', index=True, optional=True)
  repeats_task_id: Mapped[int | None] = _key('tasks', optional=True)
  judged: Mapped[int]
  created: Mapped[float]


class Lease(Base):
  """The assignment of a task to an annotator, until it is judged or expires.

  Columns: shown, ids of the completions in the order displayed; token, of the form that is shown;
  created, when it began, or began again after it had expired.
  """

  __tablename__ = 'leases'
  # An id is never used again, so that a form of an old lease does not answer a new one.
  __table_args__ = (
    sa.UniqueConstraint('task_id', 'annotator_id'),
    {'sqlite_autoincrement': True},
  )
  id: Mapped[int] = mapped_column(primary_key=True)
  task_id: Mapped[int] = _key('tasks')
  annotator_id: Mapped[int] = _key('annotators', index=True)
  shown: Mapped[list] = mapped_column(JSON)
  token: Mapped[str]
  created: Mapped[float]
  expires: Mapped[float]


class Judgement(Base):
  """An answer of an annotator to a task, or the undoing of one.

  Columns: see the `Judgement` of types.py; token, the idempotency key of the form.
  """

  __tablename__ = 'judgements'
  __table_args__ = (sa.Index('ix_judgements_annotator_id_task_id', 'annotator_id', 'task_id'),)
  id: Mapped[int] = mapped_column(primary_key=True)
  task_id: Mapped[int] = _key('tasks', index=True)
  annotator_id: Mapped[int] = _key('annotators')
  answer: Mapped[dict] = mapped_column(JSON)
  reason: Mapped[str]
  flags: Mapped[list] = mapped_column(JSON)
  shown: Mapped[list] = mapped_column(JSON)
  seconds: Mapped[float]
  created: Mapped[float]
  undoes: Mapped[int | None] = _key('judgements', optional=True, unique=True)
  token: Mapped[str] = mapped_column(unique=True)
