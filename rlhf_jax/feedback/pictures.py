"""A picture of Elo ratings: over rounds, or of all policies if there is one round."""

from rlhf_jax import svg

AXIS = 'Elo rating, with its 95 % interval'


def inline(boards):
  """Returns the picture as SVG text for a page.

  Args:
    boards: {round: leaderboard.Leaderboard}, at least one.
  """
  return svg.inline(*_picture(boards), 'Elo ratings' + (' over rounds' if len(boards) > 1 else ''))


def save(path, boards):
  """Saves the picture; see `inline` and svg.save."""
  svg.save(path, *_picture(boards))


def _picture(boards):
  """Returns the function that draws, and the size of the figure in inches."""
  if len(boards) > 1:
    return (lambda figure: _over_rounds(figure, boards)), (5.4, 4.2)
  (board,) = boards.values()
  return (lambda figure: _of_one(figure, board)), (5.2, 1.0 + 0.35 * len(board.standings))


def _of_one(figure, board):
  axes = figure.subplots()
  rows = board.standings[::-1]
  for height, row in enumerate(rows):
    axes.plot([row.low, row.high], [height, height], color=svg.BLUE, alpha=0.4, linewidth=5)
    axes.plot(row.elo, height, color=svg.BLUE, marker='o', markersize=5)
  axes.set_yticks(range(len(rows)), [svg.short(row.policy) for row in rows])
  axes.set_ylim(-0.6, len(rows) - 0.4)
  axes.set_xlabel(AXIS)


def _over_rounds(figure, boards):
  axes = figure.subplots()
  last = list(boards.values())[-1]
  names = [row.policy for row in last.standings]
  for i, (name, colour) in enumerate(zip(names, svg.PALETTE, strict=False)):
    points = [
      (number, row)
      for number, board in boards.items()
      for row in board.standings
      if row.policy == name
    ]
    # Side by side, so that intervals of one round do not hide each other.
    x = [number + 0.04 * (i - (len(names) - 1) / 2) for number, _ in points]
    ratings = [row.elo for _, row in points]
    below, above = zip(*((row.elo - row.low, row.high - row.elo) for _, row in points))
    axes.errorbar(
      x,
      ratings,
      (below, above),
      color=colour,
      label=svg.short(name),
      marker='o',
      markersize=4,
      elinewidth=0.8,
    )
  axes.set_xticks(list(boards))
  axes.set_xlabel('round: battles of this round and all before')
  axes.set_ylabel(AXIS)
  figure.legend(fontsize=8, loc='outside lower center', ncols=2)
