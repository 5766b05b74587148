"""Process-wide settings: distributed start, compilation cache, memory allocator, and logging."""

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

HUGE_PAGE = 2**21  # bytes
HEARTBEAT_SECONDS = 50  # a process that is silent for this long is dead, and the others end


def configure():
  """Joins the other processes, and sets up logging, memory, compilation cache and devices.

  Raises:
    UserError: The settings for several processes are incomplete, or there are no devices.
  """
  if logging.get_verbosity() < logging.DEBUG:
    hide_library_logs()
  threading.excepthook = report_thread_exception
  configure_malloc()
  join_processes()
  enable_compilation_cache()
  check_devices()
  processes.barrier()  # the first collective times out after 30 seconds, later ones never


def enable_compilation_cache():
  """Keeps compiled programs on disk for the next start, unless JAX's cache is already set."""
  if jax.config.jax_compilation_cache_dir is not None:
    return
  cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME', pathlib.Path.home() / '.cache'))
  jax.config.update('jax_compilation_cache_dir', str(cache / 'rlhf_jax' / 'xla'))
  # JAX caches only programs that take 1 s to compile, but a run has many smaller ones.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
  # If a program was compiled before, JAX has already decided that there is no cache.
  compilation_cache.reset_cache()


def check_devices():
  """Raises UserError, with the remedy, if JAX finds no devices."""
  try:
    jax.device_count()
  except (RuntimeError, AssertionError) as error:  # AssertionError: a platform has no plugin
    wanted = os.environ.get('JAX_PLATFORMS')
    reason = (str(error) or 'its plugin for JAX is not installed').splitlines()[0]
    raise errors.UserError(
      f'there are no devices for JAX_PLATFORMS={wanted or ""}: {reason}. '
      + ('Unset it to use the devices that JAX finds, or install' if wanted else 'Install')
      + ' JAX for your devices: pip install "jax[cuda13]" or "jax[tpu]"'
    ) from error


def hide_library_logs():
  """Hides log messages of libraries; --verbosity=1 shows them.

  Orbax logs the traceback of an error in every thread that it passes through, and raises it anyway.
  """
  logging.set_verbosity(logging.WARNING)
  logging.get_absl_logger().addFilter(
    lambda record: 'orbax' not in pathlib.Path(record.pathname).parts
  )
  for name in ('asyncio', 'concurrent.futures'):  # Orbax writes files with them
    std_logging.getLogger(name).setLevel(std_logging.CRITICAL)


def report_thread_exception(thread):
  """Prints the exception of a thread, except Orbax's, which is raised again when a run saves."""
  frames = traceback.extract_tb(thread.exc_traceback)
  if any('orbax' in pathlib.Path(frame.filename).parts for frame in frames):
    logging.debug('in %s', thread.thread, exc_info=thread[:3])
    return
  threading.__excepthook__(thread)


def join_processes():
  """Joins the other processes of the job, if there are any.

  COORDINATOR_ADDRESS, PROCESS_COUNT and PROCESS_ID describe the job. Without them, JAX detects it
  under SLURM, under Open MPI, and on TPU slices of GKE. On Cloud TPU VMs no variable shows whether
  there are other processes: set COORDINATOR_ADDRESS=auto there.
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
        f'COORDINATOR_ADDRESS={address} also needs {" and ".join(missing)}, as whole numbers'
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


def exit_now(message, status, *, together=False):
  """Prints a message to stderr and ends this process without waiting for its threads.

  A normal exit waits for threads that may hang, and for minutes for the other processes.

  Args:
    message: Text to print, or '' if another process prints it.
    status: Exit status.
    together: Whether all processes exit here; if so, they wait for each other.
  """
  if message:
    print(errors.printable(message), file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  if together and jax.distributed.is_initialized():
    jax.distributed.shutdown()
  os._exit(status)


def runs_on_cpu():
  """Returns whether JAX will use the CPU, without a call that starts its threads."""
  if jax.config.jax_platforms:
    return jax.config.jax_platforms.split(',')[0] == 'cpu'
  return not any(importlib.util.find_spec(plugin) for plugin in ('jax_plugins', 'libtpu'))


def configure_malloc():
  """Tells glibc to keep large freed blocks for the next step, in one arena of huge pages.

  On the CPU, XLA allocates its temporaries anew in every step. If they are returned to the system,
  the kernel zeroes their pages each time, and a small train step takes 1.5 times as long. Only the
  main arena holds blocks above 64 MB, so there is only this one. Huge pages made a step of a model
  as wide as GPT-2 5 % faster and its rollout 10 % faster, and they save page faults at the start.

  Does nothing on an accelerator: its temporaries do not come from malloc, and the threads that
  compile for it would wait for each other in one arena. Must be called before JAX starts its
  threads, because a thread keeps the arena that it has.
  """
  if not runs_on_cpu():
    return
  try:
    libc = ctypes.CDLL('libc.so.6')
  except OSError:
    return  # another C library: the run is only slower
  # M_TRIM_THRESHOLD: never trim. M_MMAP_MAX: never map. M_ARENA_MAX: one arena.
  for parameter, value in ((-1, -1), (-4, 0), (-8, 1)):
    libc.mallopt(parameter, value)
  # The arena reserves three quarters of the memory as addresses and frees them to itself; this uses
  # no pages yet.
  size = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') * 3 // 4
  libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  libc.free.argtypes, libc.madvise.argtypes = (
    [ctypes.c_void_p],
    [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int],
  )
  block = libc.malloc(size)
  if block:
    offset = -block % HUGE_PAGE
    libc.madvise(block + offset, size - offset, 14)  # MADV_HUGEPAGE
    libc.free(block)
