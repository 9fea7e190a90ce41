// Requests to the admin listener, and what all parts of the page share.

/** Longest wait for a response that is a matter of a moment. */
const TIMEOUT_MS = 10_000;

let token = null;
let askForToken = () => {};

/** Sets what is called when the server asks for a token, with the reason. */
export function onSignIn(callback) {
  askForToken = callback;
}

export function setToken(value) {
  token = value;
}

export function hasToken() {
  return token !== null;
}

/** A response that is an error; `message` is the line that the server gave as the reason. */
export class Refused extends Error {
  constructor({ status, headers }, reason) {
    super(`${reason} (${status})`);
    this.status = status;
    this.allow = headers.get('allow');
  }
}

/** Sends a request. Throws Refused for 4xx and 5xx, and TypeError or DOMException without a response. */
export async function request(method, path, { headers = {}, body, signal = AbortSignal.timeout(TIMEOUT_MS) } = {}) {
  const authorization = token === null ? {} : { authorization: `Bearer ${token}` };
  const response = await fetch(path, { method, body, signal, cache: 'no-store', headers: { ...headers, ...authorization } });
  if (response.ok) return response;
  const reason = (await response.text()).trim().slice(0, 2_000) || response.statusText;
  if (response.status === 401) askForToken(token === null ? '' : reason);
  throw new Refused(response, reason);
}

/** The reason of a failure, for people. */
export function reason(error) {
  if (error instanceof Refused) return error.message;
  if (error.name === 'TimeoutError') return 'no response in time';
  return error instanceof TypeError ? 'no connection to the server' : String(error.message ?? error);
}

export const byId = (id) => document.getElementById(id);

/** An element with text or children. Nothing here is ever parsed as HTML. */
export function element(name, { className, ...properties } = {}, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  Object.assign(made, properties);
  made.append(...children);
  return made;
}

/** Text of anybody's, isolated, with characters that cannot be seen or that reorder others written out. */
export function visible(text) {
  const shown = element('bdi');
  for (const [index, part] of text.split(/([\p{Cc}\p{Cf}\p{Cn}\p{Co}\p{Cs}\u2028\u2029])/u).entries()) {
    if (index % 2 === 0) shown.append(part);
    else shown.append(element('span', { className: 'escape' }, `\\u{${part.codePointAt(0).toString(16)}}`));
  }
  return shown;
}

/** Shows a message. */
export function say(id, message, kind = '') {
  const place = byId(id);
  place.className = kind;
  place.textContent = message;
}

/** Replaces a list of terms and descriptions, unless it is the same. */
export function facts(id, entries) {
  const shown = entries.filter(([, value]) => value !== null && value !== undefined && value !== '');
  const state = JSON.stringify(shown);
  const place = byId(id);
  if (place.state === state) return;
  place.state = state;
  place.replaceChildren(...shown.flatMap(([term, value]) => [
    element('dt', {}, term),
    element('dd', {}, visible(String(value))),
  ]));
}

/** Asks a question with two answers. */
export function confirmed(question, yes) {
  const dialog = byId('question');
  byId('question-text').replaceChildren(question);
  byId('question-yes').textContent = yes;
  return new Promise((resolve) => {
    byId('question-yes').onclick = () => {
      resolve(true);
      dialog.close();
    };
    byId('question-no').onclick = () => dialog.close();
    // The event comes later than the call: it can be that of the former question.
    dialog.onclose = () => dialog.open || resolve(false);
    dialog.showModal();
    byId('question-no').focus();
  });
}

/** Offers bytes as a file. */
export function download(content, name) {
  const url = URL.createObjectURL(content);
  element('a', { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

export function bytes(count) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let unit = 0;
  let value = count;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? value : value.toFixed(1)} ${units[unit]}`;
}
