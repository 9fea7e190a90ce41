// Keys and values in typed arrays. The engine limits its heap of objects to 32 MiB, which 100,000 keys in a `Map` fill; the
// contents of typed arrays are outside of it, and the garbage collector never looks at them.

export interface Item { sequence: bigint; value: Uint8Array; metadata: [string, string][]; expiresAtMs?: bigint }

/** Record: sequence, expiry (0 is none), then the lengths of key, value and metadata, then these. */
const HEAD = 28;
/** Places are in units of this many bytes. */
const UNIT = 16;
const CHUNK_UNITS = 1 << 16;
/** A larger record has a chunk of its own. */
const SMALL_UNITS = CHUNK_UNITS >> 4;
/** Indexes, by the hash of the key. Each grows by itself: to grow one for all keys would take longer than a call may. */
const INDEXES = 1024;

/** Rounds up to one of four sizes for each power of two, so that freed places fit other records. */
function sizeClass(units: number): number {
  const shift = 29 - Math.clz32(units - 1);
  const step = shift > 0 ? 1 << shift : 1;
  return Math.ceil(units / step) * step;
}

interface Chunk { bytes: Uint8Array; view: DataView }

function chunk(units: number): Chunk {
  const buffer = new ArrayBuffer(units * UNIT);
  return { bytes: new Uint8Array(buffer), view: new DataView(buffer) };
}

/** Memory for records. A place is the number of a chunk and a unit in it. */
class Arena {
  readonly #chunks: (Chunk | undefined)[] = [chunk(CHUNK_UNITS)];
  readonly #unused: number[] = [];
  readonly #free = new Map<number, number[]>();
  /** Place 0 is none. */
  #next = 1;

  at(place: number): Chunk {
    return this.#chunks[place >>> 16]!;
  }

  allocate(bytes: number): number {
    const units = sizeClass(Math.ceil(bytes / UNIT));
    if (units > SMALL_UNITS) return this.#add(Math.ceil(bytes / UNIT));
    const free = this.#free.get(units)?.pop();
    if (free !== undefined) return free;
    if ((this.#next & (CHUNK_UNITS - 1)) + units > CHUNK_UNITS || this.#next === 0) this.#next = this.#add(CHUNK_UNITS);
    const place = this.#next;
    // At the end of a chunk the next place would be in another; 0 is for none.
    this.#next = (place & (CHUNK_UNITS - 1)) + units === CHUNK_UNITS ? 0 : place + units;
    return place;
  }

  release(place: number, bytes: number) {
    const units = sizeClass(Math.ceil(bytes / UNIT));
    if (units > SMALL_UNITS) {
      this.#chunks[place >>> 16] = undefined;
      this.#unused.push(place >>> 16);
    } else {
      const free = this.#free.get(units);
      if (free) free.push(place);
      else this.#free.set(units, [place]);
    }
  }

  #add(units: number): number {
    const number = this.#unused.pop() ?? this.#chunks.length;
    this.#chunks[number] = chunk(units);
    return number * CHUNK_UNITS;
  }
}

/** Open addressing with linear probing: hash and place of each key. */
class Index {
  hashes = new Uint32Array(8);
  places = new Uint32Array(8);
  count = 0;

  /** Slot of the key that `isKey` recognizes, or of the first that is empty. */
  find(hash: number, isKey: (place: number) => boolean): number {
    const mask = this.places.length - 1;
    let slot = hash & mask;
    while (this.places[slot] && !(this.hashes[slot] === hash && isKey(this.places[slot]!))) slot = (slot + 1) & mask;
    return slot;
  }

  insert(slot: number, hash: number, place: number) {
    this.hashes[slot] = hash;
    this.places[slot] = place;
    if (++this.count * 4 < this.places.length * 3) return;
    const { hashes, places } = this;
    this.hashes = new Uint32Array(places.length * 2);
    this.places = new Uint32Array(places.length * 2);
    places.forEach((place, old) => {
      if (!place) return;
      const slot = this.find(hashes[old]!, () => false);
      this.hashes[slot] = hashes[old]!;
      this.places[slot] = place;
    });
  }

