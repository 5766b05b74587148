"""Reads the collectives and estimated cycles of a compiled TPU program from its HLO text.

Trip counts of loops are included. The cycles come from the cost model of XLA for TPUs, which gives
a number for each scheduled instruction. Collectives that overlap with computation are inside
fusions: once in the fusion that starts them, and again in the fusions that continue them.
"""

import collections
import math
import re
from typing import NamedTuple

BYTES = {
  'pred': 1,
  's8': 1,
  'u8': 1,
  's16': 2,
  'u16': 2,
  'bf16': 2,
  'f16': 2,
  's32': 4,
  'u32': 4,
  'f32': 4,
  's64': 8,
  'u64': 8,
  'f64': 8,
}
COLLECTIVES = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_ARRAY = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\]')
_CALLED = re.compile(
  r'\b(?:calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%[\w.\-]+)'
)


class Instruction(NamedTuple):
  """A line of a computation: name, type, opcode, names of the operands, and its attributes."""

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str


class Totals(NamedTuple):
  """The work of one chip in one call of a program.

  Attributes:
    cycles: The compiler's estimate over all scheduled instructions.
    sent: {(kind, chips per group): bytes that a chip sends}; see `traffic`.
    calls: {(kind, chips per group): number of collectives}.
    unbounded: Number of loops counted as one iteration because their trip count is unknown.
  """

  cycles: float
  sent: dict[tuple[str, int], float]
  calls: dict[tuple[str, int], int]
  unbounded: int


def totals(text):
  """Computes the Totals of a compiled module from its text (`Compiled.as_text()`)."""
  computations, entry = parse(text)
  sent, collectives = collections.Counter(), collections.Counter()
  runs = collections.Counter({entry: 1.0})
  cycles, unbounded = 0.0, 0
  for name in _by_depth(computations, entry):
    body = {instruction.name: instruction for instruction in computations[name]}
    counted = set()
    for instruction in computations[name]:
      cycles += runs[name] * _cycles(instruction.attributes)
      iterations = 1.0
      if instruction.opcode == 'while':
        condition = re.search(r'condition=%([\w.\-]+)', instruction.attributes).group(1)
        iterations = trip_count(instruction, body, computations[condition])
        unbounded += iterations is None
        iterations = iterations or 1
      for called in _flow(instruction):
        runs[called] += runs[name] * iterations
      for collective, channel in _collectives(instruction, computations):
        if channel is not None and channel in counted:
          continue
        counted.add(channel)
        scattered = 'all-reduce-scatter' in instruction.attributes
        kind, size, amount = traffic(collective, scattered=scattered)
        sent[kind, size] += runs[name] * amount
        collectives[kind, size] += runs[name]
  return Totals(cycles, dict(sent), dict(collectives), unbounded)


def parse(text):
  """Returns {name: Instructions} of all computations, and the name of the entry computation."""
  computations, entry, current = {}, None, None
  # The metadata of a Pallas kernel spans several lines.
  for line in re.sub(r'kernel_metadata=\{\n.*\n\}', 'kernel_metadata={}', text).splitlines():
    header = None if line.startswith(' ') else _HEADER.match(line)
    if header:
      current = computations.setdefault(header.group(2), [])
      entry = header.group(2) if header.group(1) else entry
    elif line.startswith('}'):
      current = None
    elif current is not None and ' = ' in line:
      current.append(instruction_of(line))
  return computations, entry


def instruction_of(line):
  """Parses one line."""
  name, _, right = line.strip().removeprefix('ROOT ').partition(' = ')
  end = _closing(right, 0) + 1 if right.startswith('(') else right.index(' ')
  kind, right = right[:end], right[end:].lstrip()
  start = right.index('(')
  close = _closing(right, start)
  opcode, inside, attributes = right[:start], right[start : close + 1], right[close + 1 :]
  if opcode == 'constant':
    attributes += f' literal={inside}'
  return Instruction(
    name.lstrip('%'), kind, opcode, tuple(re.findall(r'%([\w.\-]+)', inside)), attributes
  )


def _closing(text, start):
  """Returns the index of the parenthesis that closes the one at `start`."""
  depth = 0
  for index in range(start, len(text)):
    depth += {'(': 1, ')': -1}.get(text[index], 0)
    if not depth:
      return index
  raise ValueError(f'no closing parenthesis: {text[:80]}')


def _flow(instruction):
  """Returns the computations that a loop, branch or call runs."""
  if instruction.opcode not in ('while', 'conditional', 'call'):
    return []
  return _called(instruction)


def _called(instruction):
  """Returns the names of all computations that an instruction refers to."""
  return [
    name
    for names in _CALLED.findall(instruction.attributes)
    for name in re.findall(r'[\w.\-]+', names)
  ]


def _by_depth(computations, entry):
  """Returns the computations that run, each after its callers."""
  order, done = [], set()

  def visit(name):
    if name in done:
      return
    done.add(name)
    for instruction in computations[name]:
      for called in _flow(instruction):
        visit(called)
    order.append(name)

  visit(entry)
  return order[::-1]


