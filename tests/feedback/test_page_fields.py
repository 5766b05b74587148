"""Fields of forms with texts that no database can store."""

import labelling


def test_half_a_surrogate_pair_is_an_error_of_the_client(tmp_path):
  """A browser cannot send one, but a form may name an encoding in which it can be written."""
  site = labelling.Page(tmp_path)
  browser = site.browser()
  headers = {'content-type': 'multipart/form-data; boundary=x; charset=unicode_escape'}

  def send(path, fields):
    parts = [
      f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
      for name, value in fields.items()
    ]
    content = ''.join([*parts, '--x--\r\n']).encode()
    return browser.request('POST', path, content=content, headers=headers).status_code

  browser.get('/sign-in')
  form = {'csrf': browser.fields['csrf'], 'name': 'ann', 'password': 'x'}
  for name in ('name', 'password'):
    assert send('/sign-in', form | {name: '\\ud800'}) == 403
  browser = site.browser('ann')
  site.add()
  browser.get('/account')
  assert send('/account', browser.fields | {'password': 10 * '\\ud800'}) == 400
  browser.get('/')
  form = browser.fields | {'answer': 'a1'}
  for name in ('token', 'reason', 'answer'):
    assert send('/judge', form | {name: '\\ud800'}) == 400
  assert not site.judgements()
  site.store.close()
