// Prints, fails, and probes what a guest does not have.
import { guest, line } from '../../../guest/js/sdk/index.js';

export const { lifecycle, handler, sharding } = guest({
  name: 'probe-js',
  version: '0.1.0',
  handle({ key }) {
    console.log(`asked for ${key}`);
    if (key === 'fail') throw new RangeError('nothing is found');
    return line(200, `${new Headers({ a: 'b' }).get('a')}`);
  },
});
