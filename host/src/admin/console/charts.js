// Charts of /metrics: what was counted between two polls, over the last minutes.

import { byId, bytes, element } from './server.js';

/** Samples of a chart. */
const SAMPLES = 150;
/** Most lines of a chart. */
const LINES = 6;
const WIDTH = 300;
const HEIGHT = 80;

const rate = (value) => (value >= 100 ? value.toFixed(0) : value.toFixed(1)) + '/s';
const count = (value) => (value >= 100 ? value.toFixed(0) : String(Number(value.toFixed(1))));
const time = (seconds) => (seconds >= 1 ? `${seconds.toFixed(2)} s` : `${Number((seconds * 1_000).toPrecision(3))} ms`);

/** Each chart: its title, how a value is written, and its lines by name, out of a poll and the one before. */
const CHARTS = [
  // By class: single statuses are many, and errors must not be left out.
  ['Requests by status', rate, (now, before) => rates(now, before, 'kvs_http_requests_total', ({ status }) => `${status[0]}xx`)],
  ['Latency of requests', time, (now, before) => quantiles(now, before, 'kvs_http_request_duration_seconds')],
  ['fsync', time, (now, before) => quantiles(now, before, 'kvs_txlog_fsync_duration_seconds')],
  ['Commit of a batch', time, (now, before) => quantiles(now, before, 'kvs_txlog_commit_duration_seconds')],
  ['Entries of a batch', count, (now, before) => quantiles(now, before, 'kvs_txlog_batch_entries')],
  ['Transaction log', bytes, (now) => values(now, { size: 'kvs_txlog_bytes', garbage: 'kvs_txlog_garbage_bytes' })],
  ['Memory of the guest', bytes, (now) => now.shards],
  ['Response cache', rate, (now, before) => ({
    ...rates(now, before, 'kvs_response_cache_hits_total', () => 'hits'),
    ...rates(now, before, 'kvs_response_cache_misses_total', () => 'misses'),
  })],
  ['Watches and connections', count, (now) => values(now, { watches: 'kvs_watches', connections: 'kvs_connections' })],
  ['Replication lag, entries', count, (now) => values(now, { entries: 'kvs_txlog_replication_lag_entries' })],
];

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** Samples of the text format of Prometheus, by name. */
export function parse(text) {
  const metrics = new Map();
  for (const line of text.split('\n')) {
    const [, name, labels = '', value] = line.match(LINE) ?? [];
    if (name === undefined) continue;
    const sample = { labels: {}, value: Number(value) };
    for (const [, label, content] of labels.matchAll(LABEL)) sample.labels[label] = content;
    if (!metrics.has(name)) metrics.set(name, []);
    metrics.get(name).push(sample);
  }
  return metrics;
}

function values(now, names) {
  const found = Object.entries(names).filter(([, name]) => now.metrics.has(name));
  return Object.fromEntries(found.map(([line, name]) => [line, sum(now.metrics.get(name))]));
}

const sum = (samples) => samples.reduce((total, sample) => total + sample.value, 0);

/** Sums of samples by the line that a function makes of their labels. */
function totals(poll, name, lineOf) {
  const by = new Map();
  for (const { labels, value } of poll.metrics.get(name) ?? []) {
    const line = lineOf(labels);
    by.set(line, (by.get(line) ?? 0) + value);
  }
  return by;
}

/** What was added in a second. Nothing where a counter began again: the server was restarted. */
function rates(now, before, name, lineOf) {
  if (!before) return {};
  const earlier = totals(before, name, lineOf);
  const lines = {};
  for (const [line, value] of totals(now, name, lineOf)) {
    const added = value - (earlier.get(line) ?? 0);
    if (added >= 0) lines[line] = added / now.seconds;
  }
  return lines;
}

function quantiles(now, before, name) {
  if (!before) return {};
  const earlier = totals(before, `${name}_bucket`, ({ le }) => le);
  const buckets = [...totals(now, `${name}_bucket`, ({ le }) => le)]
    .map(([bound, value]) => [bound === '+Inf' ? Infinity : Number(bound), value - (earlier.get(bound) ?? 0)])
    .sort(([one], [other]) => one - other);
  const all = buckets.at(-1)?.[1] ?? 0;
  if (all <= 0 || buckets.some(([, added]) => added < 0)) return {};
  return { p50: quantile(buckets, all / 2), p99: quantile(buckets, all * 0.99) };
}

