"""Seconds to the first batch, and host memory at the peak, of large data sets.

python -m benchmarks.data --records 1000000 --tokenizer FOLDER

Makes records of prompt and completion, 500 bytes a record, as JSONL and as Parquet in a temporary
folder, and for each of them starts a process that imports the library, opens the data as SFT and
PPO do and draws batches; then the same again, as a second start finds the index of the first.
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
flags.DEFINE_integer('records', 1_000_000, 'how many')
flags.DEFINE_string('tokenizer', None, 'folder of a tokenizer', required=True)
flags.DEFINE_list('kinds', ['completion', 'text', 'prompt'], 'what is made of the records')
flags.DEFINE_list('formats', ['jsonl', 'parquet'], 'of the files')
flags.DEFINE_integer('batches', 20, 'that are drawn after the first')
flags.DEFINE_string('folder', None, 'where the data are made; None: a temporary folder')

WORDS = 50_000  # different ones
BATCH, LENGTH = 32, 512


def records(count):
  """Records of some 500 bytes: words drawn as in language, the commonest the shortest."""
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
  """Prints JSON: wall and CPU seconds to the first batch and of the next ones, and peak memory."""
  began = float(os.environ['BEGAN'])
  from rlhf_jax.data import formats
  from rlhf_jax.data import pipelines
  from rlhf_jax.data import sources
  from rlhf_jax.data import tokenizers
  import rlhf_jax.main  # all that a run imports

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
        'of CPU': cpu,
        'milliseconds a batch': 1000 * (time.time() - first) / batches,
        'MiB at the peak': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
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
