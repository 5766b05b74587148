// Keys, ranking by drag and keys, announcements. Without it every page works by plain forms.
(() => {
  'use strict';

  const find = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
  const task = () => find('.task');
  const announce = text => { find('#status').textContent = text; };

  const notice = text => {
    const area = find('#notice');
    area.replaceChildren();
    if (text) {
      const line = document.createElement('p');
      line.textContent = text;
      area.append(line);
    }
  };

  // Shortcuts can be switched off, since they may collide with those of a screen reader.
  const SETTING = 'shortcuts';
  let shortcuts = true;
  try {
    shortcuts = localStorage.getItem(SETTING) !== 'off';
  } catch { /* storage is blocked: they stay on */ }

  // Ranking. The order of the list is the ranking; the selects of the form hold it.
  const cards = () => all('.rank > li');

  const number = () => {
    let rank = 0;
    cards().forEach((card, index) => {
      const tie = find('[data-tie]', card);
      if (index === 0) tie.checked = false;
      tie.disabled = index === 0;
      if (!tie.checked) rank = index + 1;
      card.classList.toggle('tied', tie.checked);
      find('.place', card).textContent = tie.checked ? '=' : rank;
      find('select', card).value = rank;
      find('[data-move="-1"]', card).disabled = index === 0;
      find('[data-move="1"]', card).disabled = index === cards().length - 1;
    });
  };

  const place = (card, index) => {
    const list = cards();
    const others = list.filter(other => other !== card);
    const before = list.indexOf(card);
    const target = Math.max(0, Math.min(index, others.length));
    // A tie is one with the card above, so it ends where another card comes above.
    const moved = [card, others[target]];
    if (!find('[data-tie]', card).checked) moved.push(list[before + 1]);
    const ended = target === before
      ? []
      : moved.filter(other => other && find('[data-tie]', other).checked);
    for (const other of ended) find('[data-tie]', other).checked = false;
    card.parentElement.insertBefore(card, others[target] || null);
    number();
    const names = ended.map(other => other.dataset.name).join(' and ');
    announce(`${card.dataset.name} is now number ${target + 1} of ${list.length}`
      + (names && `. No tie with the one above any more: ${names}`));
  };

  const move = (card, by) => {
    const active = document.activeElement;
    place(card, cards().indexOf(card) + by);
    active.focus();
    if (active.disabled) card.focus();
  };

  let dragged = null;
  document.addEventListener('dragstart', event => {
    dragged = event.target.closest && event.target.closest('.rank > li');
    if (!dragged) return;
    event.dataTransfer.effectAllowed = 'move';
    event.dataTransfer.setData('text/plain', dragged.dataset.name);
    event.dataTransfer.setDragImage(dragged, 10, 10);
    dragged.classList.add('dragged');
  });
  document.addEventListener('dragover', event => {
    if (dragged && event.target.closest('.rank')) event.preventDefault();
  });
  document.addEventListener('drop', event => {
    const over = dragged && event.target.closest('.rank > li');
    if (!over) return;
    event.preventDefault();
    if (over !== dragged) place(dragged, cards().indexOf(over));
  });
  document.addEventListener('dragend', () => {
    if (dragged) dragged.classList.remove('dragged');
    dragged = null;
  });

  document.addEventListener('change', event => {
    if (event.target.matches('[data-tie]')) number();
    if (event.target.id === SETTING) {
      shortcuts = event.target.checked;
      try {
        localStorage.setItem(SETTING, shortcuts ? 'on' : 'off');
      } catch { /* until the next page */ }
    }
  });
  document.addEventListener('click', event => {
    const button = event.target.closest('[data-move]');
    if (button) move(button.closest('li'), Number(button.dataset.move));
    if (event.target.closest('#help') && showKeys()) event.preventDefault();
  });

  const showKeys = () => {
    const dialog = find('#keys');
    if (!dialog || !dialog.showModal || !task()) return false;
    find(`#${SETTING}`).checked = shortcuts;
    for (const keys of all('[data-kind]', dialog)) {
      keys.hidden = keys.dataset.kind !== task().dataset.kind;
    }
    if (!dialog.open) dialog.showModal();
    return true;
  };

  const press = selector => {
    const button = find(selector);
    if (button && !button.disabled) button.click();
  };

  const open = (id, field) => {
    const details = find(id);
    if (!details) return;
    details.open = true;
    find(field, details).focus();
  };

  // Keys of each kind of task. Each returns true if it used the key.
  const kinds = {
    pair(event) {
      const buttons = all('.scale button');
      const chosen = buttons.indexOf(document.activeElement);
      const middle = (buttons.length - 1) / 2;
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) {
        const next = (chosen < 0 ? middle : chosen) + step;
        buttons[Math.max(0, Math.min(next, buttons.length - 1))].focus();
      } else if (/^[1-4]$/.test(event.key)) {
        if (chosen < 0 || chosen === middle) {
          notice('Choose a side first: ← for A, → for B.');
        } else {
          press(`.scale [value="${buttons[chosen].value[0]}${event.key}"]`);
        }
      } else if (event.key === '0' || event.key === 't') {
        press('.scale [value="tie"]');
      } else {
        return false;
      }
      return true;
    },

    rank(event) {
      const list = cards();
      const card = document.activeElement.closest('.rank > li');
      const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (step && event.shiftKey && card) {
        move(card, step);
      } else if (step) {
        const next = card ? list.indexOf(card) + step : 0;
        list[Math.max(0, Math.min(next, list.length - 1))].focus();
      } else if (card && /^[1-9]$/.test(event.key) && Number(event.key) <= list.length) {
        place(card, Number(event.key) - 1);
        card.focus();
      } else if (card && event.key === '=') {
        const tie = find('[data-tie]', card);
        tie.checked = !tie.disabled && !tie.checked;
        number();
        announce(`${card.dataset.name} is ${tie.checked ? 'as good as' : 'worse than'} the one above`);
      } else if (event.key === 'Enter' && document.activeElement === card) {
        press('#save');
      } else {
        return false;
      }
      return true;
    },

    best(event) {
      if (!/^[1-9]$/.test(event.key)) return false;
      press(`[data-key="${event.key}"]`);
      return true;
    },

    rate(event) {
      const groups = all('.rating');
      const rated = group => find(':checked', group);
      if (/^[1-7]$/.test(event.key)) {
        const focused = document.activeElement.closest('.rating');
        const group = focused || groups.find(other => !rated(other)) || groups[0];
        find(`[value="${event.key}"]`, group).checked = true;
        if (groups.length === 1) {
          press('#save');
        } else {
          const next = groups.find(other => !rated(other));
          (next ? find('input', next) : find('#save')).focus();
        }
      } else if (event.key === 'Enter' && groups.every(rated)) {
        press('#save');
      } else {
        return false;
      }
      return true;
    },
  };

  const common = {
    s: () => press('#skip'),
    u: () => press('#undo'),
    f: () => open('#flags', 'input'),
    r: () => open('#reason', 'textarea'),
    '?': showKeys,
  };

  document.addEventListener('keydown', event => {
    const target = event.target;
    const writes = target.matches('textarea, select, input:not([type=radio], [type=checkbox])');
    if (event.key === 'Escape' && writes && task()) {
      find('#task-title').focus({ preventScroll: true });
      return;
    }
    if (writes || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (event.repeat && !event.key.startsWith('Arrow')) return;
    if (find('dialog[open]') || !shortcuts) return;
    const kind = task() && kinds[task().dataset.kind];
    // Enter and the space bar keep their meaning on buttons and links.
    const native = event.key === 'Enter' && target.matches('button, a, summary, [type=checkbox]');
    if (kind && !native && kind(event)) {
      event.preventDefault();
    } else if (common[event.key] && find('#task-title')) {
      event.preventDefault();
      common[event.key]();
    }
  });

  // The form is sent once: a second press of a key waits for the next task.
  document.addEventListener('htmx:beforeRequest', () => notice(''));
  const lost = () => notice(
    'Not saved: the server does not answer. Your answer is still here; try again in a moment.');
  document.addEventListener('htmx:sendError', lost);
  document.addEventListener('htmx:timeout', lost);

  const start = () => {
    if (find('.rank')) number();
  };
  document.addEventListener('htmx:afterSettle', event => {
    if (event.target.id !== 'main') return;
    start();
    const root = find('[data-announce]');
    if (root) announce(root.dataset.announce);
    const title = find('#task-title');
    if (title) title.focus({ preventScroll: true });
  });

  document.documentElement.classList.add('js');
  start();
})();
