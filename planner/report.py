"""Tables of a plan, for the terminal and for a Markdown file."""

import io

import rich.box
import rich.console
import rich.table

WIDTH = 118


def size(amount):
  """Formats bytes in GiB."""
  return f'{amount / 2**30:.2f}' if amount < 2**30 * 100 else f'{amount / 2**30:.0f}'


def seconds(amount):
  """Formats seconds with three digits."""
  return f'{amount:.3g}' if amount < 1000 else f'{amount:.0f}'


def _table(title, *columns):
  table = rich.table.Table(
    title=title, box=rich.box.SIMPLE_HEAD, title_justify='left', title_style='bold'
  )
  for number, name in enumerate(columns):
    table.add_column(name, justify='right' if number else 'left', no_wrap=True)
  return table


def memory_table(candidate, cache, grads, chip):
  """Makes the table of GiB on each chip.

  Args:
    candidate: search.Candidate.
    cache: Bytes per chip of the rollout's keys and values.
    grads: Bytes per chip of the update's gradients.
    chip: chips.Chip.
  """
  table = _table(f'GiB on each chip, of {size(chip.memory)}', 'stays', 'GiB')
  for kind, amount in candidate.kinds.items():
    table.add_row(kind, size(amount))
  table.add_section()
  known = {'rollout': ('keys and values', cache), 'update': ('gradients', grads)}
  for name, amount in candidate.extra.items():
    if name in known:
      what, part = known[name]
      table.add_row(f'{name}: {what}', size(min(part, amount)))
      table.add_row(f'{name}: other temporaries', size(max(amount - part, 0)))
    else:
      table.add_row(f'{name}: temporaries', size(amount))
  table.add_section()
  table.add_row(
    'most at once', size(candidate.bytes) + ('' if candidate.fits else '  does not fit')
  )
  return table


def programs_table(candidate, work, chip, chips):
  """Makes the table of the FLOPs, traffic and time of each program.

  Args:
    candidate: search.Candidate.
    work: {program: FLOPs}.
    chip: chips.Chip.
    chips: Number of chips.
  """
  table = _table(
    'seconds of an iteration',
    'program',
    'PFLOP',
    'sent GB/chip',
    'FLOPs',
    'HBM',
    'interconnect',
    'limit',
    'compiler',
    'predicted',
    'of peak',
  )
  for name, time in candidate.times.items():
    compiled = candidate.compiled.get(name)
    sent = sum(row[2] for row in compiled.sent) / 1e9 if compiled else float('nan')
    table.add_row(
      name,
      f'{work[name] / 1e15:.4g}',
      f'{sent:.4g}',
      *map(seconds, time[:3]),
      time.limit,
      seconds(time.compiler) if time.compiler else '-',
      seconds(time.seconds),
      f'{work[name] / chips / chip.flops / time.seconds:.0%}',
    )
  total = sum(work.values())
  table.add_section()
  table.add_row(
    'iteration',
    f'{total / 1e15:.4g}',
    '',
    '',
    '',
    '',
    '',
    '',
    seconds(candidate.seconds),
    f'{total / chips / chip.flops / candidate.seconds:.0%}',
  )
  return table


def collectives_table(candidate):
  """Makes the table of collectives: kind, chips per group, GB sent by a chip, number of calls."""
  table = _table('collectives of each chip', 'program', 'kind', 'chips', 'GB sent', 'run')
  for name, compiled in candidate.compiled.items():
    for kind, group, amount, rounds in compiled.sent:
      if amount >= 1e-3 * sum(row[2] for row in compiled.sent):
        table.add_row(name, kind, str(group), f'{amount / 1e9:.4g}', f'{rounds:.0f}')
    table.add_section()
  return table


def candidates_table(candidates, title):
  """Makes the table of candidates, in the given order."""
  table = _table(
    title,
    'mesh, microbatch, remat',
    'GiB',
    'rollout',
    'scoring',
    'update',
    'seconds',
    'tokens/s',
    'from',
  )
  for candidate in candidates:
    times = candidate.times
    table.add_row(
      candidate.name,
      size(candidate.bytes),
      *(
        seconds(times[name].seconds) if name in times else '-'
        for name in ('rollout', 'scoring', 'update')
      ),
      seconds(candidate.seconds) if candidate.fits else 'does not fit',
      f'{candidate.tokens_per_second:.0f}',
      'compiler' if candidate.compiled else 'shapes',
    )
  return table


def text(tables):
  """Formats tables as plain text."""
  out = io.StringIO()
  console = rich.console.Console(file=out, width=WIDTH, color_system=None, highlight=False)
  for table in tables:
    console.print(table)
  return '\n'.join(line.rstrip() for line in out.getvalue().splitlines()).strip('\n')


def show(tables):
  """Prints tables."""
  console = rich.console.Console(width=WIDTH, highlight=False)
  for table in tables:
    console.print(table)


def append(path, title, command, summary, tables):
  """Adds a section to a Markdown file, and removes an older one with the same title.

  Args:
    path: pathlib.Path; created if it does not exist.
    title: Title of the section.
    command: Command line that made the plan.
    summary: One paragraph.
    tables: Tables of the plan.
  """
  before = path.read_text() if path.exists() else ''
  head, *sections = ('\n' + before).split('\n## ')
  sections = [section.rstrip('\n') for section in sections if section.split('\n')[0] != title]
  sections.append(f'{title}\n\n```sh\n{command}\n```\n\n{summary}\n\n```\n{text(tables)}\n```')
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n\n## '.join([head.strip('\n'), *sections]).lstrip('\n') + '\n')
