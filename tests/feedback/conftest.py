"""Databases for the tests of the feedback store, and live policies."""

import glob
import os
import pathlib
import pwd
import shutil
import socket
import subprocess
import tempfile
import uuid

import pytest
import small_policies

from rlhf_jax.feedback import live

USER = 'postgres' if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name


def programs():
  """Returns the folder with PostgreSQL's programs, or None."""
  found = shutil.which('initdb')
  folders = [os.path.dirname(os.path.realpath(found))] if found else []
  folders += sorted(glob.glob('/usr/lib/postgresql/*/bin'))
  return next((folder for folder in folders if os.path.exists(f'{folder}/pg_ctl')), None)


@pytest.fixture(scope='session')
def postgres():
  """Starts PostgreSQL on a free port; yields a function that returns the URL of a new database."""
  psycopg = pytest.importorskip('psycopg')
  folder = programs()
  if folder is None:
    pytest.skip('PostgreSQL is not installed: apt-get install postgresql')
  # Not in pytest's folder, which only its owner can enter: the server refuses to run as root.
  with tempfile.TemporaryDirectory(prefix='postgres_', ignore_cleanup_errors=True) as place:
    user = {}
    if os.getuid() == 0:
      entry = pwd.getpwnam(USER)
      user = {'user': entry.pw_uid, 'group': entry.pw_gid, 'extra_groups': []}
      os.chown(place, entry.pw_uid, entry.pw_gid)
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]

    def run(program, *arguments):
      log = pathlib.Path(place, 'log')
      with open(log, 'a') as output:
        command = [f'{folder}/{program}', '-D', f'{place}/data', *arguments]
        done = subprocess.run(
          command, cwd=place, stdout=output, stderr=output, timeout=300, check=False, **user
        )
      assert done.returncode == 0, log.read_text()

    run('initdb', '--no-sync', '--auth=trust', '--encoding=UTF8', f'--username={USER}')
    options = f'-p {port} -k {place} -F -c listen_addresses=127.0.0.1 -c max_connections=100'
    run('pg_ctl', '-w', '-t', '240', '-o', options, '-l', f'{place}/server.log', 'start')
    server = f'postgresql://{USER}@127.0.0.1:{port}'

    def new():
      name = f'test_{uuid.uuid4().hex}'
      with psycopg.connect(f'{server}/postgres', autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE {name}')
      return f'{server}/{name}'

    try:
      yield new
    finally:
      run('pg_ctl', '-m', 'immediate', '-w', 'stop')


@pytest.fixture(params=['sqlite', 'postgresql'])
def database_url(request, tmp_path):
  """Returns the URL of a new, empty database."""
  if request.param == 'sqlite':
    return f'sqlite:///{tmp_path}/feedback.db'
  return request.getfixturevalue('postgres')()


@pytest.fixture(scope='session')
def policy_folders(tmp_path_factory):
  """Returns the folders of two random models with a context of 96 tokens."""
  return [small_policies.write(tmp_path_factory.mktemp('policies'), seed) for seed in range(2)]


@pytest.fixture(scope='session')
def live_policies(policy_folders):
  """Returns Policies that serve both of them, under the names calm and wild."""
  with live.Policies(policy_folders, max_concurrent=2) as policies:
    yield policies
