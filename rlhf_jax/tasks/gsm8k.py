"""GSM8K: word problems of grade-school mathematics with whole numbers as answers.

Cobbe et al. 2021 (https://arxiv.org/abs/2110.14168). A record has a `question` and an `answer`,
whose steps end with a line `#### 72`. Notes for a calculator such as <<48/2=24>>, which the answers
contain, are removed.

Difference from the checker of the authors: it compares the texts of two answers without their
commas; we compare the numbers, so 18.00 is 18.
"""

import decimal
import pathlib
import re

from rlhf_jax import errors
from rlhf_jax.data import sources

PROMPT = 'Question: {question}\nAnswer:'
_ANSWER = re.compile(r'#### (-?\$?[0-9.,]+)')
_CALCULATOR = re.compile(r'<<.*?>>')


def write(folder, *, path):
  """Writes the data sets.

  demonstrations.jsonl  {"prompt", "completion"}: questions and worked answers, for SFT
  prompts.jsonl         {"prompt", "answer"}: the same questions, and their final answers
  test_prompts.jsonl    {"prompt", "answer"}: those of the test set

  Args:
    folder: pathlib.Path of the output folder.
    path: Folder with the files train.jsonl and test.jsonl of GSM8K.
  """
  train, test = (records(pathlib.Path(path) / f'{split}.jsonl') for split in ('train', 'test'))
  sources.write(
    folder / 'demonstrations.jsonl',
    [{'prompt': prompt, 'completion': completion} for prompt, completion, _ in train],
  )
  for name, examples in (('prompts', train), ('test_prompts', test)):
    sources.write(
      folder / f'{name}.jsonl',
      [{'prompt': prompt, 'answer': answer} for prompt, _, answer in examples],
    )


def records(path):
  """Reads a file of GSM8K.

  Args:
    path: pathlib.Path of a file of records with `question` and `answer`.

  Returns:
    List of (prompt, worked answer, final answer), three texts each.

  Raises:
    UserError: An answer has no line `#### N`.
  """
  examples = []
  for number, record in enumerate(sources.read(str(path)), 1):
    answer = _CALCULATOR.sub('', record.fields['answer'])
    final = final_answer(answer)
    errors.need(final is not None, f'{path}: the answer of record {number} has no line #### N')
    prompt = PROMPT.format(question=record.fields['question'])
    examples.append((prompt, f' {answer}', str(final)))
  return examples


def final_answer(text):
  """Returns the number after the first `####` of a text, a Decimal, or None if there is none."""
  match = _ANSWER.search(text)
  try:
    return decimal.Decimal(re.sub('[$,]', '', match[1]).rstrip('.')) if match else None
  except decimal.InvalidOperation:  # such as 1.2.3
    return None


def correct(prompts, responses, *, metadata):
  """Returns 1 for each response whose line `#### N` has the number in column `answer`, else 0."""
  del prompts
  return [
    float(final_answer(response) == decimal.Decimal(entry['answer']))
    for response, entry in zip(responses, metadata, strict=True)
  ]
