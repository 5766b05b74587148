"""Simulated annotators: they prefer by a gold score, disagree with each other, and err.

Nothing here stands for people: every record says `"simulated": true`. Annotator i prefers response
b to response a of prompt x with the probability of Bradley and Terry 1952,

    P_i(b > a) = noise + (1 - 2 noise) * sigmoid((u_i(x, b) - u_i(x, a)) / temperature)
    u_i(x, y) = exp(d * s_i) * gold(x, y) + d * l_i * words(y) / 10 + d * t_i(x, y)

where d is the disagreement, s_i (how strictly quality counts), l_i (a taste for long or short
texts) and t_i (a whim about this very text) are standard normal, and `noise` is the chance that
the label is then flipped. Of several responses it picks y with probability softmax(u_i / temperature)
(Luce 1959, which is Bradley and Terry's for two), and `noise` is the chance that the label is then
one of the others. Every draw is a function of the seed, the annotator and the texts alone,
so the same question always gets the same answer, whatever was asked before.
"""

import collections.abc
import dataclasses
import hashlib
import math
import random

import numpy as np

from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SimulatedAnnotators:
  """A panel of simulated annotators; see the top of the file.

  Attributes:
    gold: (prompt, response) -> score; the only place where the hidden score enters.
    count: number of annotators.
    seed: draws tastes, whims and flips.
    temperature: of the Bradley-Terry choice, in units of the gold score; 0 for no chance at all.
    label_noise: probability in [0, 0.5] that a label is flipped.
    disagreement: standard deviation of the annotators' own tastes; 0 if all want the same.
  """

  gold: collections.abc.Callable[[str, str], float]
  count: int = 5
  seed: int = 0
  temperature: float = 0.5
  label_noise: float = 0.05
  disagreement: float = 0.3

  def __post_init__(self):
    for name, good, wanted in (
      ('count', self.count >= 1, 'at least 1'),
      ('temperature', self.temperature >= 0, 'at least 0'),
      ('label_noise', 0 <= self.label_noise <= 0.5, 'in [0, 0.5]'),
      ('disagreement', self.disagreement >= 0, 'at least 0'),
    ):
      if not good:
        raise UserError(f'simulated annotators: {name} = {getattr(self, name)}: must be {wanted}')

  def utility(self, prompt, response, annotator):
    """u_i(x, y): what annotator i thinks of a response, in units of the gold score."""
    own = self._random('taste', annotator)
    strictness, length_taste = own.gauss(0, 1), own.gauss(0, 1)
    whim = self._random('whim', annotator, prompt, response).gauss(0, 1)
    taste = length_taste * len(response.split()) / 10 + whim
    strict = math.exp(self.disagreement * strictness)
    return strict * self.gold(prompt, response) + self.disagreement * taste

  def probability(self, prompt, a, b, annotator):
    """P_i(b > a), the label noise included."""
    margin = self.utility(prompt, b, annotator) - self.utility(prompt, a, annotator)
    if self.temperature == 0:
      preference = 0.5 * (1 + np.sign(margin))
    else:
      # tanh does not overflow where exp does.
      preference = 0.5 * (1 + math.tanh(0.5 * margin / self.temperature))
    return self.label_noise + (1 - 2 * self.label_noise) * preference

  def compare(self, prompt, a, b, annotator):
    """1 if annotator i prefers b, 0 if a."""
    draw = self._random('label', annotator, prompt, a, b).random()
    return int(draw < self.probability(prompt, a, b, annotator))

  def pick(self, prompt, responses, annotator):
    """Index of the response that annotator i likes best; see the top of the file."""
    random_ = self._random('pick', annotator, prompt, *responses)
    utilities = [self.utility(prompt, response, annotator) for response in responses]
    # The largest of u / temperature + Gumbel noise is drawn from their softmax.
    noise = [-math.log(-math.log(1 - random_.random())) for _ in responses]
    liked = [u + self.temperature * z for u, z in zip(utilities, noise)]
    best = liked.index(max(liked))
    if random_.random() < self.label_noise:
      return random_.choice([i for i in range(len(responses)) if i != best])
    return best

  def label_best(self, groups):
    """Records of the best of several responses, each group asked of one annotator in turn.

    Args:
      groups: iterable of (prompt, responses), at least two. Where all of them are equal there is
        nothing to prefer: no record.

    Returns:
      List of `{"prompt", "completions", "best", "annotator", "simulated": True}`.
    """
    records = []
    for i, (prompt, responses) in enumerate(groups):
      if len(set(responses)) > 1:
        annotator = i % self.count
        best = self.pick(prompt, responses, annotator)
        record = {'prompt': prompt, 'completions': list(responses), 'best': best}
        records.append(record | {'annotator': annotator, 'simulated': True})
    return records

  def label(self, pairs):
    """Comparison records of pairs, each asked of one annotator in turn.

    Args:
      pairs: iterable of (prompt, a, b). Where a == b there is nothing to prefer: no record.

    Returns:
      List of `{"prompt", "chosen", "rejected", "annotator", "simulated": True}`.
    """
    records = []
    for i, (prompt, a, b) in enumerate(pairs):
      if a == b:
        continue
      annotator = i % self.count
      rejected, chosen = (a, b) if self.compare(prompt, a, b, annotator) else (b, a)
      record = {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}
      records.append(record | {'annotator': annotator, 'simulated': True})
    return records

  def votes(self, pairs):
    """[pairs, annotators] int array of `compare`: every pair asked of everyone."""
    return np.array(
      [[self.compare(*pair, annotator) for annotator in range(self.count)] for pair in pairs],
      dtype=int,
    ).reshape(-1, self.count)

  def _random(self, *key):
    digest = hashlib.sha256(repr((self.seed, *key)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], 'big'))


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How far annotators agree.

  Attributes:
    fraction: of pairs of annotators that gave the same item the same label.
    kappa: Fleiss' kappa, 0 at chance and 1 when all agree; NaN if there was only one label.
  """

  fraction: float
  kappa: float


def agreement(votes):
  """Agreement between annotators, each of whom labelled every item.

  fraction = mean_i sum_c n_ic (n_ic - 1) / (m (m - 1)) over items i and labels c, of m votes;
  kappa = (fraction - chance) / (1 - chance), chance = sum_c (share of label c)^2.
  See Fleiss 1971, eq. 1-7 (https://doi.org/10.1037/h0031619).

  Args:
    votes: [items, annotators] array of labels.

  Raises:
    UserError: fewer than one item or two annotators.
  """
  votes = np.asarray(votes)
  if votes.ndim != 2 or votes.shape[0] < 1 or votes.shape[1] < 2:
    raise UserError(
      f'agreement needs at least 1 item and 2 annotators, got votes of shape {votes.shape}'
    )
  raters = votes.shape[1]
  counts = np.stack([(votes == label).sum(axis=1) for label in np.unique(votes)], axis=1)
  fraction = float((counts * (counts - 1)).sum(axis=1).mean() / (raters * (raters - 1)))
  chance = float((counts.mean(axis=0) / raters) @ (counts.mean(axis=0) / raters))
  kappa = (fraction - chance) / (1 - chance) if counts.shape[1] > 1 else math.nan
  return Agreement(fraction=fraction, kappa=kappa)
