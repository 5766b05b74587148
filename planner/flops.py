"""Counts the FLOPs of a traced program, including the trip counts of loops.

XLA's own count takes the body of a loop once, but every program here loops over layers inside loops
over microbatches, minibatches and epochs, or over tokens.
"""

import math
from typing import NamedTuple

from jax.extend import core
import numpy as np


class Count(NamedTuple):
  """Number of operations.

  Attributes:
    flops: Multiplications and additions of matmuls and convolutions over all devices; other
      operations are not counted.
    unbounded: Number of loops counted as one iteration because their trip count is unknown.
  """

  flops: float
  unbounded: int


def of(traced):
  """Counts the operations of a traced program.

  Assumes that a `while_loop` runs until its counter reaches its bound, as if no sequence ended
  early, and that a Pallas kernel skips no block (splash attention skips those above the diagonal).

  Args:
    traced: Result of jax.jit(f).trace(...).

  Returns:
    Count.
  """
  closed = traced.jaxpr
  return _walk(closed.jaxpr, [None] * len(closed.jaxpr.invars))[0]


def _walk(jaxpr, arguments):
  """Returns the Count of a jaxpr, and its outputs as known ints or None, like `arguments`."""
  known = dict(zip(jaxpr.invars, arguments))
  read = lambda atom: _integer(atom.val) if isinstance(atom, core.Literal) else known.get(atom)
  flops, unbounded = 0.0, 0
  for equation in jaxpr.eqns:
    values = [read(atom) for atom in equation.invars]
    count, outputs = _equation(equation, values)
    flops, unbounded = flops + count.flops, unbounded + count.unbounded
    known |= {
      variable: value for variable, value in zip(equation.outvars, outputs) if value is not None
    }
  return Count(flops, unbounded), [read(atom) for atom in jaxpr.outvars]


def _equation(equation, values):
  """Returns the Count of an equation, and its outputs as known ints or None."""
  name, params = equation.primitive.name, equation.params
  unknown = [None] * len(equation.outvars)
  if name == 'dot_general':
    return Count(_dot(equation), 0), unknown
  if name == 'conv_general_dilated':
    return Count(_convolution(equation), 0), unknown
  if name == 'scan':
    consts = params['num_consts']
    count, _ = _walk(params['jaxpr'].jaxpr, values[:consts] + [None] * (len(values) - consts))
    return Count(count.flops * params['length'], count.unbounded * params['length']), unknown
  if name == 'while':
    return _while(equation, values)
  if name == 'cond':
    counts = [_walk(branch.jaxpr, values[1:])[0] for branch in params['branches']]
    return max(counts), unknown
  if name == 'pallas_call':
    steps = np.prod(params['grid_mapping'].grid, dtype=float)
    count, _ = _walk(params['jaxpr'], [None] * len(params['jaxpr'].invars))
    return Count(count.flops * steps, count.unbounded * steps), unknown
  inner = [value for value in params.values() if isinstance(value, (core.ClosedJaxpr, core.Jaxpr))]
  if inner:  # jit, checkpoint, custom_jvp ...: the first jaxpr is the one that is called
    jaxpr = getattr(inner[0], 'jaxpr', inner[0])
    split = params['newly_manual_axes'] if name == 'shard_map' else ()
    devices = math.prod(params['mesh'].shape[axis] for axis in split)
    count, outputs = _walk(jaxpr, values[-len(jaxpr.invars) :] if jaxpr.invars else [])
    return Count(count.flops * devices, count.unbounded), outputs
  return Count(0.0, 0), _scalar(name, equation, values)


def _dot(equation):
  """Returns 2 m n k for each matrix of a batch."""
  left, right = (variable.aval.shape for variable in equation.invars)
  (contracted, _), (batched, _) = equation.params['dimension_numbers']
  return (
    2.0
    * np.prod(left, dtype=float)
    * np.prod(right, dtype=float)
    / np.prod([left[axis] for axis in contracted], dtype=float)
    / np.prod([left[axis] for axis in batched], dtype=float)
  )


def _convolution(equation):
  """Returns the FLOPs of a convolution: 2 for each pair of an output and a weight that it uses."""
  kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
  outputs = equation.params['dimension_numbers'].rhs_spec[0]
  return 2.0 * np.prod(out, dtype=float) * np.prod(kernel, dtype=float) / kernel[outputs]


def _while(equation, values):
  """Returns the Count of a loop, and its outputs: the counter if known, else None."""
  params = equation.params
  cond_consts, body_consts = params['cond_nconsts'], params['body_nconsts']
  carry = values[cond_consts + body_consts :]
  body = params['body_jaxpr'].jaxpr
  counter, bound = _bound(params['cond_jaxpr'].jaxpr, values[:cond_consts] + [None] * len(carry))
  outputs = [None] * len(carry)
  trip_count = None
  if counter is not None:
    index = counter - cond_consts
    step = _step(body, body.invars[body_consts + index], body.outvars[index])
    if step and carry[index] is not None:
      trip_count = max(-(-(bound - carry[index]) // step), 0)
      outputs[index] = carry[index] + trip_count * step
  # Inside the body only the constants are known, because the carry changes.
  count, _ = _walk(body, values[cond_consts : cond_consts + body_consts] + [None] * len(carry))
  if trip_count is None:
    return Count(count.flops, count.unbounded + 1), outputs
  return Count(count.flops * trip_count, count.unbounded * trip_count), outputs


def _bound(cond, arguments):
  """Returns (index of the input, bound) of a condition `input < bound`, or (None, None)."""
  known = dict(zip(cond.invars, arguments))
  read = lambda atom: _integer(atom.val) if isinstance(atom, core.Literal) else known.get(atom)
  for equation in cond.eqns:
    name = equation.primitive.name
    if name in ('lt', 'le', 'gt', 'ge'):
      small, large = equation.invars if name in ('lt', 'le') else equation.invars[::-1]
      bound = read(large)
      if small in cond.invars and not small.aval.shape and bound is not None:
        return cond.invars.index(small), bound + (name in ('le', 'ge'))
  return None, None


def _step(body, before, after):
  """Returns what an iteration adds to a counter, or None if unknown."""
  for equation in body.eqns:
    if after in equation.outvars and equation.primitive.name == 'add':
      steps = [_integer(atom.val) for atom in equation.invars if isinstance(atom, core.Literal)]
      if (
        before in [atom for atom in equation.invars if not isinstance(atom, core.Literal)] and steps
      ):
        return steps[0]
  return None


def _scalar(name, equation, values):
  """Returns the outputs of arithmetic on known ints, or Nones."""
  outputs = [None] * len(equation.outvars)
  if len(outputs) == 1 and None not in values and not equation.outvars[0].aval.shape:
    rule = {
      'add': lambda a, b: a + b,
      'sub': lambda a, b: a - b,
      'mul': lambda a, b: a * b,
      'max': max,
      'min': min,
      'convert_element_type': lambda a: a,
      'copy': lambda a: a,
    }.get(name)
    if rule is not None:
      outputs[0] = rule(*values)
  return outputs


def _integer(value):
  """Returns the value of an integer literal, or None."""
  if (
    isinstance(value, (bool, np.bool_))
    or np.ndim(value)
    or not np.issubdtype(np.asarray(value).dtype, np.integer)
  ):
    return None
  return int(value)
