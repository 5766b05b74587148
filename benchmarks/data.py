"""Measures the time to the first batch and the peak host memory for large data sets.

python -m benchmarks.data --records 1000000 --tokenizer FOLDER

Writes records of prompt and completion, 500 bytes each, as JSONL and as Parquet to a temporary
folder. For each file it starts a process that imports the library, opens the data as SFT and PPO do
and draws batches. Then it starts the process again, because a second start uses the index that the
first one wrote.
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time

from absl import app
from absl import flags

from rlhf_jax.evaluation import tables

FLAGS = flags.FLAGS
flags.DEFINE_integer('records', 1_000_000, 'Number of records.')
flags.DEFINE_string('tokenizer', None, 'Folder of a tokenizer.', required=True)
flags.DEFINE_list('kinds', ['completion', 'text', 'prompt'], 'Kinds of examples.')
flags.DEFINE_list('formats', ['jsonl', 'parquet'], 'File formats.')
flags.DEFINE_integer('batches', 20, 'Number of batches after the first.')
flags.DEFINE_string('folder', None, 'Folder for the data; None for a temporary folder.')

WORDS = 50_000  # number of different words
BATCH, LENGTH = 32, 512


def records(count):
  """Yields records of about 500 bytes. Word frequencies follow Zipf's law."""
  draw = random.Random(0)
  words = [
    ''.join(draw.choices('etaoinshrdlucmfw', k=2 + number.bit_length() // 2))
    for number in range(WORDS)
  ]
  weights = [1 / (number + 1) for number in range(WORDS)]
  text = ' '.join(draw.choices(words, weights, k=1_000_000))
  for number in range(count):
    start, length = draw.randrange(len(text) - 1000), min(int(draw.lognormvariate(5.6, 0.6)), 4000)
    middle = start + 100
    yield {
      'prompt': f'{number}: {text[start:middle]}',
      'completion': text[middle : middle + 100 + length],
    }


def write(path, count):
  """Writes records in the format of the path's suffix."""
  if path.endswith('.jsonl'):
    with open(path, 'w') as stream:
      stream.writelines(json.dumps(record) + '\n' for record in records(count))
    return
  import pyarrow.parquet

  schema = pyarrow.schema([('prompt', pyarrow.string()), ('completion', pyarrow.string())])
  with pyarrow.parquet.ParquetWriter(path, schema) as writer:
    some = []
    for number, record in enumerate(records(count), start=1):
      some.append(record)
      if number == count or len(some) == 100_000:
        writer.write_table(pyarrow.Table.from_pylist(some, schema))
        some = []


def draw(kind, path, tokenizer, batches):
  """Draws batches and prints JSON: time to the first batch, time per batch, and peak memory."""
  began = float(os.environ['BEGAN'])
  from rlhf_jax.data import formats
  from rlhf_jax.data import pipelines
  from rlhf_jax.data import sources
  from rlhf_jax.data import tokenizers
  import rlhf_jax.main  # imports all that a run imports

  del rlhf_jax.main
  tokenizer, source = tokenizers.load(tokenizer), sources.read(path)
  if kind == 'completion':
    examples, _ = formats.completions(source, tokenizer=tokenizer)
    iterator, _ = pipelines.completion_iterator(
      examples, tokenizer, batch_size=BATCH, max_length=LENGTH, seed=0
    )
  elif kind == 'text':
    examples, _ = formats.texts(source, tokenizer=tokenizer)
    iterator, _ = pipelines.lm_iterator(
      examples, tokenizer, batch_size=BATCH, length=LENGTH, seed=0
    )
  else:
    examples, _ = formats.prompts(source, tokenizer=tokenizer)
    iterator, _ = pipelines.prompt_iterator(
      examples,
      tokenizer,
      batch_size=BATCH,
      max_prompt_length=LENGTH,
      seed=0,
      on_long='truncate_left',
    )
  next(iterator)
  first, cpu = time.time(), time.process_time()
  for _ in range(batches):
    next(iterator)
  print(
    json.dumps(
      {
        'first batch': first - began,
        'CPU': cpu,
        'milliseconds per batch': 1000 * (time.time() - first) / batches,
        'peak MiB': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
      }
    )
  )


def main(_):
  rows = []
  with tempfile.TemporaryDirectory() as temporary:
    folder = FLAGS.folder or temporary
    for suffix in FLAGS.formats:
      path = os.path.join(folder, f'{FLAGS.records}.{suffix}')
      if not os.path.exists(path):
        write(path, FLAGS.records)
      size = os.path.getsize(path) / 2**20
      for kind in FLAGS.kinds:
        for start in ('first', 'second') if kind == FLAGS.kinds[0] else ('second',):
          call = f'draw({kind!r}, {path!r}, {FLAGS.tokenizer!r}, {FLAGS.batches})'
          done = subprocess.run(
            [sys.executable, '-c', f'from benchmarks import data; data.{call}'],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {'BEGAN': str(time.time()), 'JAX_PLATFORMS': 'cpu'},
          )
          rows.append(
            {
              'file': f'{suffix}, {size:.0f} MiB',
              'kind': kind,
              'start': start,
              **json.loads(done.stdout.splitlines()[-1]),
            }
          )
          print(rows[-1], flush=True)
  print(tables.stages_table(rows, title=f'{FLAGS.records} records'))


if __name__ == '__main__':
  app.run(main)
