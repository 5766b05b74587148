"""The owner's pages: progress, annotators, agreement, Elo, disagreement, export.

Unlike annotators, owners see the names of policies. All figures are about judgements that count.
"""

import functools
import json
import math
from typing import Annotated
from urllib import parse

import fastapi
import markupsafe
from starlette import responses

from rlhf_jax.errors import need
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import accounts
from rlhf_jax.feedback import agreement
from rlhf_jax.feedback import bradley_terry
from rlhf_jax.feedback import leaderboard
from rlhf_jax.feedback import overview
from rlhf_jax.feedback import pictures
from rlhf_jax.feedback import questions
from rlhf_jax.feedback import reading
from rlhf_jax.feedback import schema
from rlhf_jax.feedback import types
from rlhf_jax.feedback import votes
from rlhf_jax.feedback.page import auth
from rlhf_jax.feedback.page import forms
from rlhf_jax.feedback.page import passwords

router = fastapi.APIRouter(prefix='/owner')
PAGE_SIZE = 20  # tasks on a page of disagreement
COLUMNS = 12  # annotators in a table of Cohen's kappas
PEOPLE = {'': None, 'people': False, 'simulated': True}  # whose judgements are exported
FORMS = {
  'pairs': 'prompt, chosen and rejected answer, with the margin',
  'rankings': 'prompt, all answers, and their order, the best one, or ratings',
  'ratings': 'prompt, answer, and its rating from 1 to 7',
}

Owner = Annotated[types.Annotator, fastapi.Depends(auth.owner)]
Number = Annotated[int, fastapi.Path(ge=1, le=2**31 - 1)]


@functools.lru_cache(maxsize=4)
def _read(store, project, last):
  """Returns the judgements of a project, whose newest one is `last`."""
  del last
  return store.judgements(project)


@functools.lru_cache(maxsize=16)
def _boards(store, project, last, round, model):
  """Returns the leaderboard, sentences about it, and {round: leaderboard} for the picture."""
  judgements = [item for item in _read(store, project, last) if round in (None, item.task.round)]
  battles = reading.battles(judgements)
  board = leaderboard.rate(battles, model)
  simulated = {item.annotator.name for item in judgements if item.annotator.simulated}
  notes = leaderboard.notes(board, battles, simulated, model)
  boards = leaderboard.over_rounds(battles, model)
  if boards:
    notes.append(f'In the picture, {leaderboard.first_policy(battles)} is at 1000.')
  return board, notes, boards


def _judgements(request, round=None):
  """Returns the judgements that count, of one round or of all."""
  store, project = request.app.state.store, request.app.state.project
  found = _read(store, project, store.last(project))
  return found if round is None else [item for item in found if item.task.round == round]


def _round(text):
  """Returns the number of a round in a query, or None for all rounds."""
  try:
    return int(text) if text else None
  except ValueError:
    raise UserError(f'there is no round {text[:20]!r}') from None


def _render(request, name, **context):
  """Renders a page of the owner with what all of them use."""
  state = request.app.state
  parts = overview.progress(state.store.database, state.project)
  more = {'parts': parts, 'rounds': sorted({part.round for part in parts})}
  more |= {'percent': percent, 'decimal': decimal, 'seconds': seconds, 'share': share}
  return auth.render(request, name, **(more | context))


def percent(value):
  """Returns a fraction as '67 %', a dash for NaN."""
  return '–' if math.isnan(value) else f'{100 * value:.0f}\u00a0%'


def decimal(value):
  """Returns a number with two digits after the point, a dash for NaN."""
  return '–' if math.isnan(value) else f'{round(value, 2) + 0.0:.2f}'.replace('-', '\u2212')


def seconds(value):
  """Returns a time in seconds, a dash for NaN."""
  return '–' if math.isnan(value) else f'{value:.1f}\u00a0s'


def share(count, total):
  """Returns '3 of 4', a dash if there are none."""
  return f'{count} of {total}' if total else '–'


@router.get('')
def home(request: fastapi.Request, user: Owner):
  """Shows the progress of the project."""
  del user
  return _home(request)


def _home(request, saved=False):
  store, project = request.app.state.store, request.app.state.project
  found = _judgements(request)
  simulated = sum(item.annotator.simulated for item in found)
  return _render(
    request,
    'owner_home.html',
    progress=store.progress(project),
    judgements=len(found),
    simulated=simulated,
    flagged=sum(bool(item.flags) for item in found),
    people=len({item.annotator.id for item in found if not item.annotator.simulated}),
    instructions=store.project(project.name).instructions,
    saved=saved,
  )


@router.post('/instructions')
def instructions(request: fastapi.Request, user: Owner, fields: forms.Fields):
  """Stores the instructions of the annotators."""
  del user
  text = forms.text(fields, 'instructions').replace('\r\n', '\n').strip()
  with request.app.state.store.database.write() as rows:
    row = rows.get(schema.Project, request.app.state.project.id)
    row.instructions = questions.check_text(text, 'the text')
  return _home(request, saved=True)


@router.get('/instructions')
def after_instructions(user: Owner):
  """Goes to the page that has the form, as when its address is loaded again."""
  del user
  return responses.RedirectResponse('/owner', 303)


@router.get('/annotators/{number}/{action}')
def after_change(user: Owner, number: Number, action: str):
  """Goes to the page that has the form, as when its address is loaded again."""
  del user, number, action
  return responses.RedirectResponse('/owner/annotators', 303)


@router.get('/annotators')
def annotators(request: fastapi.Request, user: Owner):
  """Shows how each annotator works."""
  return _annotators(request, user)


