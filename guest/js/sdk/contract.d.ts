// The part of the contract (`wit/store.wit`) that the SDK uses, as componentize-js passes it: numbers of 64 bits are `bigint`,
// a variant is `{ tag, val }`, an option is its value or `undefined`, and an error of a result is thrown as `{ payload }`.

declare module 'kvs:store/http@0.2.0' {
  export interface Header { name: string; value: Uint8Array }
  export interface Grant { scope: 'read' | 'write' | 'admin'; keyPrefix?: string }
  export interface Request {
    method: string; target: string; headers: Header[]; body: Uint8Array; principal?: string; grant: Grant; timeMs: bigint;
  }
  export interface Response { status: number; headers: Header[]; body: Uint8Array; readSequence?: bigint }
}

declare module 'kvs:store/transaction-log@0.2.0' {
  export interface Put { key: string; value: Uint8Array; metadata: [string, string][]; expiresAtMs?: bigint }
  export type Event = { tag: 'put'; val: Put } | { tag: 'delete'; val: string };
  export type AppendError = { tag: 'insufficient-storage' | 'unavailable' | 'read-only' | 'too-large' | 'invalid-key' };
  export function append(events: Event[]): bigint;
}

declare module 'kvs:store/response-cache@0.2.0' {
  export function reuse(keys: string[], untilMs?: bigint): void;
}

declare module 'kvs:store/request-context@0.2.0' {
  export function requestId(): string | undefined;
}

declare module 'kvs:store/logging@0.2.0' {
  export type Level = 'trace' | 'debug' | 'info' | 'warn' | 'error';
  export function log(level: Level, message: string): void;
}

declare module 'kvs:store/timer@0.2.0' {
  export function set(atMs?: bigint): void;
}

declare module 'kvs:store/metrics@0.2.0' {
  export function add(name: string, labels: [string, string][], by: bigint): void;
  export function set(name: string, labels: [string, string][], value: number): void;
}

declare module 'kvs:store/lifecycle@0.2.0' {
  export interface EntryPut { valueBytes: number; metadata?: number; expiresAtMs?: bigint }
  export interface Entry { sequence: bigint; timeMs: bigint; keyBytes: number; put?: EntryPut }
  export interface Batch { entries: Entry[]; bytes: Uint8Array; metadata: [string, string][][] }
}
