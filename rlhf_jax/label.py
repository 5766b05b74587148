"""rlhf label --db=FILE --project=NAME [--data=POLICY=FILE,...] [--policies=NAME=DIR,...] [--port=N]
rlhf label --db=FILE --project=NAME --add_annotator=NAME [--role=owner]

Serves the page on which people compare responses. FILE is a file of SQLite, which is made if there
is none, or the URL of a PostgreSQL database. The first start prints the personal link of the owner,
who adds annotators on the page or with the second form, which prints a personal link and exits.

--overlap and --selection are settings of a new project: how many annotators answer a task, and
which task is next.

--data adds the samples of policies, {"prompt", "completion"}, as tasks; it is either a list of
POLICY=FILE, or a folder of files POLICY.jsonl. --policies serves policies for the chat: folders of
models or runs, of which the newest checkpoint answers. The store has their answers by NAME; DIR,DIR
without names takes the ends of the paths.

The page is for this machine alone unless --host says otherwise. Over a network it needs a reverse
proxy that adds TLS, and --allowed_hosts with the names by which browsers reach it.

python -m rlhf_jax.label does the same.
"""

import contextlib
import itertools
import pathlib
import shlex
import signal
import socket
import sys

from rlhf_jax import command_line
from rlhf_jax import errors
from rlhf_jax.errors import need
from rlhf_jax.feedback import schema
from rlhf_jax.feedback import store as store_lib

OWNER = 'owner'  # name of the first owner
EVERYWHERE = ('0.0.0.0', '::')  # listen on all addresses; browsers use another name


def serve(store, project, options):
  """Serves the page until it is stopped.

  Args:
    store: The store.
    project: The project.
    options: Values of the command line.
  """
  # Not at the top, so that `--help` is quick.
  import uvicorn

  from rlhf_jax.feedback.page import app as app_lib
  from rlhf_jax.feedback.page import serve as serve_lib
  from rlhf_jax.feedback.page import settings as settings_lib

  hosts = allowed_hosts(options)
  settings = settings_lib.Settings(allowed_hosts=hosts)
  with contextlib.ExitStack() as stack:
    listener = stack.enter_context(listen(options.host, options.port))
    options.port = listener.getsockname()[1]
    policies = None
    if options.policies:
      from rlhf_jax.feedback import live

      policies = live.Policies(policy_folders(options.policies))
      stack.callback(policies.close)
      warn_of_other_folders(store, project, policies.folders)
    app = app_lib.create(store, project, policies=policies, settings=settings)
    config = serve_lib.config(app, host=options.host, port=options.port)
    welcome(store, options)
    uvicorn.Server(config).run(sockets=[listener])


def warn_of_other_folders(store, project, folders):
  """Warns of each policy whose earlier answers are from another folder than the one given now.

  A checkpoint in the store that is no absolute path, such as 'step 100', names no folder.

  Args:
    store: The store.
    project: The project.
    folders: {name: absolute path of the folder of a policy}.
  """
  known = store.checkpoints(project)
  for name, folder in folders.items():
    paths = [path for path in known.get(name, ()) if pathlib.Path(path).is_absolute()]
    for other in sorted({_run_of(path) for path in paths} - {_run_of(folder)}):
      print(
        f'Warning: the policy {name!r} has answers from {other}, and new ones would come from '
        f'{folder}. Elo takes them for one policy. Unless they are the same model, stop the page '
        'and give the new one a name of its own in --policies.',
        file=sys.stderr,
      )


def _run_of(path):
  """Returns the folder of a run from that of its model or of a checkpoint; others are resolved."""
  path = pathlib.Path(path).resolve()
  if path.parent.name == 'checkpoints':
    return path.parents[1]
  return path.parent if path.name == 'model' else path


def welcome(store, options):
  """Prints where the page is, and the owner's personal link if there was no owner."""
  print(f'Labelling page: {address(options)} (Ctrl-C stops it; answers are saved at once)')
  people = store.annotators()
  owners = [person.name for person in people if person.role == 'owner' and not person.disabled]
  if owners:
    flags = {'db': store.database.url, 'project': options.project, 'port': options.port}
    flags |= {'add_annotator': owners[0]}
    command = ' '.join(f'--{flag}={shlex.quote(str(value))}' for flag, value in flags.items())
    print(f'If you lost your link as owner, make a new one: rlhf label {command}')
  else:
    name = free_name(OWNER, [person.name for person in people])
    _, token = store.add_annotator(name, role='owner')
    print(f'Your personal link as {name}, shown once: {address(options)}/sign-in/{token}')
  sys.stdout.flush()


def free_name(name, taken):
  """Returns the name, or if it is taken the first free one of 'name 2', 'name 3', ..."""
  names = itertools.chain([name], (f'{name} {number}' for number in itertools.count(2)))
  return next(free for free in names if free not in taken)


def add_annotator(store, options):
  """Adds an annotator, or makes a new link for one, and prints the link."""
  from rlhf_jax.feedback import accounts
  from rlhf_jax.feedback.page import passwords

  person = store.annotator(name=options.add_annotator)
  if person is None:
    _, token = store.add_annotator(options.add_annotator, role=options.role or 'annotator')
  else:
    need(
      options.role in (None, person.role),
      f'--role={options.role}: {person.name!r} has the role {person.role!r}: use another name',
    )
    need(
      not person.simulated and not person.disabled,
      f'--add_annotator={person.name}: this annotator is simulated or disabled: use another name',
    )
    token = passwords.new_token()
    accounts.change(store.database, person, token=token)
    print(
      'There is such an annotator. The old link, the password and open sessions end.',
      file=sys.stderr,
    )
  print(f'{address(options)}/sign-in/{token}')


