// Drives a node with the unmodified npm client, in both encodings. Needs ENDPOINT, API, API_KEY and the tokens in the
// environment; exits non-zero when anything differs from what the client's users may expect.

import assert from 'node:assert/strict';
import WebSocket from 'ws';
import { Centrifuge as JsonCentrifuge } from 'centrifuge';
import { Centrifuge as ProtobufCentrifuge } from 'centrifuge/build/protobuf';
import { startProxy } from './proxy.mjs';

const { ENDPOINT, API, API_KEY, TOKEN_ANN, TOKEN_BOB, TOKEN_EXPIRED, TOKEN_VIP } = process.env;
const DEADLINE_MS = 15_000;

const encodings = {
  json: { Client: JsonCentrifuge, encode: (value) => value, decode: (data) => data },
  protobuf: {
    Client: ProtobufCentrifuge,
    encode: (value) => new TextEncoder().encode(JSON.stringify(value)),
    decode: (data) => JSON.parse(new TextDecoder().decode(data)),
  },
};

/** Resolves with the context of the next `event` (that `fits`). */
function next(emitter, event, fits = () => true) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error(`no ${event} in time`)), DEADLINE_MS);
    const listen = (context) => {
      if (!fits(context)) return;
      clearTimeout(timer);
      emitter.off(event, listen);
      resolve(context);
    };
    emitter.on(event, listen);
  });
}