def _cycles(attributes):
  match = re.search(r'"estimated_cycles":"(\d+)"', attributes)
  return int(match.group(1)) if match else 0


def trip_count(loop, body, condition):
  """Returns the trip count of a `while` that compares a counter with a constant, else None.

  Args:
    loop: Instruction of the loop.
    body: {name: Instruction} of the computation that contains the loop and initializes its counter.
    condition: Instructions of its condition. Other terms of an `and` are assumed to be true.
  """
  known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if known:
    return int(known.group(1))
  local = {instruction.name: instruction for instruction in condition}
  for instruction in condition:
    if instruction.opcode != 'compare' or 'direction=LT' not in instruction.attributes:
      continue
    counter, bound = (local[name] for name in instruction.operands)
    ahead = 0
    if counter.opcode == 'add':  # compares the next value of the counter
      counter, step = (local[name] for name in counter.operands)
      ahead = _constant(step)
    if counter.opcode != 'get-tuple-element' or _constant(bound) is None or ahead is None:
      continue
    index = int(re.search(r'index=(\d+)', counter.attributes).group(1))
    start = body[loop.operands[0]]
    while start.opcode in ('copy', 'opt-barrier'):
      start = body[start.operands[0]]
    first = _resolve(body, start.operands[index]) if start.opcode == 'tuple' else 0
    return _constant(bound) - ahead - (first or 0)
  return None


def _resolve(body, name):
  """Returns the integer constant behind copies and casts, or None."""
  instruction = body.get(name)
  while instruction is not None and instruction.opcode in ('copy', 'bitcast', 'convert'):
    instruction = body.get(instruction.operands[0])
  return None if instruction is None else _constant(instruction)


def _constant(instruction):
  """Returns the value of an integer constant, or None."""
  match = re.search(r'literal=\((-?\d+)\)', instruction.attributes)
  return int(match.group(1)) if match else None


def _collectives(instruction, computations):
  """Returns [(collective, channel)] that an instruction runs or starts, possibly in a fusion."""
  if _kind(instruction.opcode):
    return [] if instruction.opcode.endswith('-done') else [(instruction, _channel(instruction))]
  if instruction.opcode not in ('fusion', 'async-start'):
    return []
  names = _called(instruction)
  inside = [part for name in names for part in computations.get(name, ())]
  # A fusion that continues a collective of another fusion also contains it, but does not start it.
  starts = (
    instruction.opcode == 'async-start'
    or any('all-reduce-scatter' in name for name in names)
    or any('"AsyncCollectiveStart"' in part.attributes for part in inside)
  )
  return [(part, _channel(part)) for part in inside if _kind(part.opcode)] if starts else []


def _kind(opcode):
  """Returns the collective of an opcode, without '-start' or '-done', or None."""
  return next(
    (kind for kind in COLLECTIVES if opcode in (kind, f'{kind}-start', f'{kind}-done')), None
  )


def _channel(instruction):
  match = re.search(r'channel_id=(\d+)', instruction.attributes)
  return match and match.group(1)


def traffic(collective, *, scattered=False):
  """Computes the bytes that each chip of a group sends in a collective, around a ring of n chips.

  A chip sends (n - 1) / n of the result of an all-gather, of the operand of a reduce-scatter, or of
  an all-to-all; twice that for an all-reduce; and the whole operand for a collective-permute.

  Args:
    collective: Instruction of the collective.
    scattered: Whether each chip keeps only its part of an all-reduce, as in a reduce-scatter.

  Returns:
    (kind, n, bytes).
  """
  kind = _kind(collective.opcode)
  size = group_size(collective.attributes)
  shapes = _ARRAY.findall(collective.type)
  if collective.opcode == 'all-gather-start':
    shapes = shapes[len(shapes) // 2 :]  # operands and results
  elif collective.opcode == 'collective-permute-start':
    shapes = shapes[1:2]  # operand, result and two handles
  amount = sum(
    BYTES.get(kind_, 4) * math.prod(int(n) for n in dims.split(',') if n) for kind_, dims in shapes
  )
  if kind == 'all-reduce' and scattered:
    kind = 'reduce-scatter'
    return kind, size, amount * (size - 1) / size
  if kind == 'collective-permute':
    return kind, 2, float(amount)
  fraction = (size - 1) / size
  factor = {
    'all-gather': fraction,
    'all-to-all': fraction,
    'all-reduce': 2 * fraction,
    'reduce-scatter': size - 1,
  }[kind]
  return kind, size, amount * factor


def group_size(attributes):
  """Returns the number of chips per group, from any form of `replica_groups`."""
  mesh = re.search(
    r'replica_groups=mesh\[([^\]]*)\][^{]*(?:\{\}|device_ids=[^{]*)?\{([^}]*)\}', attributes
  )
  if mesh:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh.group(1)))
    parts = re.findall(r"'([^':]+)'(?::\(\d+\)(\d+))?", mesh.group(2))
    return math.prod(int(part or sizes[axis]) for axis, part in parts)
  iota = re.search(r'replica_groups=\[(\d+),(\d+)\]<=', attributes)
  if iota:
    return int(iota.group(2))
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', attributes)
  return len(listed.group(1).split(',')) if listed else 1
