"""ASGI middleware: security headers on every response, and a time limit for request bodies."""

import asyncio

import fastapi
from starlette import datastructures

# What a page may load and do. Scripts and styles are files of the package, never inline.
CONTENT_SECURITY_POLICY = '; '.join(
  [
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src 'self' data:",
    "form-action 'self'",
    "frame-ancestors 'none'",
    "base-uri 'none'",
  ]
)
HEADERS = {
  'content-security-policy': CONTENT_SECURITY_POLICY,
  'x-content-type-options': 'nosniff',
  'x-frame-options': 'DENY',
  'referrer-policy': 'no-referrer',
  'permissions-policy': 'camera=(), microphone=(), geolocation=(), payment=(), usb=()',
  'cross-origin-opener-policy': 'same-origin',
  'cross-origin-resource-policy': 'same-origin',
}
STATIC = '/static/'


class SecurityHeaders:
  """Adds the headers above, and forbids to keep pages in caches."""

  def __init__(self, app):
    self.app = app

  async def __call__(self, scope, receive, send):
    if scope['type'] != 'http':
      await self.app(scope, receive, send)
      return

    async def send_with_headers(message):
      if message['type'] == 'http.response.start':
        add_headers(datastructures.MutableHeaders(scope=message), scope, message['status'])
      await send(message)

    await self.app(scope, receive, send_with_headers)


def add_headers(headers, scope, status):
  """Adds the security headers to those of a response.

  Args:
    headers: starlette MutableHeaders of the response.
    scope: ASGI scope of the request.
    status: Status of the response.
  """
  for name, value in HEADERS.items():
    headers[name] = value
  if scope['path'].startswith(STATIC) and status in (200, 304):
    # The address of a file in a page has the hash of the file.
    versioned = scope['query_string'].startswith(b'v=')
    headers['cache-control'] = 'public, max-age=31536000, immutable' if versioned else 'no-cache'
  else:
    headers['cache-control'] = 'no-store'


class BodyTime:
  """Refuses a request whose body does not arrive in time, with status 408.

  The connection of a request that is answered before its body was read is closed, or the client
  could send the rest for ever.
  """

  def __init__(self, app, seconds):
    """Creates the middleware.

    Args:
      app: ASGI application.
      seconds: Time from the end of the request's head to that of its body.
    """
    self.app = app
    self.seconds = seconds

  async def __call__(self, scope, receive, send):
    if scope['type'] != 'http' or not _has_body(scope):
      await self.app(scope, receive, send)
      return
    deadline = asyncio.get_running_loop().time() + self.seconds
    complete = False

    async def receive_in_time():
      nonlocal complete
      if complete:
        return await receive()
      try:
        async with asyncio.timeout_at(deadline):
          message = await receive()
      except TimeoutError:
        raise fastapi.HTTPException(408) from None
      complete = message['type'] != 'http.request' or not message.get('more_body', False)
      return message

    async def send_and_close(message):
      if message['type'] == 'http.response.start' and not complete:
        datastructures.MutableHeaders(scope=message)['connection'] = 'close'
      await send(message)

    await self.app(scope, receive_in_time, send_and_close)


def _has_body(scope):
  headers = datastructures.Headers(scope=scope)
  return 'transfer-encoding' in headers or headers.get('content-length', '0') != '0'
