// Prints, logs, counts, fails, and probes what a guest does not have.
import { addToCounter, guest, line, log, requestId, setGauge } from '../../../guest/js/sdk/index.js';

export const { lifecycle, handler, sharding } = guest({
  name: 'probe-js',
  version: '0.1.0',
  handle({ key }) {
    console.log(`asked for ${key}`);
    log('warn', `warned of ${key}`);
    addToCounter('probes', [['key', key]], 2n);
    setGauge('last', [], 0.5);
    if (key === 'fail') throw new RangeError('nothing is found');
    return line(200, key === 'request-id' ? `${requestId()}` : `${new Headers({ a: 'b' }).get('a')}`);
  },
});
