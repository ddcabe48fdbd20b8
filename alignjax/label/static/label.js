// Makes the pages quicker to use; everything works without it. It saves what is filled in on the
// server and in this browser, counts the seconds in which the page is used, and adds keys.
'use strict';

const DRAFTS = 'alignjax-label/draft/';
const work = document.querySelector('form.work');

// What this browser keeps. It keeps nothing where its owner does not allow that.
function keep(key, value) {
  try {
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, value);
  } catch { /* The server has the drafts. */ }
}

function kept(key) {
  try { return localStorage.getItem(key); } catch { return null; }
}

function fieldsOf(form) {
  const out = {};
  for (const [name, value] of new FormData(form)) {
    if (!['token', 'step', 'sent'].includes(name)) (out[name] ||= []).push(value);
  }
  return out;
}

function fill(form, fields) {
  for (const element of form.elements) {
    const values = fields[element.name] || [];
    if (element.type === 'radio' || element.type === 'checkbox') {
      if (element.name) element.checked = values.includes(element.value);
    } else if (element.tagName !== 'BUTTON' && values.length) {
      element.value = values[0];
    }
  }
}

// The draft of a form stays in this browser until the server says that it has that very form: the
// page that follows has the form's `sent` in the fragment of its address.
function forgetSent() {
  const found = /^#saved-(\w+)$/.exec(location.hash);
  if (!found) return;
  history.replaceState(null, '', location.pathname + location.search);
  try {
    for (const key of Object.keys(localStorage)) {
      if (key.startsWith(DRAFTS) && JSON.parse(kept(key)).sent === found[1]) keep(key, null);
    }
  } catch { /* As above. */ }
}

function startSaving(form) {
  const { person, item, step } = form.dataset;
  const key = `${DRAFTS}${person}/${item}/${step}`;
  const status = form.querySelector('.saved');
  const say = (text) => { if (status.textContent !== text) status.textContent = text; };
  let timer = 0;
  let changed = false;
  let sending = null;
  const later = (after) => {
    clearTimeout(timer);
    timer = setTimeout(save, after);
  };
  async function save(event) {
    const leaving = Boolean(event);
    if (sending && !leaving) return later(300);
    if (sending) sending.abort();
    const stored = kept(key);
    sending = new AbortController();
    changed = false;
    try {
      const answer = await fetch(`/items/${item}/draft`, {
        method: 'POST', body: new URLSearchParams(new FormData(form)), keepalive: leaving,
        signal: leaving ? null : sending.signal,
      });
      if (answer.status >= 500) throw new Error();
      if (answer.ok) {
        if (kept(key) === stored) keep(key, null);
        say('Draft saved.');
      } else {
        say({
          410: 'Not saved: this item is no longer yours.',
          401: 'Not saved: log in again. This browser keeps your draft.',
          403: 'Not saved: reload this page. This browser keeps your draft.',
        }[answer.status] || 'Not saved on the server.');
      }
    } catch (error) {
      if (error.name === 'AbortError') return;
      say('Not saved on the server; this browser keeps your draft.');
      later(10000);
    } finally {
      sending = null;
    }
  }
  const text = (fields) => JSON.stringify({ ...fields, seconds: 0 });
  let last = text(fieldsOf(form));
  const change = () => {
    if (text(fieldsOf(form)) === last) return;
    last = text(fieldsOf(form));
    changed = true;
    keep(key, JSON.stringify({ fields: fieldsOf(form), at: Date.now() }));
    later(700);
  };
  form.addEventListener('input', change);
  form.addEventListener('change', change);
  form.addEventListener('submit', () => {
    clearTimeout(timer);
    if (sending) sending.abort();
    changed = false;
    form.elements.sent.value = Math.random().toString(36).slice(2);
    keep(key, JSON.stringify({ fields: fieldsOf(form), at: Date.now(), sent: form.elements.sent.value }));
  });
  addEventListener('pagehide', (event) => { if (changed) save(event); });
  // What this browser has kept goes before what the server has, unless that is clearly newer.
  const mine = JSON.parse(kept(key) || 'null');
  if (!mine) return;
  if (text(mine.fields) === last || Date.now() - mine.at > 1000 * (Number(form.dataset.age) + 5)) {
    keep(key, null);
  } else {
    fill(form, mine.fields);
    change();
    say('Restored from this browser.');
  }
}