/** As Prometheus does: values are taken to be spread evenly within a bucket. */
function quantile(buckets, rank) {
  let [lower, below] = [0, 0];
  for (const [upper, upTo] of buckets) {
    if (upTo >= rank) return upper === Infinity ? lower : lower + ((upper - lower) * (rank - below)) / (upTo - below);
    [lower, below] = [upper, upTo];
  }
  return lower;
}

const history = CHARTS.map(() => []);
let before = null;

/** Takes in a poll: the text of /metrics, and the memory of each shard as GET /guest has it. */
export function add(text, shards) {
  const at = performance.now();
  const memory = Object.fromEntries(shards.map((shard, number) => [`shard ${number + 1}`, shard.memory_bytes]));
  const now = { metrics: parse(text), shards: memory, at, seconds: before ? (at - before.at) / 1_000 : 1 };
  for (const [index, [, , lines]] of CHARTS.entries()) {
    push(history[index], lines(now, before));
  }
  before = now;
  draw();
}

/** The names of the lines of a chart, and samples of these. The lines that reach most are drawn, and the largest value of the others. */
function drawn(samples) {
  const names = [...new Set(samples.flatMap(Object.keys))].sort((one, other) => one.localeCompare(other, 'en', { numeric: true }));
  if (names.length <= LINES) return [names, samples];
  const most = new Map(names.map((name) => [name, Math.max(...samples.map((sample) => sample[name] ?? 0))]));
  const largest = new Set(names.toSorted((one, other) => most.get(other) - most.get(one)).slice(0, LINES - 1));
  const shown = names.filter((name) => largest.has(name));
  const others = names.filter((name) => !largest.has(name));
  const rest = `${others.length} others, at most`;
  const reduced = samples.map((sample) => {
    const lines = [...shown, ...others].filter((name) => name in sample).map((name) => [largest.has(name) ? name : rest, sample[name]]);
    // Of several with one name the last is kept.
    return Object.fromEntries(lines.sort(([, one], [, other]) => one - other));
  });
  return [[...shown, rest], reduced];
}

/** Marks a time without a response. */
export function gap() {
  before = null;
  history.forEach((samples) => push(samples, {}));
}

function push(samples, sample) {
  samples.push(sample);
  if (samples.length > SAMPLES) samples.shift();
}

function draw() {
  const figures = byId('figures');
  for (const [index, [title, write]] of CHARTS.entries()) {
    const [names, samples] = drawn(history[index]);
    const figure = figures.children[index] ?? figures.appendChild(empty(title));
    figure.hidden = names.length === 0;
    const most = Math.max(...samples.flatMap(Object.values), Number.MIN_VALUE);
    const svg = figure.querySelector('svg');
    svg.replaceChildren(...names.flatMap((name, line) => lines(samples, name, most, line)));
    const latest = names.map((name) => `${name}: ${name in samples.at(-1) ? write(samples.at(-1)[name]) : 'none'}`);
    svg.setAttribute('aria-label', `${title}, at most ${write(most)}. Now ${latest.join(', ')}`);
    figure.querySelector('ul').replaceChildren(
      ...latest.map((text, line) => element('li', { className: `series-${line}` }, text)),
    );
  }
}

function empty(title) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  svg.setAttribute('viewBox', `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute('preserveAspectRatio', 'none');
  svg.setAttribute('role', 'img');
  return element('figure', {}, element('figcaption', {}, title), svg, element('ul'));
}

/** A line, in as many pieces as its gaps make. */
function lines(samples, name, most, line) {
  const pieces = [[]];
  for (const [index, sample] of samples.entries()) {
    if (!(name in sample)) {
      pieces.push([]);
      continue;
    }
    const x = WIDTH - ((samples.length - 1 - index) * WIDTH) / (SAMPLES - 1);
    const y = HEIGHT - 2 - (sample[name] / most) * (HEIGHT - 4);
    pieces.at(-1).push(`${x.toFixed(1)},${y.toFixed(1)}`);
  }
  return pieces.filter((points) => points.length > 0).map((points) => {
    const polyline = document.createElementNS('http://www.w3.org/2000/svg', 'polyline');
    polyline.setAttribute('points', points.join(' '));
    polyline.setAttribute('class', `series-${line}`);
    return polyline;
  });
}
