"""Collectives and estimated cycles of a compiled program, read from its HLO, with loops counted.

Of XLA for TPUs: cycles are its cost model's, one figure for each scheduled instruction; collectives
that overlap with computation are inside of fusions, once where they start and again where they go
on.
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
  """One line of a computation: name, type as text, opcode, operands' names, and the rest."""

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  rest: str


class Totals(NamedTuple):
  """What one chip does in one run of a program.

  Attributes:
    cycles: the compiler's estimate of all scheduled instructions.
    sent: {(kind, chips of a group): bytes that a chip sends}; see `traffic`.
    rounds: collectives run, by the same keys.
    unbounded: loops whose number of rounds was not found, counted as one.
  """

  cycles: float
  sent: dict[tuple[str, int], float]
  rounds: dict[tuple[str, int], int]
  unbounded: int


def totals(text):
  """Reads the text of a compiled module (`Compiled.as_text()`)."""
  computations, entry = parse(text)
  sent, collectives = collections.Counter(), collections.Counter()
  runs = collections.Counter({entry: 1.0})
  cycles, unbounded = 0.0, 0
  for name in _by_depth(computations, entry):
    body = {instruction.name: instruction for instruction in computations[name]}
    counted = set()
    for instruction in computations[name]:
      cycles += runs[name] * _cycles(instruction.rest)
      rounds = 1.0
      if instruction.opcode == 'while':
        condition = re.search(r'condition=%([\w.\-]+)', instruction.rest).group(1)
        rounds = trip_count(instruction, body, computations[condition])
        unbounded += rounds is None
        rounds = rounds or 1
      for called in _flow(instruction):
        runs[called] += runs[name] * rounds
      for collective, channel in _collectives(instruction, computations):
        if channel is not None and channel in counted:
          continue
        counted.add(channel)
        kind, size, share = traffic(collective, scattered='all-reduce-scatter' in instruction.rest)
        sent[kind, size] += runs[name] * share
        collectives[kind, size] += runs[name]
  return Totals(cycles, dict(sent), dict(collectives), unbounded)


def parse(text):
  """All computations by name, lists of Instructions; and the name of the entry."""
  computations, entry, current = {}, None, None
  # What a Pallas kernel says of itself has lines of its own.
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
  """Reads one line."""
  name, _, right = line.strip().removeprefix('ROOT ').partition(' = ')
  end = _closing(right, 0) + 1 if right.startswith('(') else right.index(' ')
  kind, right = right[:end], right[end:].lstrip()
  start = right.index('(')
  close = _closing(right, start)
  opcode, inside, rest = right[:start], right[start : close + 1], right[close + 1 :]
  if opcode == 'constant':
    rest += f' literal={inside}'
  return Instruction(
    name.lstrip('%'), kind, opcode, tuple(re.findall(r'%([\w.\-]+)', inside)), rest
  )


def _closing(text, start):
  """Index of the parenthesis that closes the one at `start`."""
  depth = 0
  for index in range(start, len(text)):
    depth += {'(': 1, ')': -1}.get(text[index], 0)
    if not depth:
      return index
  raise ValueError(f'no closing parenthesis: {text[:80]}')


def _flow(instruction):
  """Returns the computations that an instruction runs: those of loops, branches and calls."""
  if instruction.opcode not in ('while', 'conditional', 'call'):
    return []
  return _called(instruction)


def _called(instruction):
  """The names of all computations that an instruction refers to."""
  return [
    name for names in _CALLED.findall(instruction.rest) for name in re.findall(r'[\w.\-]+', names)
  ]


def _by_depth(computations, entry):
  """Computations that run, each after all that call it."""
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


def _cycles(rest):
  match = re.search(r'"estimated_cycles":"(\d+)"', rest)
  return int(match.group(1)) if match else 0


