// SDK for guests whose paths name keys: a guest describes itself and handles requests, and the SDK keeps what the log says.
import { reuse } from 'kvs:store/response-cache@0.2.0';
import { set as setTimer } from 'kvs:store/timer@0.2.0';
import { append } from 'kvs:store/transaction-log@0.2.0';
import type { Header, Request as Received, Response } from 'kvs:store/http@0.2.0';
import type { Batch } from 'kvs:store/lifecycle@0.2.0';
import type { AppendError, Event } from 'kvs:store/transaction-log@0.2.0';
import { Table, type Item } from './table.js';

export type { Item, Response };
export { log } from 'kvs:store/logging@0.2.0';
export { add as addToCounter, set as setGauge } from 'kvs:store/metrics@0.2.0';
export { requestId } from 'kvs:store/request-context@0.2.0';

const STATUS = { 'insufficient-storage': 507, unavailable: 503, 'read-only': 403, 'too-large': 413, 'invalid-key': 400 };
const encoder = new TextEncoder();
const decoder = new TextDecoder();

export const header = (name: string, text: string): Header => ({ name, value: encoder.encode(text) });
export const etag = (sequence: bigint): Header => header('etag', `"${sequence}"`);

/** A response of one line of text. */
export function line(status: number, text: string, readSequence = 0n, more: Header[] = []): Response {
  return { status, headers: [header('content-type', 'text/plain; charset=utf-8'), ...more], body: encoder.encode(`${text}\n`), readSequence };
}

/** A response without a body. */
export const empty = (status: number, readSequence: bigint, headers: Header[] = []): Response => ({ status, headers, body: new Uint8Array(), readSequence });

/** Thrown for a request that cannot be answered otherwise: its response. */
class Rejected extends Error {
  constructor(readonly response: Response) { super(); }
}

/** The key of a path, by the rules that all guests keep. */
function keyOf(path: string): string {
  const raw = /^\/v1\/(?:key\/(.*)|([^/]*))$/s.exec(path);
  if (!raw) throw new Rejected(line(404, 'unknown path; keys live at /v1/{key} and /v1/key/{key}'));
  let key;
  try {
    key = decodeURIComponent(raw[1] ?? raw[2]!);
  } catch {
    throw new Rejected(line(400, 'the key has a bad percent escape, or is not valid UTF-8'));
  }
  if (key && encoder.encode(key).length <= 1024 && !/[\0-\x1f\x7f-\x9f]|(^|\/)\.\.?(\/|$)/.test(key)) return key;
  throw new Rejected(line(400, 'a key is 1 to 1024 bytes, without control characters, `.` and `..` segments'));
}

/** A request for a key. */
export class Request {
  readonly key: string;
  readonly query: string;

  constructor(readonly received: Received, readonly store: Store) {
    const [path, query = ''] = received.target.split(/\?(.*)/s);
    this.key = keyOf(path!);
    this.query = query;
  }

  get method(): string { return this.received.method; }
  get body(): Uint8Array { return this.received.body; }

  /** Values of a header, of those that the guest's description names. */
  headers(name: string): string[] {
    return this.received.headers.filter((header) => header.name === name).map(({ value }) => decoder.decode(value));
  }

  /** The item of the key, unless it expired, and the sequence that a response with or without it depends on. */
  read(): { item?: Item; readSequence: bigint } {
    return this.store.read(this.key, this.received.timeMs);
  }

  /** Declares that the response depends on nothing but the request and the item of the key. */
  reusable(item: Item | undefined) {
    reuse([this.key], item?.expiresAtMs);
  }

  /** Appends a put of the key, then changes the store. Returns the sequence. */
  put(value: Uint8Array, metadata: [string, string][] = [], expiresAtMs?: bigint): bigint {
    return this.store.append({ tag: 'put', val: { key: this.key, value, metadata, expiresAtMs } });
  }

  /** Appends a delete of the key, then changes the store. Returns the sequence. */
  delete(): bigint {
    return this.store.append({ tag: 'delete', val: this.key });
  }
}

/** What the log says. */
class Store {
  readonly table = new Table();
  #newestDelete = 0n;

  read(key: string, timeMs: bigint): { item?: Item; readSequence: bigint } {
    const found = this.table.get(encoder.encode(key));
    if (found && (found.expiresAtMs === undefined || found.expiresAtMs > timeMs)) return { item: found, readSequence: found.sequence };
    // The absence of what has expired depends on its put too.
    return { readSequence: found && found.sequence > this.#newestDelete ? found.sequence : this.#newestDelete };
  }

  append(event: Event): bigint {
    let sequence;
    try {
      sequence = append([event]);
    } catch (error) {
      const { tag } = (error as { payload: AppendError }).payload;
      throw new Rejected(line(STATUS[tag], `nothing was stored: ${tag}`));
    }
    const { val } = event;
    if (typeof val === 'string') this.#delete(sequence, encoder.encode(val));
    else this.table.set(encoder.encode(val.key), { sequence, ...val });
    return sequence;
  }

  apply({ entries, bytes, metadata }: Batch) {
    let start = 0;
    const take = (length: number) => bytes.subarray(start, (start += length));
    for (const { sequence, keyBytes, put } of entries) {
      const key = take(keyBytes);
      if (!put) this.#delete(sequence, key);
      else {
        const { valueBytes, expiresAtMs } = put;
        const kept = put.metadata === undefined ? [] : metadata[put.metadata]!;
        this.table.set(key, { sequence, value: take(valueBytes), metadata: kept, expiresAtMs });
      }
    }
  }

  #delete(sequence: bigint, key: Uint8Array) {
    if (this.table.delete(key)) this.#newestDelete = sequence;
  }
}

export interface Guest {
  name: string;
  version: string;
  /** Names of the request headers that it reads, in lower case. */
  headers?: string[];
  handle(request: Request): Response;
}

/** Runs a function, and returns what it returns or the response of the request that it rejects. */
function answering<T>(run: () => T, otherwise: (response: Response) => T): T {
  try {
    return run();
  } catch (error) {
    if (error instanceof Rejected) return otherwise(error.response);
    throw error;
  }
}

/** The exports of a guest. */
export function guest({ name, version, headers = [], handle }: Guest) {
  const store = new Store();
  return {
    lifecycle: {
      describe() {
        store.table.seed = crypto.getRandomValues(new Uint32Array(1))[0]!;
        return { name, version, headers, capabilities: [] };
      },
      apply: (batch: Batch) => store.apply(batch),
      // There is no housekeeping: never again.
      tick: () => setTimer(undefined),
      stats: () => ({ keys: BigInt(store.table.count), bytes: BigInt(store.table.bytes) }),
    },
    handler: {
      handle: (received: Received) => answering(() => handle(new Request(received, store)), (response) => response),
    },
    sharding: {
      route: (_method: string, target: string) =>
        answering<object>(() => ({ tag: 'key', val: keyOf(target.split('?')[0]!) }), () => ({ tag: 'any-shard' })),
      extractKeys: () => [],
      mergeResponses: (_request: Received, responses: Response[]) => responses[0],
    },
  };
}
