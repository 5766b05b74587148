"""Measures the limits of the machine: a large matmul and a large copy, with JAX or PyTorch.

python -m benchmarks.peers.limits --workload xs --library torch

It takes turns with the peers, so it measures the machine under the same conditions. It uses float32
on a CPU and bfloat16 elsewhere. benchmarks/run.py uses the best result of all libraries.
"""

import importlib
import time

from benchmarks.peers import protocol

# {device: (rows of the square matrices, bytes of the copied array)}.
SIZES = {'cpu': (2048, 2**28), 'gpu': (8192, 2**31), 'tpu': (8192, 2**31)}
REPEATS = 5


def jax_programs(device):
  """Returns functions (matmul, copy) without arguments that compute with JAX and wait."""
  jax = importlib.import_module('jax')
  jnp = jax.numpy
  rows, size = SIZES[device]
  dtype = jnp.float32 if device == 'cpu' else jnp.bfloat16
  a = jax.random.normal(jax.random.key(0), (rows, rows), dtype)
  x = jnp.zeros(size // 4, jnp.float32)
  product, negative = jax.jit(jnp.matmul), jax.jit(jnp.negative)
  return lambda: product(a, a).block_until_ready(), lambda: negative(x).block_until_ready()


def torch_programs(device, threads):
  """Returns functions (matmul, copy) without arguments that compute with PyTorch and wait."""
  torch = importlib.import_module('torch')
  torch.set_num_threads(threads)
  rows, size = SIZES[device]
  where = 'cpu' if device == 'cpu' else 'cuda'
  wait = torch.cuda.synchronize if where == 'cuda' else lambda: None
  a = torch.randn(
    rows, rows, device=where, dtype=torch.float32 if device == 'cpu' else torch.bfloat16
  )
  c = torch.empty_like(a)
  x = torch.zeros(size // 4, device=where)
  y = torch.empty_like(x)
  return (lambda: (torch.matmul(a, a, out=c), wait())), (lambda: (y.copy_(x), wait()))


def kind(library, device):
  """Returns the vendor's name of the device, such as 'NVIDIA H200'; 'cpu' on CPUs."""
  if library == 'jax':
    return importlib.import_module('jax').devices()[0].device_kind
  return device if device == 'cpu' else importlib.import_module('torch').cuda.get_device_name()


def best(program):
  """Returns the seconds of the fastest of a few calls."""
  times = []
  for _ in range(REPEATS):
    started = time.perf_counter()
    program()
    times.append(time.perf_counter() - started)
  return min(times)


def main():
  options = protocol.arguments(__doc__, library='jax')
  turns = protocol.Turns()
  if options.library == 'jax':
    programs = jax_programs(options.device)
  else:
    programs = torch_programs(options.device, options.threads)
  rows, size = SIZES[options.device]
  for program in programs:
    program()
  turns.ready(protocol.versions(options.library), note=kind(options.library, options.device))
  while True:
    turns.wait()
    matmul, copy = map(best, programs)
    turns.report(matmul=2 * rows**3 / matmul, copy=2 * size / copy)


if __name__ == '__main__':
  main()
