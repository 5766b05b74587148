"""Eight fake CPU devices, no rank promotion, checked shapes, and the shared data if present.

Compiled programs are cached for the session, because runs that are stopped and resumed, here and in
subprocesses, compile the same programs again.
"""

import dataclasses
import itertools
import os
import pathlib
import tempfile

import annotated
import quick

_CACHE = tempfile.TemporaryDirectory(prefix='rlhf_jax_tests_')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', _CACHE.name)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
# Flags from the environment come last, so they override these.
os.environ['XLA_FLAGS'] = (
  f'--xla_force_host_platform_device_count=8 {quick.FLAGS} {os.environ.get("XLA_FLAGS", "")}'
)

import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook(
  [f'rlhf_jax.{name}' for name in annotated.MODULES],
  'beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))',  # an int counts as a float
)

from rlhf_jax import types

# JAX puts shapes, shardings and arrays with more axes into its trees, so these are not checked.
for cls in filter(dataclasses.is_dataclass, vars(types).values()):
  cls.__init__ = cls.__init__.__wrapped__

jax.config.update('jax_numpy_rank_promotion', 'raise')

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def shared():
  """Returns the folder of real data and models, which may be beside the project."""
  folder = ROOT.parent / 'shared'
  if not folder.is_dir():
    pytest.skip('no ../shared beside the project: its data and models are not shipped')
  return folder


@pytest.fixture(scope='session')
def compiled():
  """Returns the names of all programs compiled so far, like 'jit(train_step)'; the list grows."""
  names = []

  def listen(event, seconds, **labels):
    if event.endswith('backend_compile_duration'):
      names.append(str(labels.get('fun_name')))

  jax.monitoring.register_event_duration_secs_listener(listen)
  return names


@pytest.fixture(scope='session')
def world(tmp_path_factory):
  """A folder with a tiny tokenizer, policy, reward model and data; see tiny.py."""
  import tiny

  return tiny.write(tmp_path_factory.mktemp('world'))


MAPPINGS = 40_000  # of memory; a process may have 65,530, and beyond that XLA crashes


def mappings():
  """Returns the number of mappings of this process, some per compiled program; 0 if unknown."""
  try:
    return pathlib.Path('/proc/self/maps').read_bytes().count(b'\n')
  except OSError:
    return 0


_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs(request):
  """Clears the compiled programs after a slow test, or if there are many."""
  yield
  slow = request.node.get_closest_marker('slow')
  if slow or (next(_tests) % 10 == 0 and mappings() > MAPPINGS):
    jax.clear_caches()
