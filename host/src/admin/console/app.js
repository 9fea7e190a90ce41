// The page: signs in, polls the server, and hands what it reads to the parts.

import * as charts from './charts.js';
import * as guest from './guest.js';
import * as keys from './keys.js';
import * as watch from './watch.js';
import { byId, download, element, hasToken, onSignIn, reason, Refused, request, say, setToken, visible } from './server.js';

const POLL_MS = 2_000;
/** While a swap is in progress. */
const FAST_MS = 500;

/** The guest whose keys are shown, by its digest. */
let shown = null;
let connected = false;

/** The lines of /readyz, which is 503 while a part is not ready. */
async function health() {
  const response = await fetch('/readyz', { cache: 'no-store', signal: AbortSignal.timeout(POLL_MS * 5) });
  const parts = [...(await response.text()).matchAll(/^\[([+-])\](.+)$/gm)].map(([, sign, text]) => {
    const is_well = sign === '+';
    return element('li', { className: is_well ? '' : 'bad' }, is_well ? '✓ ' : '✗ not ready: ', visible(text));
  });
  byId('parts').replaceChildren(...parts);
  return response.ok;
}

async function poll() {
  let pause = POLL_MS;
  try {
    const ready = await health();
    const [metrics, document] = await Promise.all([request('GET', '/metrics'), request('GET', '/guest')]);
    const status = await document.json();
    charts.add(await metrics.text(), status.shards);
    guest.show(status);
    if (status.swap !== null) pause = FAST_MS;
    state(ready ? 'Ready' : 'Not ready', ready ? 'good' : 'bad');
    if (!connected || shown !== status.sha256) {
      await Promise.all([keys.show(`${status.name} ${status.version}`), offerBackup()]);
      [connected, shown] = [true, status.sha256];
    }
    byId('sign-in').hidden = true;
  } catch (error) {
    charts.gap();
    if (error instanceof Refused && error.status === 401) {
      state('Sign in to continue', 'bad');
    } else {
      connected = false;
      state(`${reason(error)}; trying again`, 'bad');
    }
  }
  setTimeout(poll, pause);
}

function state(message, kind) {
  if (byId('state').textContent !== message) say('state', message, kind);
}

onSignIn((refusal) => {
  const form = byId('sign-in');
  if (byId('sign-in-reason').textContent !== refusal) say('sign-in-reason', refusal, 'bad');
  if (!form.hidden) return;
  form.hidden = false;
  byId('token').focus();
});

byId('sign-in').addEventListener('submit', async (event) => {
  event.preventDefault();
  setToken(byId('token').value.trim());
  byId('token').value = '';
  connected = false;
  try {
    await request('GET', '/guest');
    await keys.show('that serves');
    byId('sign-in').hidden = true;
  } catch (error) {
    say('sign-in-reason', reason(error), 'bad');
  }
});

/** Shows the backup where the server has one. */
async function offerBackup() {
  let methods = '';
  try {
    methods = (await request('OPTIONS', '/backup')).headers.get('allow') ?? '';
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    methods = error.allow ?? '';
  }
  const has = /\bGET\b/.test(methods);
  byId('backup').hidden = !has;
  document.querySelector('a[href="#backup"]').hidden = !has;
}

byId('take-backup').addEventListener('click', async () => {
  const name = `kvs-${new Date().toISOString().replace(/[:.]/g, '-')}.backup`;
  if (!hasToken()) {
    // The browser writes it to a file as it comes.
    element('a', { href: '/backup', download: name }).click();
    say('backup-state', 'The browser downloads it');
    return;
  }
  say('backup-state', 'In progress');
  try {
    download(await (await request('GET', '/backup', { signal: null })).blob(), name);
    say('backup-state', 'Done', 'good');
  } catch (error) {
    say('backup-state', `Failed: ${reason(error)}`, 'bad');
  }
});

guest.start();
keys.start();
watch.start();
poll();
