"""Annotators that answer tasks until none is left: python labeller.py URL PROJECT NAME NAME ...

Each name is a thread. It waits for a line on stdin before it begins, sends every answer twice at
once, and at the end prints the ids of the judgements of all threads as JSON.
"""

from concurrent import futures
import json
import sys

from rlhf_jax.feedback import store as store_lib


def label(store, project, name, twice):
  """Answers tasks until none is left; returns the ids of the judgements."""
  annotator, _ = store.add_annotator(name)
  ids = []
  while (assignment := store.next_task(project, annotator)) is not None:
    answer = {'chosen': assignment.shown[0].id}
    judge = lambda: store.judge(assignment, annotator, answer, token=assignment.token)
    found = {future.result().id for future in [twice.submit(judge), twice.submit(judge)]}
    assert len(found) == 1, found
    ids += found
  return ids


def main(url, project, *names):
  """Runs all annotators."""
  with store_lib.Store.open(url) as store:
    print('ready', flush=True)
    sys.stdin.readline()
    found = store.project(project)
    with futures.ThreadPoolExecutor(len(names)) as pool, futures.ThreadPoolExecutor(4) as twice:
      threads = [pool.submit(label, store, found, name, twice) for name in names]
      print(json.dumps([i for thread in threads for i in thread.result()]), flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
