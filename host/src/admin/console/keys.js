// Keys: browsed a page at a time, and the value of one, seen and edited.

import { byId, bytes, confirmed, download, element, facts, Refused, reason, request, say, visible } from './server.js';

/** Keys and folders of a page. */
const PAGE = 100;
/** Largest value that is loaded whole; of a larger one the beginning is shown. */
const MAX_TEXT = 256 << 10;
/** Bytes of a value that is not text, as shown. */
const MAX_BYTES = 512;
/** A standby serves stale reads only to those who accept them. */
const READ = { 'kvs-consistency': 'stale' };

let prefix = '';
/** The open value: key, etag (null without a value), and whether the text area can hold it. */
let open = null;

const path = (key) => `/v1/${encodeURIComponent(key)}`;

/** Whether the guest speaks the default interface. Rejections that say nothing of that are thrown. */
export async function speaks() {
  try {
    const page = await (await request('GET', '/v1?limit=1', { headers: READ })).json();
    return Array.isArray(page.keys) && typeof page.list_complete === 'boolean';
  } catch (error) {
    if (error instanceof SyntaxError) return false;
    if (error instanceof Refused && [400, 404, 405, 501].includes(error.status)) return false;
    throw error;
  }
}

async function list(cursor = null) {
  const folders = byId('folders').checked;
  const query = new URLSearchParams({ prefix, limit: PAGE, ...(folders && { delimiter: '/' }), ...(cursor && { cursor }) });
  say('list-state', 'Loading');
  try {
    const response = await request('GET', `/v1?${query}`, { headers: READ });
    const page = await response.json();
    const found = page.keys.length + (page.prefixes?.length ?? 0);
    byId('list').replaceChildren(...(page.prefixes ?? []).map(folder), ...page.keys.map(entry));
    const more = page.list_complete ? '' : ', more on the next page';
    const age = response.headers.get('kvs-stale-age-ms');
    say('list-state', `${found === 0 ? 'No keys here' : `${found} ${found === 1 ? 'entry' : 'entries'}`}${more}${age === null ? '' : `, stale by at most ${age} ms`}`);
    byId('parent').hidden = prefix === '';
    byId('first-page').hidden = cursor === null;
    byId('next-page').hidden = page.list_complete;
    byId('next-page').onclick = () => list(page.cursor);
  } catch (error) {
    say('list-state', `The keys cannot be listed: ${reason(error)}`, 'bad');
  }
}

function folder(name) {
  const button = element('button', { type: 'button', onclick: () => go(name) }, 'Folder ', visible(name));
  return element('li', {}, button);
}

function entry({ key, size, expires }) {
  const button = element('button', { type: 'button', onclick: () => load(key) }, visible(key));
  const until = expires ? `, expires ${new Date(expires).toLocaleString()}` : '';
  return element('li', {}, button, element('span', { className: 'note' }, bytes(size) + until));
}

function go(to) {
  prefix = to;
  byId('prefix').value = to;
  return list();
}

/** Loads a value and opens the editor, also for a key without a value. */
async function load(key) {
  open = { key, etag: null, is_text: true };
  // What is shown until then belongs to another key.
  for (const id of ['save', 'delete', 'download']) byId(id).disabled = true;
  byId('editor-key').replaceChildren(visible(key));
  byId('editor').hidden = false;
  say('value-state', 'Loading');
  try {
    const head = await request('HEAD', path(key), { headers: READ });
    const part = Number(head.headers.get('content-length')) > MAX_TEXT ? { range: `bytes=0-${MAX_TEXT - 1}` } : {};
    const response = await request('GET', path(key), { headers: { ...READ, ...part } });
    const content = new Uint8Array(await response.arrayBuffer());
    if (open.key === key) present(response, content);
  } catch (error) {
    if (open.key !== key) return;
    const is_new = error instanceof Refused && error.status === 404;
    present(null, new Uint8Array());
    say('value-state', is_new ? 'There is no value yet' : `The value cannot be loaded: ${reason(error)}`, is_new ? '' : 'bad');
    byId('save').disabled = !is_new;
  }
  byId('editor-key').focus();
}