// Seconds in which the page is visible and somebody has moved, typed or scrolled within a minute.
function startCounting(form) {
  const field = form.elements.seconds;
  let seconds = Number(field.value) || 0;
  let last = Date.now();
  for (const kind of ['pointermove', 'pointerdown', 'keydown', 'scroll']) {
    addEventListener(kind, () => { last = Date.now(); }, { passive: true, capture: true });
  }
  field.value = seconds.toFixed(1);
  setInterval(() => {
    if (document.visibilityState === 'visible' && Date.now() - last < 60000) {
      seconds += 0.5;
      field.value = seconds.toFixed(1);
    }
  }, 500);
}

// Checks a radio button of a group; the value 0 unchecks all.
function choose(group, value) {
  const radios = [...group.querySelectorAll('input[type=radio]')];
  if (value !== '0' && !radios.some((radio) => radio.value === value)) return;
  for (const radio of radios) radio.checked = radio.value === value;
  radios[0].dispatchEvent(new Event('change', { bubbles: true }));
}

function startKeys(form) {
  const cards = [...form.querySelectorAll('.rank')];
  const scales = [...form.querySelectorAll('.scale')];
  const hint = form.querySelector('.keys');
  if (!hint) return;
  const enabled = hint.querySelector('input');
  hint.hidden = false;
  enabled.checked = kept('alignjax-label/keys') !== 'off';
  enabled.addEventListener('change', () => keep('alignjax-label/keys', enabled.checked ? null : 'off'));
  addEventListener('keydown', (event) => {
    const { key, target } = event;
    if (!enabled.checked || event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (target.closest('textarea, button, a, summary, select') || !/^[jk0-9]$|^Enter$/.test(key)) return;
    const focused = (element) => element.contains(document.activeElement);
    const at = cards.findIndex(focused);
    if (key === 'Enter') {
      if (target.closest('input')) return; // The browser submits then.
      form.requestSubmit(form.querySelector('button.main'));
    } else if (key === 'j' || key === 'k') {
      if (!cards.length) return;
      const next = at < 0 ? 0 : at + (key === 'j' ? 1 : -1);
      cards[Math.min(Math.max(next, 0), cards.length - 1)].focus();
    } else if (cards.length) {
      if (at < 0) return;
      choose(cards[at], key);
    } else {
      const group = scales.find(focused) || scales.find((s) => !s.querySelector(':checked')) || scales[0];
      choose(group, key);
      (group.querySelector(':checked') || document.body).focus();
    }
    event.preventDefault();
  });
}

function startLengths() {
  for (const area of document.querySelectorAll('textarea')) {
    const count = document.createElement('span');
    const show = () => {
      const length = [...area.value].length;
      count.textContent = `${length} character${length === 1 ? '' : 's'}`;
    };
    count.className = 'numbers';
    count.id = `${area.id}-count`;
    area.setAttribute('aria-describedby', count.id);
    area.addEventListener('input', show);
    area.after(count);
    show();
  }
}

// Instructions that somebody has closed stay closed, until they are changed.
function startInstructions() {
  const details = document.querySelector('details.instructions');
  if (!details) return;
  const key = `alignjax-label/closed/${details.dataset.task}`;
  if (kept(key) === details.dataset.version) details.open = false;
  details.addEventListener('toggle', () => {
    keep(key, details.open ? null : details.dataset.version);
    fit();
  });
}

// A keyboard must reach what scrolls.
function fit() {
  for (const part of document.querySelectorAll('.scrolls')) {
    const scrolls = part.scrollHeight > part.clientHeight + 1 || part.scrollWidth > part.clientWidth + 1;
    if (scrolls) part.tabIndex = 0;
    else part.removeAttribute('tabindex');
  }
}

forgetSent();
startLengths();
startInstructions();
if (work) {
  startSaving(work);
  startCounting(work);
  startKeys(work);
}
fit();
addEventListener('resize', fit);