  /** Moves what follows up, so that no search ends too early. */
  remove(slot: number) {
    const { hashes, places } = this;
    const mask = places.length - 1;
    this.count--;
    for (let next = (slot + 1) & mask; places[next]; next = (next + 1) & mask) {
      const home = hashes[next]! & mask;
      if (((next - home) & mask) < ((next - slot) & mask)) continue;
      hashes[slot] = hashes[next]!;
      places[slot] = places[next]!;
      slot = next;
    }
    places[slot] = 0;
  }
}

const encoder = new TextEncoder();
const decoder = new TextDecoder();

export class Table {
  count = 0;
  /** Of keys and values. */
  bytes = 0;
  /** Set while it is empty: without one, clients could choose keys that collide. */
  seed = 0;
  readonly #arena = new Arena();
  readonly #indexes: Index[] = Array.from({ length: INDEXES }, () => new Index());

  get(key: Uint8Array): Item | undefined {
    const { index, slot } = this.#find(key);
    const place = index.places[slot]!;
    if (!place) return undefined;
    const { bytes, view } = this.#arena.at(place);
    const at = (place & (CHUNK_UNITS - 1)) * UNIT;
    const value = at + HEAD + view.getUint32(at + 16);
    const metadata = value + view.getUint32(at + 20);
    const text = bytes.subarray(metadata, metadata + view.getUint32(at + 24));
    return {
      sequence: view.getBigUint64(at), expiresAtMs: view.getBigUint64(at + 8) || undefined,
      value: bytes.slice(value, metadata), metadata: text.length ? JSON.parse(decoder.decode(text)) : [],
    };
  }

  set(key: Uint8Array, { sequence, value, metadata, expiresAtMs }: Item) {
    this.delete(key);
    const text = metadata.length ? encoder.encode(JSON.stringify(metadata)) : new Uint8Array();
    const place = this.#arena.allocate(HEAD + key.length + value.length + text.length);
    const { bytes, view } = this.#arena.at(place);
    const at = (place & (CHUNK_UNITS - 1)) * UNIT;
    view.setBigUint64(at, sequence);
    view.setBigUint64(at + 8, expiresAtMs === undefined ? 0n : expiresAtMs || 1n);
    view.setUint32(at + 16, key.length);
    view.setUint32(at + 20, value.length);
    view.setUint32(at + 24, text.length);
    bytes.set(key, at + HEAD);
    bytes.set(value, at + HEAD + key.length);
    bytes.set(text, at + HEAD + key.length + value.length);
    const { index, slot, hash } = this.#find(key);
    index.insert(slot, hash, place);
    this.count++;
    this.bytes += key.length + value.length;
  }

  /** False when the key is not there. */
  delete(key: Uint8Array): boolean {
    const { index, slot } = this.#find(key);
    const place = index.places[slot]!;
    if (!place) return false;
    const { view } = this.#arena.at(place);
    const at = (place & (CHUNK_UNITS - 1)) * UNIT;
    const stored = key.length + view.getUint32(at + 20);
    index.remove(slot);
    this.#arena.release(place, HEAD + stored + view.getUint32(at + 24));
    this.count--;
    this.bytes -= stored;
    return true;
  }

  #find(key: Uint8Array): { index: Index; slot: number; hash: number } {
    let hash = this.seed;
    for (let at = 0; at < key.length; at++) {
      hash = Math.imul(hash ^ key[at]!, 0x9e3779b1);
      hash ^= hash >>> 15;
    }
    hash >>>= 0;
    // Slots come from the low bits.
    const index = this.#indexes[hash >>> 22]!;
    return { index, hash, slot: index.find(hash, (place) => this.#isKey(place, key)) };
  }

  #isKey(place: number, key: Uint8Array): boolean {
    const { bytes, view } = this.#arena.at(place);
    const at = (place & (CHUNK_UNITS - 1)) * UNIT;
    if (view.getUint32(at + 16) !== key.length) return false;
    for (let i = 0; i < key.length; i++) if (bytes[at + HEAD + i] !== key[i]) return false;
    return true;
  }
}
