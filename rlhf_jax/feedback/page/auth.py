"""Who is signed in, and who may do what: sessions, CSRF tokens, rates, and pages for both.

Routes of all parts of the page use these dependencies. `csrf` runs before every route, as a
dependency of the application, so that no POST can forget it.
"""

import dataclasses
import hmac
import time
from urllib import parse

import fastapi
import limits
import sqlalchemy as sa
from starlette import concurrency
from starlette import responses

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import accounts
from rlhf_jax.feedback import schema
from rlhf_jax.feedback import types
from rlhf_jax.feedback.page import passwords
from rlhf_jax.feedback.page import rendering

COOKIE, SECURE_COOKIE = 'rlhf_session', '__Host-rlhf_session'
# Cookie with the token of the sign-in form, before there is a session.
FORM_COOKIE, SECURE_FORM_COOKIE = 'rlhf_form', '__Host-rlhf_form'
SIGN_IN = '/sign-in'
SAFE_METHODS = ('GET', 'HEAD', 'OPTIONS')
RENEW_SECONDS = 60.0  # a session in use is extended at most so often
OUT_OF_DATE = 'This page is out of date, so nothing was saved. Load it again and retry.'


class NotSignedIn(Exception):
  """The request has no session that is valid; the application redirects it to the sign-in page."""


def current(request: fastapi.Request) -> types.Annotator:
  """Returns the annotator who is signed in.

  Raises:
    NotSignedIn: There is none.
  """
  session = session_of(request)
  if session is None:
    raise NotSignedIn
  return session.annotator


def owner(request: fastapi.Request) -> types.Annotator:
  """Returns the owner who is signed in.

  Raises:
    NotSignedIn: Nobody is signed in.
    fastapi.HTTPException: An annotator is; status 403.
  """
  annotator = current(request)
  if annotator.role != 'owner':
    raise fastapi.HTTPException(403, 'Only owners of the project may see this page.')
  return annotator


async def csrf(request: fastapi.Request) -> None:
  """Checks a request that changes something: its origin, its CSRF token, and its rate.

  The token is the field `csrf` of the form, or the header X-CSRF-Token, which htmx sends.

  Raises:
    NotSignedIn: There is no session, and the request is not a sign-in.
    fastapi.HTTPException: The request comes from another site or has a wrong token (403), or the
      session sends too many (429).
  """
  if request.method in SAFE_METHODS:
    return
  check_origin(request)
  session = await concurrency.run_in_threadpool(session_of, request)
  signs_in = request.url.path.startswith(SIGN_IN)
  if session is None and not signs_in:
    raise NotSignedIn
  if session is not None:
    limit(request, request.app.state.settings.post_rate, 'post', session.token_hash)
  expected = form_token(request) if signs_in else session.csrf
  given = request.headers.get('x-csrf-token') or (await request.form()).get('csrf')
  if not expected or not isinstance(given, str) or not equal(given, expected):
    raise fastapi.HTTPException(403, OUT_OF_DATE)


def equal(given, expected):
  """Returns whether two texts are equal, in a time that does not depend on where they differ."""
  return hmac.compare_digest(given.encode('utf-8', 'replace'), expected.encode())


def check_origin(request):
  """Refuses requests that a page of another site makes.

  A browser sends the header Origin with every POST; other clients need not.

  Raises:
    fastapi.HTTPException: The origin is another one; status 403.
  """
  sent = request.headers.get('origin') or request.headers.get('referer')
  if sent is None:
    return
  try:
    origin = parse.urlsplit(sent)
    same = _address(origin.scheme, origin.netloc) == _address(
      origin.scheme, request.headers.get('host', '')
    )
  except ValueError:
    same = False
  # A proxy may add TLS, so that the scheme differs, but never remove it.
  if not same or origin.scheme not in (request.url.scheme, 'https'):
    raise fastapi.HTTPException(403, 'The request comes from another site, so nothing was saved.')


def _address(scheme, netloc):
  """Returns host and port, with the port of the scheme if there is none."""
  parts = parse.urlsplit(f'//{netloc}')
  return (parts.hostname or '').lower(), parts.port or {'https': 443}.get(scheme, 80)


