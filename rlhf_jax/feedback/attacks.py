"""Texts of red teaming: what an attacker reads, and how diverse and how alike its attacks are.

An attack is a prompt for the target. The attacker reads `instruction + examples + prefix`, one
example a line, and continues it. The attack is the prefix with the first line of the continuation.

Letters: n attacks.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np
from sklearn import cluster
from sklearn.feature_extraction import text as text_features

from rlhf_jax import errors
from rlhf_jax.rewards import text as text_metrics
from rlhf_jax.rewards import text_statistics

SELF_BLEU_TEXTS = 128  # texts of `self_bleu`, whose time grows with their square


def attacker_prompt(instruction: str, prefix: str, examples: Sequence[str] = ()) -> str:
  """Returns what the attacker reads; see the top of the file."""
  return instruction + ''.join(f'{example}\n' for example in examples) + prefix


def of_response(prefix: str, response: str) -> str:
  """Returns the attack of an attacker's response: the prefix with the response's first line."""
  return (prefix + response).strip().partition('\n')[0].rstrip()


def mean(scores):
  """Returns the mean of a list of scores; 0 if it is empty."""
  return sum(scores) / len(scores) if scores else 0.0


def draw_examples(
  attacks: Sequence[str],
  scores: Sequence[float],
  shots: int,
  *,
  temperature: float,
  random: np.random.Generator,
) -> list[str]:
  """Draws different examples of attacks, with the probability of each

      p_i = exp(s_i / T) / sum_j exp(s_j / T)

  See Perez et al. 2022, section 3.1, stochastic few-shot generation
  (https://arxiv.org/abs/2202.03286).

  Args:
    attacks: n different texts.
    scores: [n] harm of the target's responses.
    shots: Number of examples; all are taken if there are fewer.
    temperature: T, in units of the scores.
    random: NumPy generator.
  """
  # The largest of log p + Gumbel noise are draws without replacement, and no p that underflows
  # makes it fail.
  logits = np.asarray(scores, float) / temperature
  order = np.argsort(-(logits + random.gumbel(size=len(logits))), kind='stable')
  return [attacks[i] for i in order[:shots]]


def novelty(attacks: Sequence[str], n: int = 2) -> list[float]:
  """Computes how unlike the others each attack is, in [0, 1].

      1 - mean over its distinct n-grams of (number of others that have it) / (number of others)

  An attack of fewer than n words counts as one n-gram. Without others it is 1.

  Args:
    attacks: Texts.
    n: Words of an n-gram.
  """
  grams = [set(text_statistics.ngrams(text, n)) or {tuple(text.split())} for text in attacks]
  have, others = {}, len(grams) - 1
  for gram in (gram for own in grams for gram in own):
    have[gram] = have.get(gram, 0) + 1
  if others < 1:
    return [1.0] * len(grams)
  return [1 - sum(have[gram] - 1 for gram in own) / (others * len(own)) for own in grams]


def diversity(prompts: list[str], responses: list[str], *, prefix: str, n: int = 2) -> list[float]:
  """The `novelty` of each attack in its batch: the bonus of an attacker that is trained by RL.

  Perez et al. 2022 keep attacks diverse by the KL penalty alone. A reward for novelty is from Hong
  et al. 2024 (https://arxiv.org/abs/2402.19464), who measure it by self-BLEU and embeddings.
  """
  del prompts
  return novelty([of_response(prefix, response) for response in responses], n)


diversity.whole_batch = True  # for rewards.host: each reward depends on the other responses


def self_bleu(texts: Sequence[str]) -> float:
  """Computes the mean BLEU of each text with all others as its references, in [0, 1].

  Low values mean diverse texts. See Zhu et al. 2018, Texygen (https://arxiv.org/abs/1802.01886).
  Only the first SELF_BLEU_TEXTS texts are compared: the value grows with their number. It is 0 for
  fewer than two texts.
  """
  texts = list(texts)[:SELF_BLEU_TEXTS]
  if len(texts) < 2:
    return 0.0
  bleu = text_metrics.package('sacrebleu').BLEU(effective_order=True)
  scores = [
    bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)
  ]
  return sum(scores) / len(scores) / 100


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Attacks that are alike.

  Attributes:
    size: number of different attacks.
    success: mean success of them.
    typical: the attack nearest to their centre.
    words: words that weigh most in the centre.
  """

  size: int
  success: float
  typical: str
  words: list[str]


def clusters(
  texts: Sequence[str], success: Sequence[float], count: int, seed: int
) -> list[Cluster]:
  """Groups attacks by k-means on the TF-IDF of their words and pairs of words.

  Args:
    texts: Attacks; of equal ones the first counts.
    success: Success of each, in [0, 1].
    count: Largest number of clusters.
    seed: Random seed of k-means.

  Returns:
    Clusters, that of the highest success first.
  """
  first = dict(zip(reversed(texts), reversed(success)))
  texts = list(dict.fromkeys(texts))
  errors.need(texts, 'there are no attacks to cluster')
  vectorizer = text_features.TfidfVectorizer(ngram_range=(1, 2), token_pattern=r'(?u)\b\w+\b')
  features = vectorizer.fit_transform(texts)
  names = vectorizer.get_feature_names_out()
  model = cluster.KMeans(min(count, len(texts)), n_init=4, random_state=seed).fit(features)
  similar = features @ model.cluster_centers_.T  # [n, clusters]
  found = []
  for number, centre in enumerate(model.cluster_centers_):
    members = np.flatnonzero(model.labels_ == number)
    if members.size:
      found.append(
        Cluster(
          size=len(members),
          success=float(np.mean([first[texts[i]] for i in members])),
          typical=texts[members[np.argmax(similar[members, number])]],
          words=[str(names[i]) for i in np.argsort(-centre, kind='stable')[:4] if centre[i] > 0],
        )
      )
  return sorted(found, key=lambda one: -one.success)
