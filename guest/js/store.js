// A store in JavaScript: the paths, methods and headers of the default guest, without conditions, lists, transactions and
// times to live; it honours those that another guest has set.
import { append } from 'kvs:store/transaction-log@0.2.0';
import { reuse } from 'kvs:store/response-cache@0.2.0';

const STATUS = { 'insufficient-storage': 507, unavailable: 503, 'read-only': 403, 'too-large': 413, 'invalid-key': 400 };

const items = new Map();
let bytes = 0;
let newestDelete = 0n;

const encode = (text) => new TextEncoder().encode(text);
const header = (name, text) => ({ name, value: encode(text) });
const etag = (sequence) => header('etag', `"${sequence}"`);

/** What an entry of the log does: on replay, and right after it was appended. */
function change(sequence, { tag, val }) {
  const key = tag === 'put' ? val.key : val;
  const size = (item) => encode(key).length + item.value.length;
  const old = items.get(key);
  if (old) bytes -= size(old);
  if (tag === 'put') {
    items.set(key, { sequence, ...val });
    bytes += size(val);
  } else if (items.delete(key)) newestDelete = sequence;
}

function line(status, text, readSequence = 0n, more = []) {
  const headers = [header('content-type', 'text/plain; charset=utf-8'), ...more];
  return { status, headers, body: encode(`${text}\n`), readSequence };
}

const done = (status, readSequence, headers) => ({ status, headers, body: new Uint8Array(), readSequence });

/** The key of a path, by the rules that all guests keep; else the answer that says why it has none. */
function keyIn(path) {
  const raw = /^\/v1\/(?:key\/(.*)|([^/]*))$/s.exec(path);
  if (!raw) return { refused: line(404, 'unknown path; keys live at /v1/{key} and /v1/key/{key}') };
  try {
    const key = decodeURIComponent(raw[1] ?? raw[2]);
    if (key && encode(key).length <= 1024 && !/[\0-\x1f\x7f-\x9f]|(^|\/)\.\.?(\/|$)/.test(key)) return { key };
    return { refused: line(400, 'a key is 1 to 1024 bytes, without control characters, `.` and `..` segments') };
  } catch {
    return { refused: line(400, 'the key has a bad percent escape, or is not valid UTF-8') };
  }
}

/** A content type that a response can carry; curl's is what curl says when its user said nothing. */
const saysSomething = (type) => /^[ -~]{1,256}$/.test(type) && !/^application\/x-www-form-urlencoded/i.test(type);

/** Appends first, then changes. */
function write(event, status) {
  let sequence;
  try {
    sequence = append([event]);
  } catch ({ payload: { tag } }) {
    return line(STATUS[tag], `nothing was stored: ${tag}`);
  }
  change(sequence, event);
  return done(status, sequence, status === 201 ? [etag(sequence)] : []);
}

export const handler = {
  handle({ method, target, headers, body, timeMs }) {
    const [path, query] = target.split(/\?(.*)/s);
    const { key, refused } = keyIn(path);
    if (refused) return refused;
    if (query) return line(400, 'this store takes no query parameters');
    const found = items.get(key);
    const item = found?.expiresAtMs <= timeMs ? undefined : found;
    // The absence of what has expired depends on its put too.
    const absence = found && found.sequence > newestDelete ? found.sequence : newestDelete;
    if (method === 'PUT') {
      // A part would replace the whole (RFC 9110, section 14.5).
      if (headers.some(({ name }) => name === 'content-range')) return line(400, 'content-range: send the whole value');
      if (headers.some(({ name }) => name === 'content-encoding')) return line(415, 'content-encoding would not be kept');
      const types = headers.map(({ value }) => new TextDecoder().decode(value)).filter(saysSomething);
      const metadata = types.slice(0, 1).map((type) => ['content-type', type]);
      return write({ tag: 'put', val: { key, value: body, metadata, expiresAtMs: undefined } }, 201);
    } else if (method === 'DELETE') {
      return item ? write({ tag: 'delete', val: key }, 200) : done(200, absence, []);
    } else if (method !== 'GET' && method !== 'HEAD') {
      return line(405, 'a key has GET, HEAD, PUT and DELETE', 0n, [header('allow', 'GET, HEAD, PUT, DELETE')]);
    }
    // What follows depends on this key alone.
    reuse([key], item?.expiresAtMs);
    if (!item) return line(404, 'no such key', absence);
    const kept = item.metadata.find(([name, type]) => name === 'content-type' && saysSomething(type));
    const type = header('content-type', kept?.[1] ?? 'application/octet-stream');
    const answered = [type, etag(item.sequence), header('content-security-policy', 'sandbox')];
    return { status: 200, headers: answered, body: item.value, readSequence: item.sequence };
  },
};

export const lifecycle = {
  describe: () => ({ name: 'js', version: '0.1.0', headers: ['content-type', 'content-range', 'content-encoding'], capabilities: [] }),
  apply({ entries, bytes, metadata }) {
    let start = 0;
    const take = (length) => bytes.slice(start, (start += length));
    for (const { sequence, keyBytes, put } of entries) {
      const key = new TextDecoder().decode(take(keyBytes));
      if (!put) change(sequence, { tag: 'delete', val: key });
      else {
        const { valueBytes, expiresAtMs } = put;
        change(sequence, { tag: 'put', val: { key, value: take(valueBytes), metadata: metadata[put.metadata] ?? [], expiresAtMs } });
      }
    }
  },
  tick: () => undefined,
  stats: () => ({ keys: BigInt(items.size), bytes: BigInt(bytes) }),
};

const owner = ({ key }) => (key ? { tag: 'key', val: key } : { tag: 'any-shard' });
export const sharding = {
  route: (method, target) => owner(keyIn(target.split('?')[0])),
  extractKeys: () => [], mergeResponses: (request, responses) => responses[0],
};