async function until(check, what) {
  const end = Date.now() + DEADLINE_MS;
  while (!check()) {
    assert.ok(Date.now() < end, `not in time: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

async function api(method, body) {
  const headers = { 'X-API-Key': API_KEY, 'Content-Type': 'application/json' };
  const response = await fetch(`${API}/${method}`, { method: 'POST', headers, body: JSON.stringify(body) });
  const answer = await response.json();
  assert.ok(answer.result, `${method}: ${JSON.stringify(answer)}`);
  return answer.result;
}

function open({ Client }, endpoint, options) {
  return new Client(endpoint, { websocket: WebSocket, minReconnectDelay: 20, maxReconnectDelay: 100, ...options });
}

async function connected(encoding, options, endpoint = ENDPOINT) {
  const client = open(encoding, endpoint, options);
  const opened = next(client, 'connected');
  client.connect();
  const context = await opened;
  return { client, id: context.client };
}

async function subscribed(client, channel, options) {
  const subscription = client.newSubscription(channel, options);
  const done = next(subscription, 'subscribed');
  subscription.subscribe();
  return { subscription, context: await done };
}

const tests = {
  async 'connect, ping and be counted'(encoding, name) {
    const { client } = await connected(encoding, { token: TOKEN_ANN });
    assert.equal(client.state, 'connected', name);
    // Pings come every second: a client that did not answer would be closed.
    await new Promise((resolve) => setTimeout(resolve, 2500));
    assert.equal(client.state, 'connected');
    client.disconnect();
  },

  async 'tokens: expired ones are renewed, bad ones end it'(encoding) {
    let asked = 0;
    const getToken = async () => {
      asked += 1;
      return TOKEN_ANN;
    };
    const { client } = await connected(encoding, { token: TOKEN_EXPIRED, getToken });
    assert.equal(asked, 1);
    client.disconnect();
    const refused = open(encoding, ENDPOINT, { token: 'x' });
    const ended = next(refused, 'disconnected');
    refused.connect();
    assert.equal((await ended).code, 3500);
  },

  async 'publish and receive'(encoding, name) {
    const channel = `news-${name}`;
    const { client: ann } = await connected(encoding, { token: TOKEN_ANN });
    const { client: bob } = await connected(encodings.json, { token: TOKEN_BOB });
    const { subscription } = await subscribed(ann, channel);
    const { subscription: other } = await subscribed(bob, channel);
    const heard = [next(subscription, 'publication'), next(other, 'publication')];
    await subscription.publish(encoding.encode({ text: 'hällo', n: 1.5 }));
    const [mine, theirs] = await Promise.all(heard);
    assert.deepEqual(encoding.decode(mine.data), { text: 'hällo', n: 1.5 });
    assert.deepEqual(theirs.data, { text: 'hällo', n: 1.5 });
    assert.equal(theirs.info.user, 'ann');
    assert.equal(mine.offset, 1);
    const fromServer = next(subscription, 'publication');
    await api('publish', { channel, data: { from: 'server' } });
    assert.deepEqual(encoding.decode((await fromServer).data), { from: 'server' });

    const ended = next(subscription, 'unsubscribed');
    subscription.unsubscribe();
    await ended;
    let more = 0;
    subscription.on('publication', () => { more += 1; });
    const last = next(other, 'publication');
    await ann.publish(channel, encoding.encode(3));
    await last;
    assert.equal(more, 0);
    ann.disconnect();
    bob.disconnect();
  },

  async 'what is not allowed says so'(encoding) {
    const { client } = await connected(encoding, { token: TOKEN_ANN });
    const { subscription } = await subscribed(client, 'chat:rules');
    await assert.rejects(subscription.publish(encoding.encode(1)), { code: 103 });
    const other = client.newSubscription('app:x#bob');
    const refused = next(other, 'unsubscribed');
    other.subscribe();
    assert.equal((await refused).code, 103);
    await assert.rejects(client.history('elsewhere', { limit: 1 }), { code: 103 });
    client.disconnect();
  },

  async 'presence, join and leave'(encoding, name) {
    const channel = `chat:presence-${name}`;
    const { client: ann, id } = await connected(encoding, { token: TOKEN_ANN });
    const { subscription } = await subscribed(ann, channel);
    const joined = next(subscription, 'join', (context) => context.info.user === 'bob');
    const { client: bob } = await connected(encoding, { token: TOKEN_BOB });
    const { subscription: other } = await subscribed(bob, channel);
    await joined;
    const presence = await subscription.presence();
    assert.equal(Object.keys(presence.clients).length, 2);
    assert.equal(presence.clients[id].user, 'ann');
    assert.deepEqual(await subscription.presenceStats(), { numClients: 2, numUsers: 2 });
    const left = next(subscription, 'leave', (context) => context.info.user === 'bob');
    other.unsubscribe();
    await left;
    assert.equal(Object.keys((await subscription.presence()).clients).length, 1);
    ann.disconnect();
    bob.disconnect();
  },

  async 'a private channel, and who one is there'(encoding) {
    const { client, id } = await connected(encoding, { token: TOKEN_ANN });
    const { subscription } = await subscribed(client, '$vip', { token: TOKEN_VIP });
    const { clients } = await subscription.presence();
    assert.deepEqual(encoding.decode(clients[id].chanInfo), { role: 'host' });
    client.disconnect();
  },

  async history(encoding, name) {
    const channel = `log-${name}`;
    const { client } = await connected(encoding, { token: TOKEN_ANN });
    const { subscription } = await subscribed(client, channel);
    for (let number = 1; number <= 5; number += 1) await subscription.publish(encoding.encode(number));
    const data = (page) => page.publications.map((publication) => encoding.decode(publication.data));
    const all = await subscription.history({ limit: -1 });
    assert.deepEqual([data(all), all.offset], [[1, 2, 3, 4, 5], 5]);
    const since = { offset: 2, epoch: all.epoch };
    assert.deepEqual(data(await subscription.history({ limit: 2, since })), [3, 4]);
    assert.deepEqual(data(await subscription.history({ limit: 2, reverse: true })), [5, 4]);
    assert.deepEqual(data(await subscription.history({ limit: 0 })), []);
    const other = { offset: 2, epoch: 'other' };
    await assert.rejects(subscription.history({ limit: 2, since: other }), { code: 112 });
    client.disconnect();
  },

  async rpc(encoding) {
    const { client } = await connected(encoding, { token: TOKEN_ANN });
    const answer = await client.rpc('echo', encoding.encode({ n: [1, 2] }));
    assert.deepEqual(encoding.decode(answer.data), { n: [1, 2] });
    await assert.rejects(client.rpc('echo', encoding.encode('fail')), { code: 418 });
    await assert.rejects(client.rpc('nobody', encoding.encode(1)), { code: 104 });
    await client.send(encoding.encode('into the void'));
    client.disconnect();
  },

  async 'a cut connection comes back and misses nothing'(encoding, name) {
    const url = new URL(ENDPOINT);
    const proxy = await startProxy(Number(url.port), url.hostname);
    const through = `ws://127.0.0.1:${proxy.port}${url.pathname}`;
    const channel = `chat:recovery-${name}`;
    const { client } = await connected(encoding, { token: TOKEN_ANN }, through);
    const { subscription, context } = await subscribed(client, channel);
    assert.ok(context.recoverable && context.positioned && !context.wasRecovering);
    const heard = [];
    subscription.on('publication', (publication) => heard.push(encoding.decode(publication.data)));
    let sent = 0;
    const publish = async (count) => {
      for (let i = 0; i < count; i += 1) await api('publish', { channel, data: (sent += 1) });
    };
    for (let round = 0; round < 3; round += 1) {
      await publish(3);
      await until(() => heard.length === sent, 'live publications');
      const lost = next(client, 'connecting');
      await proxy.pause();
      await lost;
      await publish(5);
      const back = next(subscription, 'subscribed');
      await proxy.resume();
      const recovered = await back;
      assert.ok(recovered.wasRecovering && recovered.recovered, JSON.stringify(recovered));
      await until(() => heard.length >= sent, 'recovered publications');
    }
    // And while publications keep coming.
    const publishing = publish(60);
    for (let cuts = 0; cuts < 3; cuts += 1) {
      const back = next(subscription, 'subscribed');
      assert.equal(proxy.cut(), 1);
      assert.ok((await back).recovered);
    }
    await publishing;
    await until(() => heard.length >= sent, 'all publications');
    assert.deepEqual(heard, Array.from({ length: sent }, (_, index) => index + 1));

    // More than the history holds was missed: the client is told.
    const lost = next(client, 'connecting');
    await proxy.pause();
    await lost;
    await publish(201);
    const back = next(subscription, 'subscribed');
    await proxy.resume();
    const after = await back;
    assert.deepEqual([after.wasRecovering, after.recovered], [true, false]);
    client.disconnect();
    await proxy.pause();
  },

  async 'the server ends a user'(encoding, name) {
    const { client } = await connected(encoding, { token: name === 'json' ? TOKEN_ANN : TOKEN_BOB });
    const ended = next(client, 'disconnected');
    await api('disconnect', { user: name === 'json' ? 'ann' : 'bob' });
    assert.equal((await ended).code, 3503);
  },
};

for (const [name, encoding] of Object.entries(encodings)) {
  for (const [title, test] of Object.entries(tests)) {
    try {
      await test(encoding, name);
      console.log(`ok   ${name}: ${title}`);
    } catch (error) {
      console.error(`FAIL ${name}: ${title}`);
      console.error(error);
      process.exit(1);
    }
  }
}
process.exit(0);
