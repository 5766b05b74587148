"""Annotators, their sessions and their dialogues, as rows of the feedback store."""

import hashlib
import secrets
import time
import unicodedata

import sqlalchemy as sa
from sqlalchemy import exc

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import database as database_lib
from rlhf_jax.feedback import reading
from rlhf_jax.feedback import schema
from rlhf_jax.feedback import types

MAX_NAME = 100  # characters


def link_hash(token: str) -> str:
  """Returns the SHA-256 of the token of a personal link or of a session."""
  return hashlib.sha256(token.encode()).hexdigest()


def clean(name: str) -> str:
  """Returns a name as the store keeps it: without space around it, in Unicode's form NFC."""
  return unicodedata.normalize('NFC', name.strip())


def add(database: database_lib.Database, row: schema.Annotator) -> types.Annotator:
  """Adds an annotator.

  Raises:
    UserError: The name is taken.
  """
  try:
    with database.write() as session:
      session.add(row)
  except exc.IntegrityError as error:
    raise UserError(f'there is already an annotator {row.name!r}: choose another name') from error
  return reading.annotator(row)


def new_row(
  name: str,
  *,
  role: str = 'annotator',
  password_hash: str | None = None,
  token: str | None = None,
  simulated: bool = False,
) -> schema.Annotator:
  """Returns the row of a new annotator.

  Raises:
    UserError: The name is not printable, or the role unknown.
  """
  if role not in schema.ROLES:
    raise UserError(f'role={role!r} must be one of {", ".join(schema.ROLES)}')
  name = clean(name)
  if not name or len(name) > MAX_NAME or not name.isprintable():
    raise UserError(
      f'{name!r} is no name of an annotator: it must have 1 to {MAX_NAME} printable characters'
    )
  return schema.Annotator(
    name=name,
    role=role,
    password_hash=password_hash,
    link_hash=None if token is None else link_hash(token),
    simulated=simulated,
    disabled=False,
    created=time.time(),
  )


def find(
  database: database_lib.Database,
  *,
  name: str | None = None,
  id: int | None = None,
  token: str | None = None,
) -> types.Annotator | None:
  """Returns the annotator with a name, an id or the token of a personal link, or None."""
  row = schema.Annotator
  if token is not None:
    condition = row.link_hash == link_hash(token)
  else:
    condition = row.id == id if id is not None else row.name == clean(name or '')
  with database.read() as session:
    found = session.scalar(sa.select(row).where(condition))
    return None if found is None else reading.annotator(found)


def everyone(database: database_lib.Database) -> list[types.Annotator]:
  """Returns all annotators, oldest first."""
  with database.read() as session:
    rows = session.scalars(sa.select(schema.Annotator).order_by(schema.Annotator.id))
    return [reading.annotator(row) for row in rows]


def change(
  database: database_lib.Database,
  annotator: types.Annotator,
  *,
  disabled: bool | None = None,
  password_hash: str | None = None,
  token: str | None = None,
) -> types.Annotator:
  """Changes what is not None of an annotator, ends their sessions, and returns the annotator.

  A new token, of a personal link, also removes the password: who had the old link may have set it.
  """
  with database.write() as session:
    row = session.get(schema.Annotator, annotator.id)
    row.disabled = row.disabled if disabled is None else disabled
    row.password_hash = password_hash or row.password_hash
    if token is not None:
      row.link_hash, row.password_hash = link_hash(token), None
    ended = sa.delete(schema.Session).where(schema.Session.annotator_id == annotator.id)
    session.execute(ended)
  return reading.annotator(row)


def add_session(
  database: database_lib.Database, annotator: types.Annotator, seconds: float, now: float
) -> tuple[types.Session, str]:
  """Adds a session, removes all that have expired, and returns (session, token of its cookie)."""
  token = secrets.token_urlsafe(32)
  row = schema.Session(
    token_hash=link_hash(token),
    annotator_id=annotator.id,
    csrf=secrets.token_urlsafe(32),
    created=now,
    expires=now + seconds,
  )
  with database.write() as session:
    session.execute(sa.delete(schema.Session).where(schema.Session.expires <= now))
    session.add(row)
  return _session(row, annotator), token


def find_session(database: database_lib.Database, token: str, now: float) -> types.Session | None:
  """Returns the session of a cookie's token; None if it expired or its annotator is disabled."""
  query = sa.select(schema.Session, schema.Annotator)
  query = query.join(schema.Annotator, schema.Session.annotator_id == schema.Annotator.id)
  query = query.where(
    schema.Session.token_hash == link_hash(token),
    schema.Session.expires > now,
    schema.Annotator.disabled.is_(False),
  )
  with database.read() as session:
    found = session.execute(query).first()
    return None if found is None else _session(found[0], reading.annotator(found[1]))


def end_session(database: database_lib.Database, token: str) -> None:
  """Removes the session of a cookie's token."""
  with database.write() as session:
    row = schema.Session.token_hash == link_hash(token)
    session.execute(sa.delete(schema.Session).where(row))


def _session(row, annotator):
  return types.Session(row.token_hash, annotator, row.csrf, row.created, row.expires)


def add_dialogue(
  database: database_lib.Database,
  project: types.Project,
  annotator: types.Annotator,
  mode: str,
) -> types.Dialogue:
  """Starts a dialogue of an annotator; `mode` is 'helpful' or 'red_team'."""
  if mode not in schema.MODES:
    raise UserError(f'mode={mode!r} must be one of {", ".join(schema.MODES)}')
  row = schema.Dialogue(
    project_id=project.id, annotator_id=annotator.id, mode=mode, created=time.time(), closed=None
  )
  with database.write() as session:
    session.add(row)
  return dialogue(row)


def dialogues(
  database: database_lib.Database,
  project: types.Project,
  annotator: types.Annotator | None = None,
) -> list[types.Dialogue]:
  """Returns the dialogues of a project, of one annotator or of all, oldest first."""
  row = schema.Dialogue
  query = sa.select(row).where(row.project_id == project.id).order_by(row.id)
  if annotator is not None:
    query = query.where(row.annotator_id == annotator.id)
  with database.read() as session:
    return [dialogue(found) for found in session.scalars(query)]


def close_dialogue(database: database_lib.Database, dialogue: types.Dialogue) -> None:
  """Marks a dialogue as ended."""
  with database.write() as session:
    row = session.get(schema.Dialogue, dialogue.id)
    if row.closed is None:
      row.closed = time.time()


def dialogue(row: schema.Dialogue) -> types.Dialogue:
  """Returns the dialogue of a row."""
  return types.Dialogue(
    id=row.id,
    project_id=row.project_id,
    annotator_id=row.annotator_id,
    mode=row.mode,
    created=row.created,
    closed=row.closed,
  )
