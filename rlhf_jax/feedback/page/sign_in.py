"""Signing in by password or by personal link, signing out, and setting a password.

A link only shows a form, since programs that preview links in messages open them too. All wrong
sign-ins get the same answer in the same time.
"""

import logging
from typing import Annotated

import fastapi
import limits
import sqlalchemy as sa
from starlette import responses

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import accounts
from rlhf_jax.feedback import questions
from rlhf_jax.feedback import schema
from rlhf_jax.feedback import types
from rlhf_jax.feedback.page import auth
from rlhf_jax.feedback.page import passwords

router = fastapi.APIRouter()
_log = logging.getLogger('rlhf_jax.feedback')
WRONG = 'The name or the password is wrong.'
ENDED = 'You are not signed in any more. Your last answer was not saved.'
NO_LINK = 'This link does not work, or no longer. Ask the owner of the project for a new one.'
MAX_PASSWORD = 1000  # characters

Text = Annotated[str, fastapi.Form()]
User = Annotated[types.Annotator, fastapi.Depends(auth.current)]


@router.get('/sign-in')
def sign_in_form(request: fastapi.Request):
  """Shows the sign-in form; a browser that is signed in goes to the tasks."""
  if auth.session_of(request) is not None:
    return responses.RedirectResponse('/', 303)
  message = ENDED if 'ended' in request.query_params else ''
  return auth.render(request, 'sign_in.html', message=message, name='')


@router.post('/sign-in')
def sign_in_by_password(request: fastapi.Request, name: Text = '', password: Text = ''):
  """Signs in by name and password."""
  settings = request.app.state.settings
  _limit_address(request)
  if not (_is_text(name) and _is_text(password)):
    name = password = ''  # nobody has these
  key = 'name', accounts.link_hash(accounts.clean(name).casefold())
  auth.limit(request, settings.name_rate, *key)
  annotator = request.app.state.store.annotator(name=name)
  password_hash = annotator.password_hash if _may_sign_in(annotator) else None
  right, new_hash = passwords.verify(password[:MAX_PASSWORD], password_hash, settings)
  if not right:
    # Not the name: people type passwords into that field.
    _log.warning('a wrong sign-in from %s', _address(request))
    return auth.render(request, 'sign_in.html', status=403, message=WRONG, name=name[:200])
  if new_hash:
    with request.app.state.store.database.write() as rows:
      row = schema.Annotator.id == annotator.id
      rows.execute(sa.update(schema.Annotator).where(row).values(password_hash=new_hash))
  request.app.state.limiter.clear(limits.parse(settings.name_rate), *key)
  return auth.sign_in(request, annotator)


@router.get('/sign-in/{token}')
def confirm_link(request: fastapi.Request, token: str):
  """Shows whose personal link it is, and a button that signs in."""
  name = _of_link(request, token).name
  return auth.render(request, 'sign_in_link.html', name=name, action=request.url.path)


@router.post('/sign-in/{token}')
def sign_in_by_link(request: fastapi.Request, token: str):
  """Signs in by a personal link."""
  return auth.sign_in(request, _of_link(request, token))


@router.post('/sign-out')
def sign_out(request: fastapi.Request):
  """Ends the session."""
  return auth.sign_out(request)


@router.get('/account')
def account(request: fastapi.Request, user: User):
  """Shows the form to set a password."""
  saved = 'saved' in request.query_params
  return _account(request, user, 'The password is saved.' if saved else '', saved=saved)


@router.post('/account')
def set_password(request: fastapi.Request, user: User, password: Text = '', present: Text = ''):
  """Sets the password, and ends all sessions but this one, which gets a new token."""
  settings = request.app.state.settings
  if user.password_hash:
    auth.limit(request, settings.name_rate, 'present', str(user.id))
    present = present if _is_text(present) else ''
    if not passwords.verify(present[:MAX_PASSWORD], user.password_hash, settings)[0]:
      return _account(request, user, 'The present password is wrong.', status=403)
  if not passwords.LEAST_CHARACTERS <= len(password) <= MAX_PASSWORD or not _is_text(password):
    least = passwords.LEAST_CHARACTERS
    message = f'The password must have {least} to {MAX_PASSWORD} characters.'
    return _account(request, user, message, status=400)
  password_hash = passwords.hash_password(password, settings)
  changed = accounts.change(request.app.state.store.database, user, password_hash=password_hash)
  return auth.sign_in(request, changed, to='/account?saved')


def _account(request, user, message, *, status=200, saved=False):
  return auth.render(
    request,
    'account.html',
    status=status,
    message=message,
    saved=saved,
    has_password=user.password_hash is not None,
    least=passwords.LEAST_CHARACTERS,
  )


def _of_link(request, token):
  """Returns the annotator of a link's token, or raises status 404."""
  annotator = request.app.state.store.annotator(token=token)
  if not _may_sign_in(annotator):
    _limit_address(request)
    raise fastapi.HTTPException(404, NO_LINK)
  return annotator


def _may_sign_in(annotator):
  return annotator is not None and not annotator.disabled and not annotator.simulated


def _limit_address(request):
  auth.limit(request, request.app.state.settings.address_rate, 'address', _address(request))


def _address(request):
  return request.client.host if request.client else ''


def _is_text(value):
  """Returns whether a database can look for a value, and a hash be made of it."""
  try:
    questions.check_text(value, 'the field')
  except UserError:
    return False
  return True
