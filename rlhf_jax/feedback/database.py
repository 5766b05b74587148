"""The connection to the database of the feedback store: SQLite in a file, or PostgreSQL.

Every write takes the lock of what it writes before it reads: on SQLite that of the whole database
(BEGIN IMMEDIATE), on PostgreSQL the row of the project. So writes to a project follow one another,
and what a write decides still holds when it is committed. Annotators belong to no project: imports
that add some also take `lock_annotators`, so that those with the same names wait for each other.
"""

import contextlib
import os
import pathlib
import re

from alembic import command
from alembic import config as alembic_config
from alembic import script
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy import exc
from sqlalchemy import orm

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import schema

BUSY_SECONDS = 30  # how long a connection waits for the writes of others
# Numbers of advisory locks of PostgreSQL: under one tables are made, under the other annotators.
UPGRADE_LOCK, ANNOTATORS_LOCK = 0x726C6866, 0x726C6867


class Database:
  """A database with the tables of `schema`.

  Attributes:
    url: URL without its password, for messages.
    engine: Engine of SQLAlchemy.
  """

  def __init__(self, url: str, *, create: bool = True):
    """Connects, and creates or upgrades the tables.

    Args:
      url: Path of a file, 'sqlite:///PATH' or 'postgresql://USER:PASSWORD@HOST/NAME'.
      create: Whether to make the file of SQLite, or the tables, if there are none.

    Raises:
      UserError: The database cannot be opened, or is of a newer version of the library.
    """
    address = parse(url)
    self.url = address.render_as_string(hide_password=True)
    self.engine = sa.create_engine(address, **_options(address))
    self._reader, self._writer = self.engine, self.engine.execution_options(immediate=True)
    if address.get_backend_name() == 'sqlite':
      if not create and not os.path.exists(address.database):
        raise UserError(f'{self.url}: there is no such file (current directory: {os.getcwd()})')
      event.listen(self.engine, 'connect', _prepare)
      event.listen(self.engine, 'begin', _begin)
    else:
      self._reader = self.engine.execution_options(isolation_level='REPEATABLE READ')
    try:
      with self.engine.connect() as connection:
        current = _version(connection)
      if current is None and not create:
        raise UserError(f'{self.url}: the database has no tables of a feedback store')
      if current != schema.VERSION:
        self._upgrade()
    except exc.DBAPIError as error:
      self.engine.dispose()
      raise UserError(
        f'{self.url}: the database cannot be opened ({_brief(error)}). Check the URL, that its '
        'folder exists and can be written, and that the server runs.'
      ) from error
    except UserError:
      self.engine.dispose()
      raise

  @contextlib.contextmanager
  def read(self):
    """Yields a session that sees one state of the database."""
    with orm.Session(self._reader, expire_on_commit=False) as session:
      yield session

  @contextlib.contextmanager
  def write(self, project_id: int | None = None):
    """Yields a session whose changes are committed at the end, all or none.

    Args:
      project_id: Project whose other writes wait; None if nothing is decided by its tasks.

    Raises:
      UserError: The changes cannot be written, as on a full disk.
      sqlalchemy.exc.IntegrityError: They break a constraint.
    """
    try:
      with orm.Session(self._writer, expire_on_commit=False) as session, session.begin():
        if project_id is not None:
          query = sa.select(schema.Project.id).where(schema.Project.id == project_id)
          session.execute(query.with_for_update(key_share=True))
        yield session
    except exc.IntegrityError:
      raise
    except exc.DBAPIError as error:
      raise UserError(
        f'{self.url}: the database cannot be written, so nothing was stored ({_brief(error)}). '
        'Check that its disk has space and that it runs, and try again.'
      ) from error

  def close(self) -> None:
    """Closes all connections."""
    self.engine.dispose()

  def _upgrade(self):
    with self._writer.begin() as connection:
      if connection.dialect.name == 'postgresql':
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(UPGRADE_LOCK)))
      current = _version(connection)  # another process may have been first
      settings = alembic_config.Config()
      folder = str(pathlib.Path(__file__).parent / 'migrations')
      settings.set_main_option('script_location', folder.replace('%', '%%'))
      settings.set_main_option('path_separator', 'os')
      settings.attributes['connection'] = connection
      known = [item.revision for item in script.ScriptDirectory(folder).walk_revisions()]
      if current is not None and current not in known:
        raise UserError(
          f'{self.url}: the database has schema version {current!r}, and this version of rlhf_jax '
          f'knows versions up to {schema.VERSION!r}. Install a newer rlhf_jax; nothing was changed.'
        )
      if current is None and _has_other_tables(connection):
        raise UserError(
          f'{self.url}: the database has tables, but not those of a feedback store. Name another.'
        )
      command.upgrade(settings, 'head')


def lock_annotators(session: orm.Session) -> None:
  """Lets other callers wait until the session's changes are committed.

  Nobody else waits, and whoever adds an annotator without this lock may be adding the same name. On
  SQLite a session that writes has the lock of the whole database already.
  """
  if session.get_bind().dialect.name == 'postgresql':
    session.execute(sa.select(sa.func.pg_advisory_xact_lock(ANNOTATORS_LOCK)))


def parse(url: str) -> sa.URL:
  """Returns the URL of a database; a text without '://' is the path of an SQLite file.

  Raises:
    UserError: It is neither SQLite in a file nor PostgreSQL.
  """
  try:
    address = sa.make_url(url) if '://' in url else sa.URL.create('sqlite', database=url)
  except exc.ArgumentError as error:
    raise UserError(f'{url!r} is not the URL of a database: {error}') from error
  if address.drivername in ('postgresql', 'postgres'):
    address = address.set(drivername='postgresql+psycopg')
  if address.drivername == 'postgresql+psycopg':
    return address
  if address.drivername in ('sqlite', 'sqlite+pysqlite'):
    if address.database in (None, '', ':memory:'):
      raise UserError(f'{url!r}: a feedback store needs a file, such as sqlite:///feedback.db')
    return address
  raise UserError(
    f'{address.render_as_string()}: a feedback store is a file of SQLite, or PostgreSQL: '
    'feedback.db, sqlite:///feedback.db or postgresql://USER:PASSWORD@HOST/NAME'
  )


def _options(address: sa.URL):
  if address.get_backend_name() == 'sqlite':
    return {'connect_args': {'timeout': BUSY_SECONDS, 'check_same_thread': False}}
  return {'pool_pre_ping': True, 'isolation_level': 'READ COMMITTED'}


def _prepare(connection, record):
  """Sets up a connection to SQLite: write-ahead log, foreign keys, and no implicit BEGIN."""
  del record
  connection.isolation_level = None
  for pragma in ('journal_mode = WAL', 'foreign_keys = ON', 'synchronous = FULL'):
    connection.execute(f'PRAGMA {pragma}')


def _begin(connection):
  options = connection.get_execution_options()
  connection.exec_driver_sql('BEGIN IMMEDIATE' if options.get('immediate') else 'BEGIN')


def _version(connection: sa.Connection) -> str | None:
  """Returns the version of the tables; None if there are none."""
  if not sa.inspect(connection).has_table('alembic_version'):
    return None
  return connection.scalar(sa.text('SELECT version_num FROM alembic_version'))


def _has_other_tables(connection: sa.Connection) -> bool:
  return bool(sa.inspect(connection).get_table_names())


def _brief(error: exc.DBAPIError) -> str:
  """Returns the first line of the driver's message, without passwords."""
  return re.sub(r'password=\S+', 'password=...', str(error.orig).strip().partition('\n')[0])
