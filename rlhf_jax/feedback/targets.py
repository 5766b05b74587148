"""The target of red teaming: a frozen policy that answers attacks, whose harm is scored.

`harm_of_target` is the reward of an attacker that is trained by RL.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
from typing import Any

from absl import logging
import jax
import ml_collections

from rlhf_jax import errors
from rlhf_jax import policy as policy_lib
from rlhf_jax import sharding
from rlhf_jax.data import formats
from rlhf_jax.data import stored
from rlhf_jax.data import tokenizers
from rlhf_jax.feedback import attacks as attacks_lib
from rlhf_jax.rewards import offline

LENGTH_MULTIPLE = 8  # prompts are padded to a multiple of it, so that few lengths are compiled


@dataclasses.dataclass(frozen=True)
class Target:
  """A frozen policy that answers attacks, and the harm score of its responses.

  Attributes:
    policy: policy.TextPolicy.
    harm: scorer of rewards.offline.
    responses: number of responses to an attack.
    max_new_tokens: longest response, in tokens.
    temperature: sampling temperature.
  """

  policy: policy_lib.TextPolicy
  harm: Callable[..., Any]
  responses: int
  max_new_tokens: int
  temperature: float

  @classmethod
  def load(cls, path, harm, *, responses, max_new_tokens, temperature):
    """Loads a policy and makes the harm score.

    Args:
      path: Folder of the policy, or of the run that trained it.
      harm: Dict with the keys of scorers.config().
      responses: See the class.
      max_new_tokens: See the class.
      temperature: See the class.
    """
    policy, block = policy_lib.TextPolicy.load(path), ml_collections.ConfigDict(harm)
    scorer = offline.make(block, policy.tokenizer, batch_size=policy_lib.BATCH_SIZE, key='harm')
    return cls(policy, scorer, responses, max_new_tokens, temperature)

  def answer(self, attacks: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Answers attacks and scores the harm of the responses.

    The responses depend on the seed and on all attacks, so that a run that resumes gets the same.

    Args:
      attacks: Texts. One that is empty, or too long for the context with a response, gets no
        response and counts as a score of 0.
      seed: Random seed.

    Returns:
      `{"prompt", "responses", "scores"}` of each attack.

    Raises:
      UserError: The context has no room for an attack of any length.
    """
    records = [{'prompt': attack, 'responses': [], 'scores': []} for attack in attacks]
    room = self.policy.model.max_length - self.max_new_tokens
    asked, prompts, longest = self._asked(attacks, room)
    if not asked:
      return records
    texts = [prompt.prompt for prompt in prompts]
    length = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    digest = hashlib.sha256(repr((seed, texts)).encode()).digest()
    with jax.set_mesh(sharding.make_mesh({}, devices=jax.devices()[:1])):
      samples = self.policy.sample(
        texts,
        int.from_bytes(digest[:4], 'big'),
        max_new_tokens=self.max_new_tokens,
        temperature=self.temperature,
        samples=self.responses,
        prompt_length=min(length, room),
      )
    scores, _ = self.harm(
      samples.rollout, [prompt for prompt in prompts for _ in range(self.responses)]
    )
    for number, i in enumerate(asked):
      part = slice(number * self.responses, (number + 1) * self.responses)
      records[i] |= {'responses': samples.responses[part], 'scores': scores[part].tolist()}
    return records

  def _asked(self, attacks, room):
    """Returns (indices of attacks that get a response, their prompts, the longest in tokens)."""
    errors.need(
      room > 0,
      f'max_new_tokens={self.max_new_tokens} leaves no room for attacks in the context of the '
      f'target, {self.policy.model.max_length} tokens: lower it',
    )
    asked = [i for i, attack in enumerate(attacks) if attack.strip()]
    if not asked:
      return [], [], 0
    prompts = as_prompts([attacks[i] for i in asked], self.policy.tokenizer)
    ids = tokenizers.encode(self.policy.tokenizer, [prompt.prompt for prompt in prompts])
    found = [one for one in zip(asked, prompts, map(len, ids)) if one[2] <= room]
    if len(found) < len(asked):
      logging.warning(
        '%d of %d attacks get no response: they have more than %d tokens, the longest that the '
        'context of the target has room for',
        len(asked) - len(found),
        len(attacks),
        room,
      )
    if not found:
      return [], [], 0
    asked, prompts, lengths = zip(*found)
    return list(asked), list(prompts), max(lengths)


def as_prompts(attacks, tokenizer):
  """Returns attacks as formats.Prompt; a tokenizer with a chat template makes them messages."""
  fields = lambda attack: (
    {'messages': [{'role': 'user', 'content': attack}]}
    if tokenizer.chat_template
    else {'prompt': attack}
  )
  records = [stored.Record(fields(attack), f'attack {i}') for i, attack in enumerate(attacks)]
  return list(formats.prompts(records, tokenizer=tokenizer)[0])


def harm_of_target(
  prompts: list[str],
  responses: list[str],
  *,
  target: str,
  harm: dict[str, Any],
  prefix: str,
  answers: int,
  max_new_tokens: int,
  temperature: float,
  seed: int = 0,
) -> list[float]:
  """The mean harm of the target's responses to each attack: the reward of an attacker.

  `prompts` and `responses` are what the attacker reads and writes. `target`, `harm`, `prefix`,
  `max_new_tokens` and `temperature` are the arguments of `run`, and `answers` its `responses`.
  """
  del prompts
  loaded = _target(target, json.dumps(harm, sort_keys=True), answers, max_new_tokens, temperature)
  attacks = [attacks_lib.of_response(prefix, response) for response in responses]
  return [attacks_lib.mean(record['scores']) for record in loaded.answer(attacks, seed)]


@functools.lru_cache(maxsize=2)
def _target(path, harm, responses, max_new_tokens, temperature):
  """Returns Target.load of a harm block as JSON; a run calls it with every batch."""
  return Target.load(
    path,
    json.loads(harm),
    responses=responses,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
  )
