"""Process-wide settings: several hosts, compiled programs kept on disk, memory kept by malloc."""

import ctypes
import importlib.util
import logging as std_logging
import os
import pathlib
import sys
import threading
import traceback

from absl import logging
import jax
from jax.experimental.compilation_cache import compilation_cache

from rlhf_jax import errors
from rlhf_jax import processes

HUGE = 2**21  # bytes of a huge page
HEARTBEAT_SECONDS = 50  # after which a process that is gone ends the others


def configure():
  """Joins the other processes of a cluster, and sets memory, compilation cache and devices up.

  Raises:
    UserError: the other processes or the devices cannot be had.
  """
  if logging.get_verbosity() < logging.DEBUG:
    quiet()
  threading.excepthook = thread_raised
  keep_memory()
  join()
  keep_programs()
  check_devices()
  processes.barrier()  # the first collective allows 30 seconds; those after it any time


def keep_programs():
  """Keeps compiled programs on disk for the next start, unless JAX has been told where to keep them."""
  if jax.config.jax_compilation_cache_dir is not None:
    return
  cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME', pathlib.Path.home() / '.cache'))
  jax.config.update('jax_compilation_cache_dir', str(cache / 'rlhf_jax' / 'xla'))
  jax.config.update(
    'jax_persistent_cache_min_compile_time_secs', 0.1
  )  # by default 1: a run has many small programs
  compilation_cache.reset_cache()  # the first program that was compiled, if any, has settled that there is none


def check_devices():
  """Raises UserError, with what to do, where JAX finds no devices."""
  try:
    jax.device_count()
  except (
    RuntimeError,
    AssertionError,
  ) as error:  # an AssertionError for a platform without its plugin
    wanted = os.environ.get('JAX_PLATFORMS')
    reason = (str(error) or 'JAX has no support for it installed').splitlines()[0]
    raise errors.UserError(
      f'there are no devices for JAX_PLATFORMS={wanted or ""}: {reason}. '
      + ('Unset it to take the devices that there are, or install' if wanted else 'Install')
      + ' JAX for yours: pip install "jax[cuda13]" or "jax[tpu]"'
    ) from error


def quiet():
  """Leaves out what libraries narrate; --verbosity=1 shows it.

  Orbax logs tracebacks of errors that it then raises, from every thread they pass through.
  """
  logging.set_verbosity(logging.WARNING)
  logging.get_absl_logger().addFilter(
    lambda record: 'orbax' not in pathlib.Path(record.pathname).parts
  )
  for name in ('asyncio', 'concurrent.futures'):  # which Orbax writes with
    std_logging.getLogger(name).setLevel(std_logging.CRITICAL)


def thread_raised(thread):
  """Shows what a thread raised, but for Orbax's: that is raised again where a run saves."""
  frames = traceback.extract_tb(thread.exc_traceback)
  if any('orbax' in pathlib.Path(frame.filename).parts for frame in frames):
    logging.debug('in %s', thread.thread, exc_info=thread[:3])
    return
  threading.__excepthook__(thread)


def join():
  """Joins the other processes, if there are any.

  The coordinator is named by COORDINATOR_ADDRESS, PROCESS_COUNT and PROCESS_ID. Without them it
  is found by itself under SLURM, Open MPI and on GKE's TPU slices; COORDINATOR_ADDRESS=auto does
  so on Cloud TPU VMs too, where no variable tells that there are others.
  """
  address = os.environ.get('COORDINATOR_ADDRESS', '')
  others = os.environ.get('TPU_WORKER_HOSTNAMES', '').count(',') > 0 or any(
    int(os.environ.get(name, '1')) > 1 for name in ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
  )
  if address and address != 'auto':
    missing = [
      name for name in ('PROCESS_COUNT', 'PROCESS_ID') if not os.environ.get(name, '').isdigit()
    ]
    if missing:
      raise errors.UserError(
        f'COORDINATOR_ADDRESS={address} needs {" and ".join(missing)} beside it, whole numbers'
      )
    jax.distributed.initialize(
      address,
      int(os.environ['PROCESS_COUNT']),
      int(os.environ['PROCESS_ID']),
      cluster_detection_method='deactivate',
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
  elif address or others:
    jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def end(message, status, *, together=False):
  """Says why on stderr and ends this process, whatever threads of it still wait for.

  An exit in the usual way waits for threads that may hang, and minutes for the other processes.

  Args:
    message: '' where another process says it.
    status: exit status.
    together: whether all processes end here; they then wait for each other.
  """
  if message:
    print(errors.printable(message), file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  if together and jax.distributed.is_initialized():
    jax.distributed.shutdown()
  os._exit(status)


def cpu_computes():
  """Whether the CPU is what JAX computes on, without asking it: the answer would start the CPU's threads."""
  if jax.config.jax_platforms:
    return jax.config.jax_platforms.split(',')[0] == 'cpu'
  return not any(importlib.util.find_spec(plugin) for plugin in ('jax_plugins', 'libtpu'))


def keep_memory():
  """Tells glibc to keep large freed blocks, all in one arena of huge pages, for the next step.

  XLA on the CPU allocates its temporaries anew every step. Returned to the system and mapped
  again, their pages are zeroed by the kernel each time: without this a small train step takes
  1.5 times as long. Other arenas hold no block above 64 MB, hence the one. Huge pages made a step
  of a model as wide as GPT-2 5 % faster and its rollout 10 %, and save page faults at the start.

  Does nothing where an accelerator computes: its temporaries are not malloc's, and the threads that
  compile for it would wait for each other in one arena. Must be called before JAX starts its threads:
  those that have an arena by then keep it.
  """
  if not cpu_computes():
    return
  try:
    libc = ctypes.CDLL('libc.so.6')
  except OSError:
    return  # another C library; only slower
  for parameter, value in ((-1, -1), (-4, 0), (-8, 1)):  # never trim, never map, one arena
    libc.mallopt(parameter, value)
  # The arena takes most of the addresses that Linux would give, and frees them to itself: no page is used yet.
  size = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') * 3 // 4
  libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  libc.free.argtypes, libc.madvise.argtypes = (
    [ctypes.c_void_p],
    [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int],
  )
  block = libc.malloc(size)
  if block:
    whole = -block % HUGE
    libc.madvise(block + whole, size - whole, 14)  # MADV_HUGEPAGE
    libc.free(block)
