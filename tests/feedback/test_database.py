"""The database of the feedback store: migrations, other databases, and a full disk."""

import sqlite3

from alembic import migration
import pytest
import sqlalchemy as sa

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import database as database_lib
from rlhf_jax.feedback import schema
from rlhf_jax.feedback import store as store_lib


def described(engine):
  """Returns the lines of the commands on SQLite; elsewhere columns, keys and indexes."""
  if engine.dialect.name == 'sqlite':
    with engine.connect() as connection:
      rows = connection.exec_driver_sql('SELECT name, sql FROM sqlite_master').all()
    lines = lambda sql: sorted(line.strip('\t, ') for line in (sql or '').splitlines())
    return {name: lines(sql) for name, sql in rows if 'alembic' not in name}
  inspector, found = sa.inspect(engine), {}
  for table in schema.Base.metadata.tables:
    columns = [(c['name'], str(c['type']), c['nullable']) for c in inspector.get_columns(table)]
    keys = inspector.get_foreign_keys(table) + inspector.get_unique_constraints(table)
    found[table] = (
      columns,
      *(
        sorted(map(str, items))
        for items in (keys, inspector.get_indexes(table), [inspector.get_pk_constraint(table)])
      ),
    )
  return found


def test_the_migrations_make_the_tables_of_the_schema(database_url, tmp_path, request):
  database = database_lib.Database(database_url)
  if database.engine.dialect.name == 'sqlite':
    other = f'sqlite:///{tmp_path}/other.db'
  else:
    other = request.getfixturevalue('postgres')()
  plain = sa.create_engine(database_lib.parse(other))
  schema.Base.metadata.create_all(plain)
  assert described(database.engine) == described(plain)
  with database.engine.connect() as connection:
    context = migration.MigrationContext.configure(connection)
    assert context.get_current_revision() == schema.VERSION
  plain.dispose()
  database.close()


def test_a_newer_schema_is_refused_and_not_changed(tmp_path):
  path = tmp_path / 'x.db'
  store_lib.Store.open(path).close()
  with sqlite3.connect(path) as connection:
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
  connection.close()
  before = path.read_bytes()
  with pytest.raises(UserError, match="schema version '9999'.*Install a newer rlhf_jax"):
    store_lib.Store.open(path)
  assert path.read_bytes() == before


def test_other_databases_are_refused(tmp_path):
  with sqlite3.connect(tmp_path / 'other.db') as connection:
    connection.execute('CREATE TABLE things (x)')
  connection.close()
  (tmp_path / 'text.db').write_text('not a database, but long enough to look like one' * 100)
  for url, message in (
    (tmp_path / 'other.db', 'not those of a feedback store'),
    (tmp_path / 'text.db', 'cannot be opened .*not a database'),
    (tmp_path / 'missing' / 'x.db', 'cannot be opened'),
    ('sqlite://', 'needs a file'),
    ('mysql://name:secret@host/x', r'mysql://name:\*\*\*@host/x: a feedback store is'),
    ('postgresql://me:secret@127.0.0.1:1/x', r'me:\*\*\*@127.0.0.1.*cannot be opened'),
  ):
    with pytest.raises(UserError, match=message) as caught:
      store_lib.Store.open(url)
    assert 'secret' not in str(caught.value)


def test_a_full_disk_is_an_error_and_nothing_is_half_written(tmp_path):
  """PRAGMA max_page_count makes SQLite report what a full disk does."""
  with store_lib.Store.open(tmp_path / 'x.db') as store:
    project = store.add_project('p')
    completions = [{'text': text, 'policy': text} for text in 'xy']
    store.add_tasks(project, [{'prompt': f'{i}', 'completions': completions} for i in range(50)])
    annotator, _ = store.add_annotator('Ada')

    def limit(connection, record, proxy):
      del record, proxy
      pages = connection.execute('PRAGMA page_count').fetchone()[0]
      connection.execute(f'PRAGMA max_page_count = {pages}')

    sa.event.listen(store.database.engine, 'checkout', limit)
    acknowledged = []
    with pytest.raises(UserError, match='cannot be written, so nothing was stored .*full'):
      for _ in range(50):
        assignment = store.next_task(project, annotator)
        done = store.judge(
          assignment, annotator, {'tie': True}, reason='r' * 3000, token=assignment.token
        )
        acknowledged.append(done.id)
    assert len(acknowledged) < 50
    sa.event.remove(store.database.engine, 'checkout', limit)
    found = store.judgements(project)
    assert [j.id for j in found] == acknowledged
    with store.database.engine.connect() as connection:
      connection.exec_driver_sql('PRAGMA max_page_count = 1000000')
      assert connection.exec_driver_sql('PRAGMA integrity_check').scalar() == 'ok'
    assert store.progress(project).judged == len(acknowledged)
    # With space again, the same form is accepted.
    assignment = store.next_task(project, annotator)
    store.judge(assignment, annotator, {'tie': True}, reason='r' * 3000, token=assignment.token)
    assert store.progress(project).judged == len(acknowledged) + 1


def test_texts_that_a_database_cannot_store(tmp_path):
  with store_lib.Store.open(tmp_path / 'x.db') as store:
    project = store.add_project('p')
    prompt = store.add_prompt(project, 'q')
    for bad, message in (('\0', 'NUL'), ('\ud800', 'half a surrogate pair'), (3, 'must be a text')):
      with pytest.raises(UserError, match=message):
        store.add_prompt(project, bad)
      with pytest.raises(UserError, match=message):
        store.add_completion(prompt, bad, policy='a')
