"""Reads the forms of an HTML page, as a browser without JavaScript does."""

import dataclasses
import html.parser


@dataclasses.dataclass
class Form:
  """A form of a page.

  Attributes:
    action: Where it is sent.
    method: 'get' or 'post'.
    fields: Names and values of its hidden inputs, and of what is filled in or checked.
    choices: Names and values of its buttons, radio buttons and options, in the order of the page.
  """

  action: str
  method: str
  fields: dict = dataclasses.field(default_factory=dict)
  choices: list = dataclasses.field(default_factory=list)


class _Reader(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.forms, self._open, self._by_id, self._select = [], None, {}, ''

  def handle_starttag(self, tag, attrs):
    values = dict(attrs)
    if tag == 'form':
      self._open = Form(values.get('action') or '', (values.get('method') or 'get').lower())
      self.forms.append(self._open)
      self._by_id[values.get('id')] = self._open
    form = self._by_id.get(values['form']) if 'form' in values else self._open
    if tag == 'select':
      self._select = values.get('name') or ''
    if form is None:
      return
    name, value = values.get('name'), values.get('value') or ''
    if tag == 'option' and self._select:
      form.choices.append((self._select, value))
    elif name and (tag == 'button' or values.get('type') in ('radio', 'checkbox', 'submit')):
      form.choices.append((name, value))
      if 'checked' in values:
        form.fields[name] = value
    elif name and tag in ('input', 'textarea'):
      form.fields[name] = value

  def handle_endtag(self, tag):
    if tag == 'form':
      self._open = None


def read(text):
  """Returns the forms of a page, in order.

  Args:
    text: HTML.
  """
  reader = _Reader()
  reader.feed(text)
  return reader.forms


def to(text, action):
  """Returns the only form of a page that is sent to `action`.

  Args:
    text: HTML.
    action: Path, such as '/judge'.

  Raises:
    LookupError: There is none, or several.
  """
  found = [form for form in read(text) if form.action == action]
  if len(found) != 1:
    raise LookupError(f'{len(found)} forms to {action}, the page has {read(text)}')
  return found[0]