def trip_count(loop, body, condition):
  """Rounds of a `while` whose condition compares a counter with a constant; None where it does not.

  Args:
    loop: the Instruction.
    body: {name: Instruction} of the computation it is in, where its counter starts.
    condition: Instructions of its condition. Other conditions joined by `and` are taken to hold.
  """
  known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
  if known:
    return int(known.group(1))
  local = {instruction.name: instruction for instruction in condition}
  for instruction in condition:
    if instruction.opcode != 'compare' or 'direction=LT' not in instruction.rest:
      continue
    counter, bound = (local[name] for name in instruction.operands)
    ahead = 0
    if counter.opcode == 'add':  # compares what the counter will be
      counter, step = (local[name] for name in counter.operands)
      ahead = _constant(step)
    if counter.opcode != 'get-tuple-element' or _constant(bound) is None or ahead is None:
      continue
    index = int(re.search(r'index=(\d+)', counter.rest).group(1))
    start = body[loop.operands[0]]
    while start.opcode in ('copy', 'opt-barrier'):
      start = body[start.operands[0]]
    first = _resolve(body, start.operands[index]) if start.opcode == 'tuple' else 0
    return _constant(bound) - ahead - (first or 0)
  return None


def _resolve(body, name):
  """The constant behind copies and casts, or None."""
  instruction = body.get(name)
  while instruction is not None and instruction.opcode in ('copy', 'bitcast', 'convert'):
    instruction = body.get(instruction.operands[0])
  return None if instruction is None else _constant(instruction)


def _constant(instruction):
  """The value of an integer constant, or None."""
  match = re.search(r'literal=\((-?\d+)\)', instruction.rest)
  return int(match.group(1)) if match else None


def _collectives(instruction, computations):
  """(collective, channel) that an instruction runs or starts, itself or inside of a fusion."""
  if _kind(instruction.opcode):
    return [] if instruction.opcode.endswith('-done') else [(instruction, _channel(instruction))]
  if instruction.opcode not in ('fusion', 'async-start'):
    return []
  names = _called(instruction)
  inside = [part for name in names for part in computations.get(name, ())]
  # A fusion that goes on with a collective of another holds it too, without the mark of a start.
  starts = (
    instruction.opcode == 'async-start'
    or any('all-reduce-scatter' in name for name in names)
    or any('"AsyncCollectiveStart"' in part.rest for part in inside)
  )
  return [(part, _channel(part)) for part in inside if _kind(part.opcode)] if starts else []


def _kind(opcode):
  """The name of a collective without '-start', or None."""
  return next(
    (kind for kind in COLLECTIVES if opcode in (kind, f'{kind}-start', f'{kind}-done')), None
  )


def _channel(instruction):
  match = re.search(r'channel_id=(\d+)', instruction.rest)
  return match and match.group(1)


def traffic(collective, *, scattered=False):
  """What each chip of a group sends in a collective, around a ring.

  Of n chips: (n - 1) / n of the whole for a gather (of the result), a reduction that scatters (of
  the operand) or an exchange; twice that for a reduction that everybody gets; all of it for a
  permutation.

  Args:
    collective: the Instruction.
    scattered: an all-reduce of which each chip keeps its part, so that it is a reduce-scatter.

  Returns:
    (kind, n, bytes).
  """
  kind = _kind(collective.opcode)
  size = group_size(collective.rest)
  shapes = _ARRAY.findall(collective.type)
  if collective.opcode == 'all-gather-start':
    shapes = shapes[len(shapes) // 2 :]  # operands and results
  elif collective.opcode == 'collective-permute-start':
    shapes = shapes[1:2]  # operand, result and two handles
  whole = sum(
    BYTES.get(kind_, 4) * math.prod(int(n) for n in dims.split(',') if n) for kind_, dims in shapes
  )
  if kind == 'all-reduce' and scattered:
    kind = 'reduce-scatter'
    return kind, size, whole * (size - 1) / size
  if kind == 'collective-permute':
    return kind, 2, float(whole)
  share = (size - 1) / size
  factor = {
    'all-gather': share,
    'all-to-all': share,
    'all-reduce': 2 * share,
    'reduce-scatter': size - 1,
  }[kind]
  return kind, size, whole * factor


def group_size(rest):
  """Chips of a group, from any of the forms of `replica_groups`."""
  mesh = re.search(
    r'replica_groups=mesh\[([^\]]*)\][^{]*(?:\{\}|device_ids=[^{]*)?\{([^}]*)\}', rest
  )
  if mesh:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh.group(1)))
    parts = re.findall(r"'([^':]+)'(?::\(\d+\)(\d+))?", mesh.group(2))
    return math.prod(int(part or sizes[axis]) for axis, part in parts)
  iota = re.search(r'replica_groups=\[(\d+),(\d+)\]<=', rest)
  if iota:
    return int(iota.group(2))
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', rest)
  return len(listed.group(1).split(',')) if listed else 1
