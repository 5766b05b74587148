"""The application of the labelling page."""

import logging

import fastapi
from fastapi import exceptions as fastapi_exceptions
from limits import storage
from limits import strategies
import sqlalchemy as sa
from starlette import exceptions
from starlette import responses
from starlette import staticfiles
from starlette.middleware import body_limit
from starlette.middleware import trustedhost

from rlhf_jax.errors import UserError
from rlhf_jax.feedback.page import annotate
from rlhf_jax.feedback.page import auth
from rlhf_jax.feedback.page import chat
from rlhf_jax.feedback.page import middleware
from rlhf_jax.feedback.page import owner
from rlhf_jax.feedback.page import passwords
from rlhf_jax.feedback.page import rendering
from rlhf_jax.feedback.page import serve
from rlhf_jax.feedback.page import settings as settings_lib
from rlhf_jax.feedback.page import sign_in

NOT_WRITTEN = (
  'The server could not write to its database. Try again in a moment; if it happens again, tell '
  'the owner of the project.'
)
BROKEN = 'Something went wrong on the server. Tell the owner of the project.'
HEADINGS = {
  400: 'This does not work',
  403: 'Not allowed',
  404: 'Not found',
  405: 'This does not work',
  408: 'Too slow',
  413: 'Too large',
  429: 'Too many requests',
}
SAVING = '/judge', '/skip', '/chat'  # paths to which answers are sent
_log = logging.getLogger('rlhf_jax.feedback')


def create(store, project, *, policies=None, settings=None):
  """Creates the application.

  Args:
    store: Store, which the caller closes.
    project: types.Project of which the page shows tasks.
    policies: live.Policies for the chat, or None.
    settings: Settings, or None for the defaults.

  Returns:
    The FastAPI application. Its state holds the arguments.
  """
  app = fastapi.FastAPI(
    title='rlhf label',
    docs_url=None,
    redoc_url=None,
    openapi_url=None,
    redirect_slashes=False,
    dependencies=[fastapi.Depends(auth.csrf)],
  )
  settings = settings or settings_lib.Settings()
  app.state.store, app.state.project = store, project
  app.state.policies, app.state.settings = policies, settings
  app.state.writing = {}  # {id of an annotator: {id of a dialogue: what chat._lines reads}}
  app.state.limiter = strategies.MovingWindowRateLimiter(storage.MemoryStorage())
  for module in (sign_in, annotate, owner, chat):
    app.include_router(module.router)
  app.mount('/static', staticfiles.StaticFiles(directory=rendering.FOLDER / 'static'))
  # The last one is the outermost.
  app.add_middleware(
    trustedhost.TrustedHostMiddleware,
    allowed_hosts=list(settings.allowed_hosts),
    www_redirect=False,
  )
  app.add_middleware(body_limit.RequestBodyLimitMiddleware, max_body_size=settings.body_bytes)
  app.add_middleware(middleware.BodyTime, seconds=settings.body_seconds)
  app.add_middleware(middleware.SecurityHeaders)
  for error, handler in (
    (auth.NotSignedIn, _not_signed_in),
    (exceptions.HTTPException, _http_error),
    (fastapi_exceptions.RequestValidationError, _wrong_form),
    (UserError, _user_error),
    (sa.exc.SQLAlchemyError, _database_error),
    (Exception, _any_error),
  ):
    app.add_exception_handler(error, handler)
  serve.protect_logs()
  passwords.verify('', None, settings)  # the first unknown name must not take longer
  return app


def _not_signed_in(request, error):
  """Redirects to the sign-in page; htmx does so for the whole page."""
  del error
  saves = request.url.path.startswith(SAVING) and request.method not in auth.SAFE_METHODS
  to = '/sign-in?ended' if saves else '/sign-in'
  if auth.is_htmx(request):
    return responses.Response(status_code=401, headers={'hx-redirect': to})
  return responses.RedirectResponse(to, 303)


def _http_error(request, error):
  heading = HEADINGS.get(error.status_code, 'Error')
  # Texts of our own say more than the name of the status.
  own = error.detail if error.detail.endswith('.') else ''
  message = own or 'Go back and try again.'
  return _page(request, error.status_code, heading, message, error.headers)


def _wrong_form(request, error):
  del error
  return _page(request, 422, HEADINGS[400], 'The form is incomplete. Go back and try again.')


def _user_error(request, error):
  if isinstance(error.__cause__, sa.exc.DBAPIError):
    return _database_error(request, error)
  return _page(request, 400, HEADINGS[400], str(error))


def _database_error(request, error):
  cause = error.__cause__ if isinstance(error, UserError) else error
  # The first line alone: the others may hold what was to be written.
  _log.error('database: %s', str(getattr(cause, 'orig', cause)).partition('\n')[0])
  saves = request.method not in auth.SAFE_METHODS
  return _page(request, 503, 'Not saved' if saves else 'Not available', NOT_WRITTEN)


def _any_error(request, error):
  """Shows a page without a trace, which the server logs; it is outside of the middleware."""
  del error
  response = _page(request, 500, 'Error', BROKEN)
  middleware.add_headers(response.headers, request.scope, 500)
  return response


def _page(request, status, heading, message, headers=None):
  """Returns an error page, or for htmx the notice above the task."""
  try:
    auth.session_of(request)
  except (sa.exc.SQLAlchemyError, UserError):  # it is the database that fails
    request.state.session = None
  name = 'error_notice.html' if auth.is_htmx(request) else 'error.html'
  response = auth.render(request, name, status=status, heading=heading, message=message)
  response.headers.update(headers or {})
  return response
