"""Serves the page by uvicorn: a time limit for slow request heads, and a log without secrets."""

import logging
import os
import re

import h11
import uvicorn
from uvicorn.protocols.http import h11_impl

HEAD_SECONDS = 10.0  # from the connection, or from the first byte of a later request
HEAD_BYTES = 16 * 1024
MAX_CONNECTIONS = 512
LINK = re.compile(r'(sign-in/)[^\s"]+', re.IGNORECASE)


class HideLinks(logging.Filter):
  """Removes the tokens of personal links, and the queries, from the paths in the access log."""

  def filter(self, record):
    """Changes the record, and keeps it."""
    if isinstance(record.args, tuple):
      record.args = tuple(map(without_secrets, record.args))
    record.msg = without_secrets(record.msg)
    return True


def without_secrets(value):
  """Returns a text of the access log without tokens and queries; other values are unchanged."""
  if not isinstance(value, str):
    return value
  value = re.sub(r'\?\S*', '?…', value) if value.startswith('/') else value
  return LINK.sub(r'\1…', value)


_HIDE_LINKS = HideLinks()


def protect_logs():
  """Makes the loggers of uvicorn hide secrets; calling it again changes nothing."""
  for name in ('uvicorn.access', 'uvicorn.error'):
    logging.getLogger(name).addFilter(_HIDE_LINKS)


class Protocol(h11_impl.H11Protocol):
  """HTTP of uvicorn, which closes connections on which a request's head takes too long.

  uvicorn limits the time between requests only.
  """

  head_seconds = HEAD_SECONDS
  _head_timer = None

  def connection_made(self, transport):
    """Starts the timer of the first head."""
    super().connection_made(transport)
    self._start_timer()

  def data_received(self, data):
    """Stops the timer when a head is complete, and starts it when another one begins."""
    super().data_received(data)
    if self.conn.their_state is not h11.IDLE:
      self._stop_timer()
    elif self._head_timer is None and self.conn.trailing_data[0]:
      self._start_timer()

  def connection_lost(self, exc):
    """Stops the timer."""
    self._stop_timer()
    super().connection_lost(exc)

  def _start_timer(self):
    self._head_timer = self.loop.call_later(self.head_seconds, self.transport.close)

  def _stop_timer(self):
    if self._head_timer is not None:
      self._head_timer.cancel()
      self._head_timer = None


def config(app, *, host, port, log_level='warning'):
  """Returns the configuration of a server of the page.

  Behind a reverse proxy, which must add TLS, the environment variable FORWARDED_ALLOW_IPS names its
  address. Only then are the X-Forwarded headers believed.

  Args:
    app: Result of app.create.
    host: Address to listen on.
    port: Port to listen on; 0 for a free one.
    log_level: Level of uvicorn's log; 'info' logs every request.
  """
  protect_logs()
  return uvicorn.Config(
    app,
    host=host,
    port=port,
    http=Protocol,
    ws='none',
    log_level=log_level,
    proxy_headers='FORWARDED_ALLOW_IPS' in os.environ,
    server_header=False,
    limit_concurrency=MAX_CONNECTIONS,
    timeout_graceful_shutdown=5,
    h11_max_incomplete_event_size=HEAD_BYTES,
  )
