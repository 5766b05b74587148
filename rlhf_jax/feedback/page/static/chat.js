// Reads the two answers of a chat while they are written. Everything else is plain forms.
(() => {
  'use strict';

  const LOST = 'The connection was lost. Nothing that was stored is lost.';
  const announce = text => { document.querySelector('#status').textContent = text; };

  const fail = (area, text) => {
    document.querySelector('#task-title').textContent = 'There are no answers yet';
    area.querySelectorAll('.answer').forEach(answer => answer.setAttribute('aria-busy', 'false'));
    document.querySelector('.change').open = true;
    const line = document.createElement('p');
    line.className = 'message';
    line.textContent = text;
    const again = document.createElement('button');
    again.type = 'button';
    again.textContent = 'Try again';
    again.addEventListener('click', () => show(area));
    const box = document.createElement('div');
    box.className = 'failed';
    box.setAttribute('role', 'alert');
    box.append(line, again);
    area.after(box);
  };

  // Loads the current state of the dialogue from the server.
  const show = area => window.htmx.ajax(
    'GET', area.dataset.page, { target: '#main', swap: 'innerHTML' });

  const write = (area, line) => {
    const answers = area.querySelectorAll('.answer');
    if (line.text) {
      answers[line.side].querySelector('.text').append(line.text);
    } else if (line.done) {
      // Only now: a screen reader must not read every piece.
      answers[line.side].setAttribute('aria-busy', 'false');
      announce(`Answer ${answers[line.side].dataset.side} is complete.`);
    }
  };

  const lines = async function* (response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = '';
    try {
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        const parts = (rest + value).split('\n');
        rest = parts.pop();
        for (const part of parts) yield JSON.parse(part);
      }
    } finally {
      reader.cancel();  // the server stops writing when nobody reads
    }
  };

  const read = async area => {
    const headers = JSON.parse(document.body.getAttribute('hx-headers'));
    try {
      const response = await fetch(area.dataset.answers, { method: 'POST', headers });
      if (!response.ok || response.redirected) {
        // The session has ended, or there are too many requests.
        fail(area, response.redirected ? 'You are signed out.' : 'The server refused to answer.');
        return;
      }
      for await (const line of lines(response)) {
        if (!area.isConnected) return;
        if (line.stored) {
          show(area);
          return;
        }
        if (line.error) {
          fail(area, line.error);
          return;
        }
        write(area, line);
      }
      fail(area, LOST);
    } catch {
      if (area.isConnected) fail(area, LOST);
    }
  };

  const start = () => {
    const area = document.querySelector('[data-answers]:not([data-reading])');
    if (area) {
      area.dataset.reading = '';
      announce('The answers are being written.');
      read(area);
    }
    // A long dialogue is read from its last message on.
    const turns = document.querySelectorAll('.chat .prompt .turn');
    if (turns.length > 1) turns[turns.length - 1].scrollIntoView({ block: 'start' });
    const message = document.querySelector('[data-send]');
    if (message && !message.closest('details')) message.focus();
  };

  document.addEventListener('keydown', event => {
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
    if (!event.target.matches('[data-send]')) return;
    event.preventDefault();
    event.target.form.requestSubmit();
  });
  document.addEventListener('htmx:afterSettle', event => {
    if (event.target.id === 'main') start();
  });
  start();
})();
