"""Write bert_score.npz: precision, recall and F1 of the package bert-score on a tiny random BERT.

    pip install "bert-score==0.3.13" "torch==2.13.0" "transformers==5.23.0"
    python tests/golden/make_bert_score.py [--out FILE]

Only this script needs torch and bert-score; the test reads the .npz with NumPy.

Contents of the file:
  versions              JSON text
  responses, references JSON texts: n texts, and n lists of one to three texts
  config.json, tokenizer.json, tokenizer_config.json    texts of the model's folder
  tensor/NAME           its weights: a BertForMaskedLM, without a pooler
  scores [L, n, 3]      precision, recall and F1 with each number of layers; of several references,
                        the best of each of the three

Conventions of bert-score 0.3.13, from its source, and checked by these numbers:
  * [CLS] and [SEP] have weight 0 in the means, but other tokens can be matched to them.
  * A padding token counts as a cosine of 0 in the maximum. Here pairs are scored one at a time, so
    there is no padding.
  * An empty text scores 0.
"""

import argparse
import json
import os
import pathlib
import tempfile

import bert_score
import numpy as np
from safetensors import numpy as safetensors
import tokenizers
import torch
import transformers

LAYERS = 3
WORDS = 'a cat dog sat on the mat ##s ##ting un ##til now . , !'.split()
SPECIAL = ['[PAD]', '[UNK]', '[CLS]', '[SEP]']


def write_model(folder):
  """Writes a BertForMaskedLM with large random weights, and a WordPiece tokenizer."""
  vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
  backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token='[UNK]'))
  backend.normalizer = tokenizers.normalizers.BertNormalizer()
  backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
  )
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    pad_token='[PAD]',
    unk_token='[UNK]',
    cls_token='[CLS]',
    sep_token='[SEP]',
    model_max_length=16,
  )
  tokenizer.save_pretrained(folder)
  torch.manual_seed(0)
  model = transformers.BertForMaskedLM(
    transformers.BertConfig(
      vocab_size=len(vocabulary),
      hidden_size=12,
      intermediate_size=20,
      num_hidden_layers=LAYERS,
      num_attention_heads=4,
      max_position_embeddings=16,
      pad_token_id=0,
    )
  )
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_((0.5 if parameter.ndim > 1 else 0.1) * torch.randn_like(parameter))
  model.save_pretrained(folder)


def random_texts(count):
  """Returns texts of up to 30 words with unknown words, some longer than the model's context."""
  draw = np.random.default_rng(0)
  words = ['a', 'cats', 'Dog', 'sat', 'sitting', 'on', 'the', 'mat', 'until', 'now', '.', 'naïve']
  one = lambda: ' '.join(draw.choice(words, draw.integers(1, draw.choice([4, 10, 30]))))
  return [one() for _ in range(count)], [
    [one() for _ in range(draw.integers(1, 4))] for _ in range(count)
  ]


def main(out):
  with tempfile.TemporaryDirectory(prefix='bert_') as folder:
    write_model(folder)
    responses, references = random_texts(12)
    scores = np.zeros((LAYERS, len(responses), 3), np.float32)
    for layers in range(1, LAYERS + 1):
      for i, (response, group) in enumerate(zip(responses, references)):
        each = [
          bert_score.score(
            [response],
            [one],
            model_type=folder,
            num_layers=layers,
            device='cpu',
            use_fast_tokenizer=True,
          )
          for one in group
        ]
        scores[layers - 1, i] = np.array([[float(x) for x in row] for row in each]).max(axis=0)
    files = ('config.json', 'tokenizer.json', 'tokenizer_config.json')
    texts = {name: (pathlib.Path(folder) / name).read_text() for name in files}
    tensors = safetensors.load_file(os.path.join(folder, 'model.safetensors'))
  versions = {m.__name__: m.__version__ for m in (bert_score, torch, transformers, np)}
  np.savez_compressed(
    out,
    versions=json.dumps(versions),
    responses=json.dumps(responses),
    references=json.dumps(references),
    scores=scores,
    **texts,
    **{f'tensor/{name}': value for name, value in tensors.items()},
  )


if __name__ == '__main__':
  parser = argparse.ArgumentParser()
  parser.add_argument('--out', default=str(pathlib.Path(__file__).with_name('bert_score.npz')))
  main(parser.parse_args().out)