def limit(request, rate, *key):
  """Counts an event, and refuses it if there are too many.

  Args:
    request: The request.
    rate: Rate in the notation of `limits`, such as '10 per minute'.
    *key: Texts that say which events count together.

  Raises:
    fastapi.HTTPException: There are more than the rate allows; status 429.
  """
  item = limits.parse(rate)
  if request.app.state.limiter.hit(item, *key):
    return
  reset = request.app.state.limiter.get_window_stats(item, *key).reset_time
  wait = max(1, round(reset - time.time()))
  raise fastapi.HTTPException(
    429, f'Too many requests. Try again in {wait} seconds.', headers={'retry-after': str(wait)}
  )


def is_secure(request):
  """Returns whether the browser reached the page over TLS."""
  return request.url.scheme == 'https'


def session_of(request):
  """Returns the session of a request, or None; a session in use is extended.

  It is looked up once per request.
  """
  if not hasattr(request.state, 'session'):
    token = session_token(request)
    database = request.app.state.store.database
    found = accounts.find_session(database, token, time.time()) if token else None
    request.state.session = _extended(request, found) if found else None
  return request.state.session


def session_token(request):
  """Returns the token in the session cookie, or None."""
  return request.cookies.get(SECURE_COOKIE if is_secure(request) else COOKIE)


def _extended(request, session):
  settings, now = request.app.state.settings, time.time()
  end = session.created + settings.session_seconds
  if now >= end:
    return None
  expires = min(now + settings.idle_seconds, end)
  if expires - session.expires > min(RENEW_SECONDS, settings.idle_seconds / 2):
    try:
      with request.app.state.store.database.write() as rows:
        found = schema.Session.token_hash == session.token_hash
        rows.execute(sa.update(schema.Session).where(found).values(expires=expires))
    except UserError:  # a full disk must not keep pages from being read
      return session
  return dataclasses.replace(session, expires=expires)


def sign_in(request, annotator, to='/'):
  """Starts a session with a new token, whatever cookie came, and returns a redirect.

  The session that the browser had before ends.

  Args:
    request: The request.
    annotator: Who signs in.
    to: Path to redirect to.
  """
  database, settings = request.app.state.store.database, request.app.state.settings
  before = session_token(request)
  if before:
    accounts.end_session(database, before)
  _, token = accounts.add_session(database, annotator, settings.idle_seconds, time.time())
  response = responses.RedirectResponse(to, 303)
  set_cookie(request, response, token)
  return response


def sign_out(request):
  """Ends the session, and returns the redirect to the sign-in page."""
  token = session_token(request)
  if token:
    accounts.end_session(request.app.state.store.database, token)
  response = responses.RedirectResponse(SIGN_IN, 303)
  set_cookie(request, response, None)
  return response


def set_cookie(request, response, token):
  """Sets the session cookie, or deletes it if the token is None.

  Over TLS the prefix __Host- keeps other hosts of the domain from setting it.
  """
  secure = is_secure(request)
  response.set_cookie(
    SECURE_COOKIE if secure else COOKIE,
    token or '',
    max_age=None if token else 0,
    secure=secure,
    httponly=True,
    samesite='lax',
  )


def form_token(request):
  """Returns the CSRF token of the sign-in form, which is in a cookie of its own, or None."""
  return request.cookies.get(SECURE_FORM_COOKIE if is_secure(request) else FORM_COOKIE)


def render(request, name, /, *, status=200, **context):
  """Renders a page, or only its main part if htmx asks.

  Args:
    request: The request.
    name: Name of the template.
    status: Status of the response.
    **context: Variables of the template.

  Returns:
    The response.
  """
  session = session_of(request)
  signs_in = session is None or request.url.path.startswith(SIGN_IN)
  token = form_token(request) if signs_in else session.csrf
  new_token = None if token else passwords.new_token()
  html = rendering.render(
    name,
    {
      # The pages to sign in have no bar of the annotator, whose forms need the session's token.
      'annotator': None if signs_in else session.annotator,
      'csrf_field': rendering.csrf_field(token or new_token),
      'htmx_headers': rendering.htmx_headers(token or new_token),
      'partial': is_htmx(request),
      'path': request.url.path,
      'policies': request.app.state.policies,
      'project': request.app.state.project,
    }
    | context,
  )
  response = responses.HTMLResponse(html, status)
  if new_token:
    secure = is_secure(request)
    response.set_cookie(
      SECURE_FORM_COOKIE if secure else FORM_COOKIE,
      new_token,
      secure=secure,
      httponly=True,
      samesite='strict',
    )
  return response


def is_htmx(request):
  """Returns whether htmx sent the request, so that a part of a page is wanted."""
  return request.headers.get('hx-request') == 'true'
