"""A prompt data set from a few texts."""

from rlhf_jax.data import sources


def write(folder, *, texts, count):
  """Writes prompts.jsonl: `count` prompts that take the texts in turn.

  Args:
    folder: pathlib.Path it goes to.
    texts: what the prompts are.
    count: records.
  """
  sources.write(folder / 'prompts.jsonl',
                [{'prompt': texts[i % len(texts)]} for i in range(count)])
