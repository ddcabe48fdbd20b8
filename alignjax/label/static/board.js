// Adds dragging to the ranking: the list of responses becomes cards, which are dragged from 'To be
// ranked' into a column for each rank. The radio buttons stay on the cards, for keyboards, screen
// readers and touch. It uses functions of label.js.
'use strict';

function make(tag, className, text = '') {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function startBoard(form) {
  const tray = form.querySelector('.cards');
  const cards = [...form.querySelectorAll('.rank')];
  const above = make('div', 'above');
  const whole = make('button', '', 'Show whole texts');
  const columns = make('div', 'columns');
  const places = [tray];
  let dragged = null;
  whole.type = 'button';
  whole.setAttribute('aria-pressed', 'false');
  whole.addEventListener('click', () => {
    whole.setAttribute('aria-pressed', String(form.classList.toggle('whole')));
    fit();
  });
  above.append(make('p', 'title', 'To be ranked'), whole);
  tray.before(above);
  tray.after(columns);
  columns.style.setProperty('--count', cards.length);
  for (let rank = 1; rank <= cards.length; rank += 1) {
    const end = rank === 1 ? ' (best)' : rank === cards.length ? ' (worst)' : '';
    const column = make('div', 'column');
    column.setAttribute('role', 'group');
    column.setAttribute('aria-label', `Rank ${rank}${end}`);
    column.append(make('p', 'title', `Rank ${rank}${end}`));
    columns.append(column);
    places.push(column);
  }
  places.forEach((place, rank) => {
    place.addEventListener('dragover', (event) => {
      if (!dragged) return;
      event.preventDefault();
      place.classList.add('over');
    });
    place.addEventListener('dragleave', () => place.classList.remove('over'));
    place.addEventListener('drop', (event) => {
      event.preventDefault();
      place.classList.remove('over');
      if (dragged) choose(dragged, String(rank));
    });
  });
  for (const card of cards) {
    const handle = card.querySelector('.handle');
    handle.draggable = true;
    handle.addEventListener('dragstart', (event) => {
      dragged = card;
      event.dataTransfer.setData('text/plain', '');
      event.dataTransfer.effectAllowed = 'move';
      event.dataTransfer.setDragImage(card, 20, 10);
      card.classList.add('dragged');
    });
    handle.addEventListener('dragend', () => {
      dragged = null;
      card.classList.remove('dragged');
    });
  }
  const settle = () => {
    const focused = document.activeElement;
    for (const card of cards) {
      const place = places[Number(card.querySelector('.choices :checked')?.value || 0)];
      if (card.parentElement === place) continue;
      const later = [...place.querySelectorAll('.rank')].find((c) => c.dataset.number > card.dataset.number);
      place.insertBefore(card, later || null);
      if (!card.contains(focused)) continue;
      focused.focus({ preventScroll: true });
      card.scrollIntoView({ block: 'nearest' });
    }
    fit();
    whole.hidden = !form.matches('.whole') && !form.querySelector('.text[tabindex]');
  };
  form.classList.add('board');
  form.addEventListener('change', settle);
  settle();
}

startBoard(work);
