"""Operations of a traced program, loops counted as often as they run.

The compiler's own count takes the body of a loop once, and every program here is a loop over layers
within loops over microbatches, minibatches and epochs, or over tokens.
"""

import math
from typing import NamedTuple

from jax.extend import core
import numpy as np


class Count(NamedTuple):
  """Operations.

  Attributes:
    flops: multiplications and additions of matmuls, whatever device they are on; other
      operations are not counted.
    unbounded: loops whose number of rounds is unknown, counted as one round.
  """

  flops: float
  unbounded: int


def of(traced):
  """The operations of a traced program.

  A `while_loop` is taken to go on until its counter meets its bound, as if no row ended early, and
  a Pallas kernel to leave out no block (splash attention does, above the diagonal).

  Args:
    traced: from jax.jit(f).trace(...).

  Returns:
    Count.
  """
  closed = traced.jaxpr
  return _walk(closed.jaxpr, [None] * len(closed.jaxpr.invars))[0]


def _walk(jaxpr, arguments):
  """Returns the Count of a jaxpr and its outputs: ints if known, else None, as `arguments` are."""
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
  """Count of one equation, and its outputs where they are known integers."""
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
    rounds = np.prod(params['grid_mapping'].grid, dtype=float)
    count, _ = _walk(params['jaxpr'], [None] * len(params['jaxpr'].invars))
    return Count(count.flops * rounds, count.unbounded * rounds), unknown
  inner = [value for value in params.values() if isinstance(value, (core.ClosedJaxpr, core.Jaxpr))]
  if inner:  # jit, checkpoint, custom_jvp and the like: what is called is the first of them
    jaxpr = getattr(inner[0], 'jaxpr', inner[0])
    split = params['newly_manual_axes'] if name == 'shard_map' else ()
    devices = math.prod(params['mesh'].shape[axis] for axis in split)
    count, outputs = _walk(jaxpr, values[-len(jaxpr.invars) :] if jaxpr.invars else [])
    return Count(count.flops * devices, count.unbounded), outputs
  return Count(0.0, 0), _scalar(name, equation, values)


def _dot(equation):
  """2 m n k of every matrix of a batch."""
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
  """2 per output for each weight that it sees."""
  kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
  outputs = equation.params['dimension_numbers'].rhs_spec[0]
  return 2.0 * np.prod(out, dtype=float) * np.prod(kernel, dtype=float) / kernel[outputs]


def _while(equation, values):
  """Rounds of a loop times its body; and the counter after it."""
  params = equation.params
  cond_consts, body_consts = params['cond_nconsts'], params['body_nconsts']
  carry = values[cond_consts + body_consts :]
  body = params['body_jaxpr'].jaxpr
  counter, bound = _bound(params['cond_jaxpr'].jaxpr, values[:cond_consts] + [None] * len(carry))
  outputs = [None] * len(carry)
  rounds = None
  if counter is not None:
    index = counter - cond_consts
    step = _step(body, body.invars[body_consts + index], body.outvars[index])
    if step and carry[index] is not None:
      rounds = max(-(-(bound - carry[index]) // step), 0)
      outputs[index] = carry[index] + rounds * step
  # What a round starts from differs from round to round, but for the constants.
  count, _ = _walk(body, values[cond_consts : cond_consts + body_consts] + [None] * len(carry))
  if rounds is None:
    return Count(count.flops, count.unbounded + 1), outputs
  return Count(count.flops * rounds, count.unbounded * rounds), outputs


def _bound(cond, arguments):
  """Returns (index of the input, bound) of a loop's only comparison `input < bound`, or Nones."""
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
  """What a round adds to a counter, or None."""
  for equation in body.eqns:
    if after in equation.outvars and equation.primitive.name == 'add':
      steps = [_integer(atom.val) for atom in equation.invars if isinstance(atom, core.Literal)]
      if (
        before in [atom for atom in equation.invars if not isinstance(atom, core.Literal)] and steps
      ):
        return steps[0]
  return None


def _scalar(name, equation, values):
  """The outputs of arithmetic on known integers."""
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
  """A whole number of a literal, or None."""
  if (
    isinstance(value, (bool, np.bool_))
    or np.ndim(value)
    or not np.issubdtype(np.asarray(value).dtype, np.integer)
  ):
    return None
  return int(value)
