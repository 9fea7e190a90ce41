// The guest: which one serves, another in its place, and its probation.

import { byId, bytes, confirmed, element, facts, reason, request, say, visible } from './server.js';

let component = null;
let waiting = false;

/** Shows the document of GET /guest. */
export function show(guest) {
  facts('guest-facts', [
    ['Name', guest.name],
    ['Version', guest.version],
    ['SHA-256', guest.sha256],
    ['From', guest.source],
    ['Serves since', new Date(guest.since).toLocaleString()],
    ['Last swap', last(guest.last_swap)],
    ...guest.shards_down.map((down) => [`Shard ${down.shard + 1}`, `without an instance since ${down.since}: ${down.reason}`]),
  ]);
  const { swap } = guest;
  byId('swap-progress').hidden = swap === null;
  const is_shadow = swap?.phase === 'shadow' && swap.shadow !== null;
  byId('roll-back').hidden = swap?.phase !== 'probation' && !is_shadow;
  byId('roll-back').textContent = is_shadow ? 'End shadow traffic' : 'Roll back';
  compare(swap?.shadow ?? guest.last_swap?.shadow ?? null);
  if (swap === null) return;
  const bar = byId('swap-bar');
  let left = '';
  if (swap.phase === 'probation') {
    left = `${Math.max(0, guest.probation_seconds - swap.seconds).toFixed(0)} s left`;
    [bar.max, bar.value] = [guest.probation_seconds, Math.min(swap.seconds, guest.probation_seconds)];
  } else if (is_shadow) {
    left = `${Math.max(0, swap.shadow.seconds - swap.seconds).toFixed(0)} s left`;
    [bar.max, bar.value] = [swap.shadow.seconds, Math.min(swap.seconds, swap.shadow.seconds)];
  } else if (swap.phase === 'replaying' && swap.newest !== '0') {
    left = `${swap.entries} entries of the log`;
    // Sequences are text; for a bar they are precise enough as numbers.
    [bar.max, bar.value] = [Number(swap.newest), Math.min(Number(swap.sequence), Number(swap.newest))];
  } else {
    bar.removeAttribute('value');
  }
  const phase = swap.phase === 'probation' ? `Probation: ${guest.name} ${guest.version} serves,` : `Swap: ${swap.phase}`;
  // Announced only when it changes; the countdown is not.
  if (byId('swap-phase').textContent !== phase) byId('swap-phase').textContent = phase;
  byId('swap-left').textContent = left;
}

/** Shows a report of shadow traffic. */
function compare(report) {
  byId('shadow-report').hidden = report === null;
  if (report === null) return;
  const time = (seconds) => seconds === null ? '-' : `${(seconds * 1_000).toFixed(3)} ms`;
  const side = ({ p50_seconds, p99_seconds, max_seconds, memory_bytes }) => `p50 ${time(p50_seconds)}, p99 ${time(p99_seconds)}, `
    + `max ${time(max_seconds)}, ${bytes(memory_bytes)} of memory`;
  facts('shadow-facts', [
    ['Compared', report.compared],
    ['Different', report.different],
    ['Dropped', report.dropped],
    ['Serving', side(report.serving)],
    ['Candidate', side(report.candidate)],
  ]);
  byId('shadow-examples').replaceChildren(...report.examples.map((example) => element('li', {}, visible(
    `${example.method} ${example.target}: ${example.difference}: ${example.serving}, candidate: ${example.candidate}`,
  ))));
}

/** The query of a swap, by the form. */
function query() {
  const [shadow, sample, most] = ['shadow', 'sample', 'max-differences'].map((id) => encodeURIComponent(byId(id).value.trim()));
  return shadow === '' ? '' : `?shadow=${shadow}&sample=${sample}&max-differences=${most}`;
}

function last(swap) {
  if (swap === null) return null;
  const which = swap.guest ? ` (${swap.guest} ${swap.version})` : '';
  return `${new Date(swap.at).toLocaleString()}: ${swap.outcome}${which}${swap.reason ? `: ${swap.reason}` : ''}`;
}

async function take(file) {
  component = null;
  allow();
  if (!file) return;
  const done = await send('PUT', '/guest?dry-run', file, `Dry run of ${file.name}`);
  if (!done) return;
  component = file;
  say('swap-result', '', 'good');
  byId('swap-result').append('Dry run: ', visible(`${done.name} ${done.version}`), ` fits; ${done.entries} entries replayed in `
    + `${done.seconds.toFixed(1)} s, ${done.keys} keys, ${bytes(done.memory_bytes)} of memory`);
  allow();
  byId('swap').focus();
}

/** Sends what is answered when it is over: it has no timeout. */
async function send(method, path, body, what) {
  waiting = true;
  allow();
  say('swap-result', `${what}: in progress`);
  try {
    const response = await request(method, path, { body, signal: null });
    return await response.json();
  } catch (error) {
    say('swap-result', '', 'bad');
    byId('swap-result').append(`${what} failed: `, visible(reason(error)));
    return null;
  } finally {
    waiting = false;
    allow();
  }
}

function allow() {
  byId('swap').disabled = component === null || waiting;
  byId('built-in').disabled = waiting;
  byId('component').disabled = waiting;
}

async function swap(method, body, what) {
  component = null;
  const done = await send(method, `/guest${query()}`, body, what);
  if (!done) return;
  say('swap-result', '', 'good');
  byId('swap-result').append(visible(`${done.name} ${done.version}`), ` serves; requests were held for ${(done.pause_seconds * 1_000).toFixed(1)} ms`);
  byId('component').value = '';
}

export function start() {
  byId('component').addEventListener('change', (event) => take(event.target.files[0]));
  byId('swap').addEventListener('click', () => swap('PUT', component, 'Swap'));
  byId('built-in').addEventListener('click', async () => {
    if (await confirmed('Swap to the store that is in the binary?', 'Swap')) await swap('DELETE', undefined, 'Swap to the built-in store');
  });
  byId('roll-back').addEventListener('click', async () => {
    try {
      await request('DELETE', '/guest?rollback');
    } catch (error) {
      say('swap-result', `Rollback failed: ${reason(error)}`, 'bad');
    }
  });
  const drop = byId('drop');
  const over = (is) => (event) => {
    event.preventDefault();
    drop.classList.toggle('over', is);
  };
  drop.addEventListener('dragover', over(true));
  drop.addEventListener('dragleave', over(false));
  drop.addEventListener('drop', (event) => {
    over(false)(event);
    if (!waiting) take(event.dataTransfer.files[0]);
  });
}