def add_project(store, options):
  """Returns the project, which is made if there is none.

  Raises:
    UserError: It was made with another overlap or selection than those of the command line.
  """
  asked = {'overlap': options.overlap, 'selection': options.selection}
  asked = {name: value for name, value in asked.items() if value is not None}
  project = store.add_project(options.project, **asked)
  for name, value in asked.items():
    made = getattr(project, name)
    need(
      made == value,
      f'--{name}={value}: the project {project.name!r} was made with {name}={made}, which stays. '
      f'Leave --{name} out, or name another --project.',
    )
  return project


def add_data(store, project, options):
  """Adds the samples of --data as tasks, unless the project has tasks, as after a restart."""
  from rlhf_jax.feedback import transfer

  if store.tasks(project):
    print(f'The project {project.name!r} has tasks, so --data is not read again.')
    return
  tasks = transfer.add_samples(store, project, sample_files(options.data), kind=options.kind)
  print(f'Added {len(tasks)} tasks.')


def sample_files(text):
  """Returns {policy: path} of a value of --data.

  Raises:
    UserError: It is neither POLICY=FILE,... nor a folder of files POLICY.jsonl.
  """
  folder = pathlib.Path(text)
  if folder.is_dir():
    files = {path.stem: str(path) for path in sorted(folder.glob('*.jsonl'))}
    need(files, f'--data={text}: the folder has no files POLICY.jsonl')
    return files
  pairs = [part.partition('=') for part in text.split(',')]
  need(
    all(policy and path for policy, _, path in pairs),
    f'--data={text} must be POLICY=FILE,POLICY=FILE,... or a folder of files POLICY.jsonl',
  )
  return {policy: path for policy, _, path in pairs}


def policy_folders(text):
  """Returns {name: folder} of a value of --policies, or a list of folders without names.

  Raises:
    UserError: Some have names and others do not, or a name is used twice.
  """
  parts = [part for part in text.split(',') if part]
  pairs = [part.partition('=') for part in parts]
  named = ['=' in part and '/' not in name for part, (name, _, _) in zip(parts, pairs)]
  if not any(named):
    return parts
  folders = {name: folder for name, _, folder in pairs}
  need(
    all(named) and all(name and folder for name, folder in folders.items()),
    f'--policies={text} must be NAME=DIR,NAME=DIR,... or DIR,DIR,...',
  )
  need(len(folders) == len(pairs), f'--policies={text} has a name twice')
  return folders


def allowed_hosts(options):
  """Returns the names in the Host header that the page answers."""
  hosts = [host for host in options.allowed_hosts.split(',') if host]
  if options.host not in EVERYWHERE:
    hosts.append(_bracketed(options.host))
  return tuple(dict.fromkeys([*hosts, 'localhost', '127.0.0.1', '[::1]']))


def address(options):
  """Returns the address of the page, by the first name that it answers."""
  return f'http://{allowed_hosts(options)[0]}:{options.port}'


def listen(host, port):
  """Returns a socket that listens.

  Raises:
    UserError: The port is in use, or the address is not of this machine.
  """
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family)
  except (OSError, OverflowError) as error:
    raise errors.UserError(
      f'--host={host} --port={port}: {error}. Choose another port, such as --port={port + 1}'
    ) from error


def _bracketed(host):
  return f'[{host}]' if ':' in host else host


def start():
  """Reads the command line and serves the page."""
  parser = command_line.Arguments('rlhf label', __doc__)
  parser.add_argument('--db', required=True, help='file of SQLite, or URL of a database')
  parser.add_argument('--project', required=True, help='name; it is made if there is none')
  parser.add_argument('--data', default='', help='samples to label: POLICY=FILE,... or a folder')
  parser.add_argument(
    '--kind', default='pair', choices=schema.KINDS, help='kind of the tasks of --data'
  )
  parser.add_argument('--overlap', type=int, help='annotators of a task; 1 if not given')
  parser.add_argument('--selection', choices=schema.SELECTIONS, help='which task is next')
  parser.add_argument('--policies', default='', help='policies for the chat: NAME=DIR,...')
  parser.add_argument('--host', default='127.0.0.1', help='address to listen on; 0.0.0.0: all')
  parser.add_argument('--port', type=int, default=8000, help='port to listen on; 0: a free one')
  parser.add_argument('--allowed_hosts', default='', help='names of this machine: NAME,NAME')
  parser.add_argument('--add_annotator', default='', metavar='NAME', help='print a link, and exit')
  parser.add_argument('--role', choices=schema.ROLES, help='of a new annotator')
  options = parser.parse_args()
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  with command_line.exit_on_error(), store_lib.Store.open(options.db) as store:
    project = add_project(store, options)
    if options.add_annotator:
      add_annotator(store, options)
      return
    if options.data:
      add_data(store, project, options)
    serve(store, project, options)


if __name__ == '__main__':
  start()
