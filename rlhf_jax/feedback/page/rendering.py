"""The templates of the page. They escape every value, and an unknown variable is an error."""

import functools
import hashlib
import json
import pathlib

import jinja2
import markupsafe

FOLDER = pathlib.Path(__file__).parent
# htmx evaluates nothing, adds no style sheet, keeps no pages, and asks this server only. Errors are
# shown above the task, whose form keeps what was entered.
HTMX = {
  'allowEval': False,
  'attributesToSettle': [],  # it would set inline styles
  'defaultSettleDelay': 0,  # keys pressed before the focus moves would be lost
  'allowScriptTags': False,
  'historyEnabled': False,
  'historyCacheSize': 0,
  'includeIndicatorStyles': False,
  'selfRequestsOnly': True,
  'timeout': 60000,
  'responseHandling': [
    {'code': '204', 'swap': False},
    {'code': '[23]..', 'swap': True},
    {
      'code': '[45]..',
      'swap': True,
      'error': True,
      'target': '#notice',
      'swapOverride': 'innerHTML',
    },
  ],
}


@functools.cache
def environment():
  """Returns the environment of Jinja."""
  made = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FOLDER / 'templates'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
  )
  made.globals |= {'static': static, 'htmx_config': json.dumps(HTMX)}
  return made


def render(name, context):
  """Returns the HTML of a template.

  Args:
    name: Name of its file.
    context: {variable: value}.
  """
  return environment().get_template(name).render(context)


@functools.cache
def static(name):
  """Returns the address of a static file, which changes with its content."""
  content = (FOLDER / 'static' / name).read_bytes()
  return f'/static/{name}?v={hashlib.sha256(content).hexdigest()[:12]}'


def csrf_field(token):
  """Returns the hidden field of a form with the CSRF token."""
  return markupsafe.Markup('<input type="hidden" name="csrf" value="{}">').format(token)


def htmx_headers(token):
  """Returns the JSON of the headers that htmx adds to its requests."""
  return json.dumps({'X-CSRF-Token': token})
