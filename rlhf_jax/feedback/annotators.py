"""Simulated annotators who prefer by a gold score, disagree with each other and make mistakes.

Every record is marked `"simulated": true`, because its label is not from a person. Annotator i
prefers response b to response a of prompt x with the probability of Bradley and Terry 1952,

    P_i(b > a) = noise_i + (1 - 2 noise_i) * sigmoid((u_i(x, b) - u_i(x, a)) / temperature)
    u_i(x, y) = exp(d * s_i) * gold(x, y) + d * l_i * words(y) / 10 + d * t_i(x, y)

where d is the disagreement; s_i (the weight of quality), l_i (the preference for long or short
texts) and t_i (the preference for this particular text) are standard normal; and `noise` is the
probability that the label is then flipped. In other words, annotator i perceives the difference

    u_i(x, b) - u_i(x, a) + temperature * z

with a standard logistic z and chooses by its sign, but answers at random with probability 2 noise.
The strength of the preference and ties follow from what is perceived (ties by Rao and Kupper 1967),
so a bad response may be preferred strongly; who answers at random also gives a random strength.

From several responses an annotator picks one with probability softmax(u_i / temperature) (Luce
1959; with two responses this is Bradley and Terry's model), and `noise` is the probability that the
label is then one of the others. A ranking is drawn one place after the other by the same choice
(Plackett 1975), and a rating is the utility in steps of a scale from 1 to 7; with probability 2
noise either is drawn at random instead, which for two responses is the noise above. Every draw
depends only on the seed, the annotator, the texts in their order and the occasion, so the same
question always gets the same answer. Asked again, an annotator may contradict themselves, as people
do: with the texts in another order, or on another occasion, the draws are independent, while tastes
are the same.
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
    gold: function (prompt, response) -> gold score, which only annotators and evaluation may see.
    count: number of annotators.
    seed: random seed.
    temperature: temperature of the Bradley-Terry choice, in units of the gold score; 0 for a
      deterministic choice.
    label_noise: probability in [0, 0.5] that a label is flipped, or one probability for each
      annotator; an annotator with 0.5 chooses between two at random.
    disagreement: standard deviation of the annotators' individual preferences; 0 if they agree.
    occasion: 0 for the first time that they are asked, 1 for the second, and so on.
  """

  gold: collections.abc.Callable[[str, str], float]
  count: int = 5
  seed: int = 0
  temperature: float = 0.5
  label_noise: float | collections.abc.Sequence[float] = 0.05
  disagreement: float = 0.3
  occasion: int = 0

  def __post_init__(self):
    for name, good, wanted in (
      ('count', self.count >= 1, 'at least 1'),
      ('temperature', self.temperature >= 0, 'at least 0'),
      ('label_noise', all(0 <= noise <= 0.5 for noise in self.noises), 'in [0, 0.5]'),
      ('label_noise', len(self.noises) == self.count, f'one number, or count={self.count} of them'),
      ('disagreement', self.disagreement >= 0, 'at least 0'),
    ):
      if not good:
        raise UserError(f'simulated annotators: {name} = {getattr(self, name)}: must be {wanted}')

  @property
  def noises(self):
    """Probability of a flipped label of each annotator."""
    noise = self.label_noise
    return (noise,) * self.count if isinstance(noise, (int, float)) else tuple(noise)

  def utility(self, prompt, response, annotator):
    """Returns u_i(x, y), the utility of a response for annotator i, in units of the gold score."""
    rng = self._random('taste', annotator)
    strictness, length_taste = rng.gauss(0, 1), rng.gauss(0, 1)
    whim = self._random('whim', annotator, prompt, response).gauss(0, 1)
    taste = length_taste * len(response.split()) / 10 + whim
    strict = math.exp(self.disagreement * strictness)
    return strict * self.gold(prompt, response) + self.disagreement * taste

  def probability(self, prompt, a, b, annotator):
    """Returns P_i(b > a), including label noise."""
    return self._probability(self._difference(prompt, a, b, annotator), annotator)

  def _difference(self, prompt, a, b, annotator):
    return self.utility(prompt, b, annotator) - self.utility(prompt, a, annotator)

  def _probability(self, margin, annotator):
    if self.temperature == 0:
      preference = 0.5 * (1 + np.sign(margin))
    else:
      # sigmoid(x) = (1 + tanh(x / 2)) / 2; exp could overflow.
      preference = 0.5 * (1 + math.tanh(0.5 * margin / self.temperature))
    noise = self.noises[annotator]
    return noise + (1 - 2 * noise) * preference

  def compare(self, prompt, a, b, annotator):
    """Returns 1 if annotator i prefers b, 0 if a."""
    return self.grade(prompt, a, b, annotator)[0]

  def grade(self, prompt, a, b, annotator, *, tie=0.0, steps=()):
    """Returns annotator i's choice, as `compare` does, and the strength of their preference.

    Args:
      prompt: Text.
      a: Text.
      b: Text.
      annotator: i.
      tie: Perceived difference below which the choice is None, a tie.
      steps: Perceived differences from which the strength is 2, 3 and so on; below, it is 1.
    """
    rng, noise = self._draw('label', annotator, prompt, a, b), self.noises[annotator]
    margin, draw = self._difference(prompt, a, b, annotator), rng.random()
    chosen = int(draw < self._probability(margin, annotator))
    if not noise <= draw < 1 - noise:  # answered at random, with probability 2 noise
      return chosen, rng.randint(1, 1 + len(steps))
    # margin + temperature * z has the sign of the choice.
    uniform = min(max((draw - noise) / (1 - 2 * noise), 1e-12), 1 - 1e-12)
    z = math.log(1 - uniform) - math.log(uniform)
    distance = abs(margin + self.temperature * z)
    return None if distance < tie else chosen, 1 + sum(distance >= step for step in steps)

  def pick(self, prompt, responses, annotator):
    """Returns the index of the response that annotator i picks as the best."""
    rng = self._draw('pick', annotator, prompt, *responses)
    noisy = self._noisy_utilities(rng, prompt, responses, annotator)
    best = noisy.index(max(noisy))
    if rng.random() < self.noises[annotator]:
      return rng.choice([i for i in range(len(responses)) if i != best])
    return best

  def rank(self, prompt, responses, annotator):
    """Returns the indices of the responses as annotator i ranks them, best first."""
    rng = self._draw('rank', annotator, prompt, *responses)
    noisy = self._noisy_utilities(rng, prompt, responses, annotator)
    order = sorted(range(len(responses)), key=lambda i: -noisy[i])
    if rng.random() < 2 * self.noises[annotator]:
      rng.shuffle(order)
    return order

  def rate(self, prompt, response, annotator, *, middle=0.0, step=1.0):
    """Returns annotator i's rating of a response, from 1 to 7.

    Args:
      prompt: Text.
      response: Text.
      annotator: i.
      middle: Utility of a response that deserves a 4.
      step: Difference of utility between one rating and the next.
    """
    rng = self._draw('rate', annotator, prompt, response)
    if rng.random() < 2 * self.noises[annotator]:
      return rng.randint(1, 7)
    steps = (self.utility(prompt, response, annotator) - middle) / step
    return min(max(4 + math.floor(steps + 0.5), 1), 7)

  def label_best(self, groups):
    """Labels the best of several responses; annotators take the groups in turn.

    Args:
      groups: Iterable of (prompt, responses) with at least two responses. A group whose responses
        are all equal gets no record.

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
    """Labels pairs of responses; annotators take the pairs in turn.

    Args:
      pairs: Iterable of (prompt, a, b). A pair with a == b gets no record.

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
    """Returns the results of `compare` for every pair and annotator, [pairs, annotators] int."""
    return np.array(
      [[self.compare(*pair, annotator) for annotator in range(self.count)] for pair in pairs],
      dtype=int,
    ).reshape(-1, self.count)

  def _noisy_utilities(self, rng, prompt, responses, annotator):
    """Returns utilities whose order is a sample of the choices by softmax(u / temperature).

    The argmax of u / temperature + Gumbel noise is a sample of softmax(u / temperature), and the
    order is one of choices without replacement.
    """
    utilities = [self.utility(prompt, response, annotator) for response in responses]
    noise = [-math.log(-math.log(1 - rng.random())) for _ in responses]
    return [u + self.temperature * z for u, z in zip(utilities, noise)]

  def _draw(self, *key):
    return self._random(*key, *([self.occasion] if self.occasion else []))

  def _random(self, *key):
    digest = hashlib.sha256(repr((self.seed, *key)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], 'big'))
