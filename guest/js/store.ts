// A store in TypeScript: the paths, methods and headers of the default guest, without conditions, lists, transactions and times
// to live; it honours those that another guest has set.
import { empty, etag, guest, header, line } from './sdk/index.js';

/** A content type that a response can carry; curl's is what curl sends when its user named none. */
const isUseful = (type: string) => /^[ -~]{1,256}$/.test(type) && !/^application\/x-www-form-urlencoded/i.test(type);

export const { lifecycle, handler, sharding } = guest({
  name: 'js',
  version: '0.2.0',
  headers: ['content-type', 'content-range', 'content-encoding'],
  handle(request) {
    if (request.query) return line(400, 'this store takes no query parameters');
    const { item, readSequence } = request.read();
    switch (request.method) {
      case 'PUT': {
        // A part would replace the whole (RFC 9110, section 14.5).
        if (request.headers('content-range').length) return line(400, 'content-range: send the whole value');
        if (request.headers('content-encoding').length) return line(415, 'content-encoding would not be kept');
        const [type] = request.headers('content-type').filter(isUseful);
        const sequence = request.put(request.body, type ? [['content-type', type]] : []);
        return empty(201, sequence, [etag(sequence)]);
      }
      case 'DELETE':
        return empty(200, item ? request.delete() : readSequence);
      case 'GET':
      case 'HEAD': {
        request.reusable(item);
        if (!item) return line(404, 'no such key', readSequence);
        const kept = item.metadata.find(([name, type]) => name === 'content-type' && isUseful(type));
        const type = header('content-type', kept?.[1] ?? 'application/octet-stream');
        return { status: 200, headers: [type, etag(item.sequence), header('content-security-policy', 'sandbox')], body: item.value, readSequence };
      }
    }
    return line(405, 'a key has GET, HEAD, PUT and DELETE', 0n, [header('allow', 'GET, HEAD, PUT, DELETE')]);
  },
});