def _annotators(request, user, *, message='', link='', failed=False):
  return _render(
    request,
    'owner_annotators.html',
    status=400 if failed else 200,
    failed=failed,
    people=overview.people(request.app.state.store.annotators(), _judgements(request)),
    own=user.id,
    message=message,
    link=link,
  )


@router.post('/annotators')
def add_annotator(request: fastapi.Request, user: Owner, fields: forms.Fields):
  """Adds an annotator, and shows the personal link, this one time."""
  name = forms.text(fields, 'name').strip()
  try:
    added, token = request.app.state.store.add_annotator(name, role=forms.text(fields, 'role'))
  except UserError as error:
    return _annotators(request, user, message=f'Not added: {error}', failed=True)
  message = f'Added {added.name}. This is their personal link:'
  return _annotators(request, user, message=message, link=_link(request, token))


@router.post('/annotators/{number}/{action}')
def change_annotator(request: fastapi.Request, user: Owner, number: Number, action: str):
  """Disables or enables an annotator, or makes a new personal link, which ends the old one, the
  password and all sessions."""
  store = request.app.state.store
  person = store.annotator(id=number)
  if person is None or action not in ('disable', 'enable', 'link'):
    raise fastapi.HTTPException(404)
  need(person.id != user.id, 'You cannot change yourself here: another owner can.')
  if action == 'link':
    need(not person.simulated, f'{person.name} is simulated and does not sign in.')
    token = passwords.new_token()
    accounts.change(store.database, person, token=token)
    message = (
      f'The personal link of {person.name} is now this one. The old one, the password and all '
      'sessions have ended:'
    )
    return _annotators(request, user, message=message, link=_link(request, token))
  accounts.change(store.database, person, disabled=action == 'disable')
  message = f'{person.name} is {action}d.'
  return _annotators(request, user, message=message)


def _link(request, token):
  return f'{request.base_url}sign-in/{parse.quote(token)}'


@router.get('/agreement')
def show_agreement(request: fastapi.Request, user: Owner, round: str = ''):
  """Shows how much annotators agree."""
  del user
  found = _judgements(request, _round(round))
  tables = []
  for kind, label in votes.KINDS.items():
    table = votes.of(found, kind)
    if len(table.annotators) >= 2:
      rest = agreement.against_rest(table.values)
      kappas = agreement.pairwise(table.values)[:, :COLUMNS]
      tables.append((label, list(zip(table.annotators, rest, kappas, strict=True))))
  return _render(
    request,
    'owner_agreement.html',
    rows=votes.rows(found),
    tables=tables,
    columns=COLUMNS,
    round=_round(round),
  )


@router.get('/elo')
def elo(
  request: fastapi.Request, user: Owner, round: str = '', ties: str = 'davidson', style: str = ''
):
  """Shows the ratings of the policies."""
  del user
  store, project = request.app.state.store, request.app.state.project
  board, notes, picture, message = None, [], '', ''
  model = bradley_terry.Model(ties, bool(style))
  try:
    board, notes, boards = _boards(store, project, store.last(project), _round(round), model)
    picture = pictures.inline(boards) if boards else ''
  except UserError as error:  # no chain of games connects the policies yet
    message = str(error)
  return _render(
    request,
    'owner_elo.html',
    titles=leaderboard.TITLES,
    cells=[leaderboard.cells(standing) for standing in board.standings] if board else [],
    notes=notes if board and board.standings else [],
    picture=markupsafe.Markup(picture),
    message=message,
    model=model,
    round=_round(round),
  )


@router.get('/disagreement')
def disagreement(
  request: fastapi.Request, user: Owner, flag: str = '', round: str = '', page: int = 1
):
  """Shows the tasks about which annotators disagree most, or those with a flag."""
  del user
  found = _judgements(request, _round(round))
  disputes = overview.disputes(found, flag=flag)
  pages = max(1, math.ceil(len(disputes) / PAGE_SIZE))
  page = min(max(page, 1), pages)
  turn = lambda number: '?' + parse.urlencode({'flag': flag, 'round': round, 'page': number})
  return _render(
    request,
    'owner_disagreement.html',
    disputes=disputes[PAGE_SIZE * (page - 1) : PAGE_SIZE * page],
    total=len(disputes),
    first=PAGE_SIZE * (page - 1) + 1,
    before=turn(page - 1) if page > 1 else '',
    after=turn(page + 1) if page < pages else '',
    flag=flag,
    flags=overview.flags(found),
    names=forms.FLAGS,
    round=_round(round),
    describe=overview.describe,
    letter=overview.name,
  )


@router.get('/export')
def export(request: fastapi.Request, user: Owner):
  """Shows what can be downloaded."""
  del user
  found = _judgements(request)
  counts = {form: len(reading.records(found, form=form)) for form in FORMS}
  return _render(request, 'owner_export.html', forms=FORMS, counts=counts)


@router.get('/export/{form}.jsonl')
def download(
  request: fastapi.Request, user: Owner, form: str, round: str = '', annotators: str = ''
):
  """Returns the judgements in a data format of the library, one record a line."""
  del user
  if form not in FORMS or annotators not in PEOPLE:
    raise fastapi.HTTPException(404)
  records = reading.records(
    _judgements(request, _round(round)), form=form, simulated=PEOPLE[annotators]
  )
  return responses.StreamingResponse(
    (json.dumps(record, ensure_ascii=False) + '\n' for record, _ in records),
    media_type='application/jsonl; charset=utf-8',
    headers={'content-disposition': f'attachment; filename="{form}.jsonl"'},
  )
