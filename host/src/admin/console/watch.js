// The watch: changes of keys as they happen, over reconnects.

import { byId, element, Refused, reason, request, say, visible } from './server.js';

/** Changes that are shown. */
const EVENTS = 200;
/** Characters of a value that are shown. */
const VALUE = 200;
const PAUSE_MS = 2_000;

let stop = null;

async function watch(prefix) {
  stop?.abort();
  stop = new AbortController();
  const { signal } = stop;
  byId('watch-stop').hidden = false;
  byId('events').replaceChildren();
  let position = null;
  while (!signal.aborted) {
    const query = new URLSearchParams({ prefix, ...(position !== null && { since: position }) });
    try {
      const response = await request('GET', `/v1?watch&${query}`, { signal, headers: { 'kvs-consistency': 'stale' } });
      say('watch-state', 'Watching', 'good');
      for await (const event of events(response.body)) {
        position = event.id ?? position;
        if (event.event) add(event);
      }
      say('watch-state', 'The watch ended; connecting again');
    } catch (error) {
      if (signal.aborted) break;
      if (error instanceof Refused && error.status < 500) {
        say('watch-state', `The watch ended: ${reason(error)}`, 'bad');
        byId('watch-stop').hidden = true;
        return;
      }
      say('watch-state', `The watch was interrupted: ${reason(error)}; connecting again`, 'bad');
    }
    await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
  }
}

/** Server-sent events of a stream. */
async function* events(body) {
  let [text, event] = ['', {}];
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value: piece } = await reader.read();
    if (done) return;
    const lines = (text + piece).split('\n');
    text = lines.pop();
    for (const line of lines) {
      const [, name, value] = line.match(/^(\w+): ?(.*)$/s) ?? [];
      if (name) event[name] = value;
      if (line !== '') continue;
      yield event;
      event = {};
    }
  }
}

function add({ id, event, data }) {
  const change = JSON.parse(data);
  const value = change.value ?? (change.value_base64 === undefined ? null : `base64 ${change.value_base64}`);
  const shown = value === null ? [] : [' = ', visible(value.length > VALUE ? `${value.slice(0, VALUE)}…` : value)];
  byId('events').prepend(element('li', {}, `${id} ${event} `, visible(change.key), ...shown));
  while (byId('events').children.length > EVENTS) byId('events').lastElementChild.remove();
}

export function start() {
  byId('watch-form').addEventListener('submit', (event) => {
    event.preventDefault();
    watch(byId('watch-prefix').value);
  });
  byId('watch-stop').addEventListener('click', () => {
    stop?.abort();
    byId('watch-stop').hidden = true;
    say('watch-state', 'Stopped');
  });
}
