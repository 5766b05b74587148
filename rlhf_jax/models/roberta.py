"""RoBERTa (Liu et al. 2019, https://arxiv.org/abs/1907.11692), as a reward model.

The model is transformers' RobertaForSequenceClassification. It is BERT with other tensor names,
other positions, and a pooler that belongs to the classification head.
"""

import dataclasses

from rlhf_jax.models import bert
from rlhf_jax.models import hf_config

ARCHITECTURE = CLASSIFIER = 'RobertaForSequenceClassification'
# A buffer in old files, the head of pretraining, and an unused pooler.
IGNORED_TENSORS = r'(embeddings\.position_ids$|^lm_head\.|^roberta\.pooler\.)'
PREFIX, UNEMBED, RULES = bert.PREFIX, bert.UNEMBED, bert.RULES
Block, Embedder = bert.Block, bert.Embedder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(bert.Config):
  """The fields of a RoBERTa config.json that affect the computation, and the special token ids.

  Attributes:
    pad_token_id: Also sets the position of the first token, which is pad_token_id + 1.
  """

  MODEL_TYPE = 'roberta'
  head = 'classifier.out_proj'
  kept_token_ids = ('pad_token_id',)

  def check(self):
    super().check()
    if not isinstance(self.pad_token_id, int) or self.pad_token_id < 0:
      raise hf_config.refusal(
        'pad_token_id',
        self.pad_token_id,
        'must be a token id, because positions start at pad_token_id + 1',
      )
    if self.max_length < 1:
      raise hf_config.refusal(
        'max_position_embeddings',
        self.max_position_embeddings,
        f'must be more than {self.first_position}, the first position (pad_token_id + 1)',
      )

  @property
  def first_position(self):
    return self.pad_token_id + 1


def sources(config):
  """Returns the source of each parameter in Hugging Face files, {path: Source}."""
  return bert.sources(config, prefix='roberta', pooler='classifier.dense')