function present(response, content) {
  const headers = response?.headers ?? new Headers();
  const is_part = response?.status === 206;
  const size = is_part ? Number(headers.get('content-range').split('/')[1]) : content.length;
  const expires = headers.get('expires');
  open.etag = headers.get('etag');
  byId('content-type').value = headers.get('content-type') ?? '';
  // By the clock of the server: that of the browser can be wrong.
  byId('ttl').value = expires ? Math.max(1, (new Date(expires) - new Date(headers.get('date'))) / 1_000) : '';
  const area = byId('value');
  const text = is_part ? null : decode(content);
  area.value = text ?? '';
  // A text area has no other line ends than LF.
  open.is_text = text !== null && area.value === text;
  area.hidden = !open.is_text;
  byId('bytes').hidden = open.is_text;
  byId('bytes').replaceChildren(open.is_text ? '' : is_part || text !== null ? visible(decode(content, false)) : hex(content));
  byId('save').disabled = !open.is_text;
  byId('delete').disabled = open.etag === null;
  byId('download').disabled = open.etag === null;
  facts('value-facts', [['ETag', open.etag], ['Size', response && bytes(size)], ['Expires', expires && new Date(expires).toLocaleString()]]);
  if (is_part) say('value-state', `The value is too large to edit here; this is its beginning, ${bytes(content.length)}`);
  else if (text === null) say('value-state', 'The value is not text; replace it by a file');
  else say('value-state', open.is_text ? '' : 'The value has line ends that the editor would change; replace it by a file');
}

/** Text of UTF-8. Null where it is none. */
function decode(content, fatal = true) {
  try {
    return new TextDecoder('utf-8', { fatal, ignoreBOM: true }).decode(content);
  } catch {
    return null;
  }
}

function hex(content) {
  return [...content.subarray(0, MAX_BYTES)].map((byte) => byte.toString(16).padStart(2, '0')).join(' ') + (content.length > MAX_BYTES ? ' …' : '');
}

/** Changes what was seen, and nothing else: where the key was changed meanwhile, nothing happens. */
async function change(method, body) {
  const { key, etag } = open;
  const condition = etag === null ? { 'if-none-match': '*' } : { 'if-match': etag };
  const type = byId('content-type').value.trim();
  const ttl = byId('ttl').value.trim();
  const is_put = method === 'PUT';
  try {
    const headers = { ...condition, ...(is_put && { 'content-type': type || 'application/octet-stream' }) };
    await request(method, path(key) + (is_put && ttl ? `?${new URLSearchParams({ ttl })}` : ''), { headers, body });
  } catch (error) {
    const conflict = error instanceof Refused && error.status === 412;
    const message = conflict ? 'The key was changed meanwhile, nothing was stored. Load again to see the value that it has now' : `Not done: ${reason(error)}`;
    say('value-state', message, 'bad');
    return;
  }
  await load(key);
  say('value-state', is_put ? 'Saved' : 'Deleted', 'good');
  await list();
}

export function start() {
  byId('browse').addEventListener('submit', (event) => {
    event.preventDefault();
    go(byId('prefix').value);
  });
  byId('folders').addEventListener('change', () => list());
  byId('first-page').addEventListener('click', () => list());
  byId('parent').addEventListener('click', () => go(prefix.replace(/[^/]*\/?$/, '')));
  byId('open').addEventListener('submit', (event) => {
    event.preventDefault();
    if (byId('key').value !== '') load(byId('key').value);
  });
  byId('save').addEventListener('click', () => change('PUT', byId('value').value));
  byId('reload').addEventListener('click', () => load(open.key));
  byId('close').addEventListener('click', () => {
    byId('editor').hidden = true;
    byId('key').focus();
  });
  byId('delete').addEventListener('click', async () => {
    const question = element('span', {}, 'Delete the key ', visible(open.key), '?');
    if (await confirmed(question, 'Delete')) await change('DELETE');
  });
  byId('download').addEventListener('click', async () => {
    try {
      const response = await request('GET', path(open.key), { headers: READ, signal: null });
      download(new Blob([await response.arrayBuffer()], { type: 'application/octet-stream' }), open.key.replace(/[^\w.-]/g, '_').slice(-100));
    } catch (error) {
      say('value-state', `Not downloaded: ${reason(error)}`, 'bad');
    }
  });
  byId('replacement').addEventListener('change', async (event) => {
    const [file] = event.target.files;
    event.target.value = '';
    if (file) await change('PUT', file);
  });
}

/** Shows the keys, or says that the guest has none that this page understands. */
export async function show(guest) {
  const understood = await speaks();
  byId('store').hidden = !understood;
  byId('watch').hidden = !understood;
  byId('foreign').hidden = understood;
  byId('foreign').replaceChildren('The guest ', visible(guest), ' does not speak the default interface: its keys cannot be shown here.');
  if (understood) await list();
}
