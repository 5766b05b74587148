"""RoBERTa (Liu et al. 2019, https://arxiv.org/abs/1907.11692), as a reward model: BERT but for names and positions.

The model is transformers' RobertaForSequenceClassification, whose score has its own dense layer.
"""

import dataclasses

from rlhf_jax.models import bert
from rlhf_jax.models import hf_config

ARCHITECTURE = CLASSIFIER = 'RobertaForSequenceClassification'
# A buffer of old files, the pretraining's head, and a pooler that nothing reads.
IGNORED_TENSORS = r'(embeddings\.position_ids$|^lm_head\.|^roberta\.pooler\.)'
PREFIX, UNEMBED, RULES = bert.PREFIX, bert.UNEMBED, bert.RULES
Block, Embedder = bert.Block, bert.Embedder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(bert.Config):
  """The fields of a RoBERTa config.json that change what is computed, and the special token ids.

  Attributes:
    pad_token_id: positions up to this one are spare, a text's begin after it.
  """

  MODEL_TYPE = 'roberta'
  head = 'classifier.out_proj'
  kept_token_ids = ('pad_token_id',)

  def check(self):
    super().check()
    if not isinstance(self.pad_token_id, int) or self.pad_token_id < 0:
      raise hf_config.refusal(
        'pad_token_id', self.pad_token_id, 'must be a token id: positions begin after it'
      )
    if self.max_length < 1:
      raise hf_config.refusal(
        'max_position_embeddings',
        self.max_position_embeddings,
        f'must be more than {self.first_position}, where the positions begin',
      )

  @property
  def first_position(self):
    return self.pad_token_id + 1


def sources(config):
  """Where each parameter lies in a Hugging Face file: {path: Source}."""
  return bert.sources(config, top='roberta', pooler='classifier.dense')
