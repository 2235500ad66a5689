// A TCP proxy that can cut its connections: how a network breaks.

import net from 'node:net';

export async function startProxy(port, host) {
  const pairs = new Set();
  const server = net.createServer((client) => {
    const upstream = net.connect(port, host);
    const pair = [client, upstream];
    pairs.add(pair);
    client.pipe(upstream).pipe(client);
    for (const socket of pair) {
      socket.setNoDelay(true);
      socket.on('error', () => {});
      socket.on('close', () => {
        pair.forEach((other) => other.destroy());
        pairs.delete(pair);
      });
    }
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  const address = server.address();
  return {
    port: address.port,
    /** Ends every connection without goodbye; returns how many there were. */
    cut() {
      const count = pairs.size;
      for (const pair of pairs) pair.forEach((socket) => socket.destroy());
      return count;
    },
    /** Refuses new connections until resume(). */
    pause: () => new Promise((resolve) => {
      server.close(resolve);
      for (const pair of pairs) pair.forEach((socket) => socket.destroy());
    }),
    resume: () => new Promise((resolve) => server.listen(address.port, '127.0.0.1', resolve)),
  };
}
