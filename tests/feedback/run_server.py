"""Serves a project of a store in a process of its own, and prints the port when it listens.

python run_server.py OPTIONS, a JSON dict: url, project, port, settings of the page, and
policies, a list of folders or null.
"""

import json
import socket
import sys

import uvicorn

from rlhf_jax.feedback import store as store_lib
from rlhf_jax.feedback.page import app
from rlhf_jax.feedback.page import serve
from rlhf_jax.feedback.page import settings as settings_lib


def main():
  """Serves until it is killed."""
  options = json.loads(sys.argv[1])
  ready, sys.stdout = sys.stdout, sys.stderr  # all logs go to one place
  store = store_lib.Store.open(options['url'])
  policies = None
  if options['policies']:
    from rlhf_jax.feedback import live

    policies = live.Policies(options['policies'], max_concurrent=2, seconds=240)
  application = app.create(
    store,
    store.project(options['project']),
    policies=policies,
    settings=settings_lib.Settings(**options['settings']),
  )
  listener = socket.create_server(('127.0.0.1', options['port']), backlog=512)
  port = listener.getsockname()[1]
  config = serve.config(application, host='127.0.0.1', port=port, log_level='info')
  print(f'listens on {port}', file=ready, flush=True)
  try:
    uvicorn.Server(config).run(sockets=[listener])
  finally:
    if policies:
      policies.close()


if __name__ == '__main__':
  main()
