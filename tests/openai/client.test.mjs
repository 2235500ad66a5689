// Drives the OpenAI-compatible entry with the unmodified npm client. Needs BASE_URL, KEY and ACME_KEY in the environment;
// exits non-zero when anything differs from what the client's users may expect.

import assert from 'node:assert/strict';
import OpenAI from 'openai';

const { BASE_URL, KEY, ACME_KEY } = process.env;
const connect = (apiKey) => new OpenAI({ baseURL: BASE_URL, apiKey, maxRetries: 0 });
const client = connect(KEY);
const ask = (content, more = {}) => ({ model: 'small', messages: [{ role: 'user', content }], ...more });
const tools = [{ type: 'function', function: { name: 'weather', parameters: { type: 'object', properties: {} } } }];

const failure = async (promise) => {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  assert.fail('the request succeeded');
};

const tests = {
  async plain() {
    const answer = await client.chat.completions.create(ask('say hello', { temperature: 0.5 }));
    assert.equal(answer.choices[0].message.content, 'say hello');
    assert.equal(answer.choices[0].finish_reason, 'stop');
    assert.equal(answer.model, 'small');
    assert.deepEqual(answer.usage, { prompt_tokens: 10, completion_tokens: 2, total_tokens: 12 });
  },

  async streamed() {
    const stream = await client.chat.completions.create(
      ask('one two three', { stream: true, stream_options: { include_usage: true } }),
    );
    const [said, usages] = [[], []];
    for await (const chunk of stream) {
      said.push(chunk.choices[0]?.delta?.content ?? '');
      if (chunk.usage) usages.push(chunk.usage.total_tokens);
    }
    assert.equal(said.join(''), 'one two three');
    assert.deepEqual(said.filter(Boolean), ['one ', 'two ', 'three']);
    assert.deepEqual(usages, [13]);
  },

  async tools() {
    const answer = await client.chat.completions.create(ask('tools', { tools, tool_choice: 'auto' }));
    const { message, finish_reason } = answer.choices[0];
    assert.equal(finish_reason, 'tool_calls');
    assert.equal(message.content, null);
    assert.deepEqual(JSON.parse(message.tool_calls[0].function.arguments), { city: 'Ulm' });

    const stream = client.chat.completions.stream(ask('tools', { tools }));
    const final = await stream.finalChatCompletion();
    const [call] = final.choices[0].message.tool_calls;
    assert.deepEqual([call.id, call.function.name, call.function.arguments], ['call_1', 'weather', '{"city":"Ulm"}']);
  },

  async models() {
    const names = async (of) => (await of.models.list()).data.map((model) => model.id);
    assert.deepEqual(await names(client), ['busy', 'default', 'hasty', 'small']);
    assert.deepEqual(await names(connect(ACME_KEY)), ['busy', 'default', 'hasty', 'own', 'small']);
    assert.equal((await client.models.retrieve('small')).owned_by, 'default');
    assert.equal((await failure(client.models.retrieve('own'))).status, 404);
  },

  async embeddings() {
    for (const encoding_format of [undefined, 'float']) {
      const answer = await client.embeddings.create({ model: 'small', input: ['a', 'b'], encoding_format });
      assert.deepEqual(answer.data.map((item) => Array.from(item.embedding)), [[0, 0.5, -1], [0, 0.5, -1]]);
      assert.equal(answer.usage.total_tokens, 2);
    }
    const none = await failure(client.embeddings.create({ model: 'default', input: 'a' }));
    assert.deepEqual([none.status, none.code], [400, 'unsupported_model']);
  },

  async errors() {
    const create = (of, body) => failure(of.chat.completions.create(body));
    const key = await create(connect('wrong'), ask('hi'));
    assert.ok(key instanceof OpenAI.AuthenticationError && key.code === 'invalid_api_key', key);
    const model = await create(client, ask('hi', { model: 'nothing' }));
    assert.ok(model instanceof OpenAI.NotFoundError && model.code === 'model_not_found', model);
    const other = await create(client, ask('hi', { model: 'own' }));
    assert.equal(other.code, 'model_not_found', 'a model of another tenant');
    const several = await create(client, ask('hi', { n: 2 }));
    assert.ok(several instanceof OpenAI.BadRequestError && several.param === 'n', several);
    const refused = await create(client, ask('too long'));
    assert.ok(refused instanceof OpenAI.BadRequestError && refused.message.includes('context'), refused);
    const broken = await create(client, ask('broken'));
    assert.ok(broken instanceof OpenAI.InternalServerError && broken.status === 502, broken);
    for (const stream of [false, true]) {
      const busy = await create(client, ask('busy', { model: 'busy', stream }));
      assert.ok(busy instanceof OpenAI.RateLimitError, busy);
      assert.ok(Number(busy.headers.get('retry-after')) >= 1, busy);
    }
  },

  async 'time limit of the first token'() {
    for (const stream of [false, true]) {
      const late = await failure(client.chat.completions.create(ask('hang', { model: 'hasty', stream })));
      assert.deepEqual([late.status, late.code], [504, 'first_token_timeout']);
    }
  },

  async 'error in mid-stream'() {
    const stream = await client.chat.completions.create(ask('breaks', { stream: true }));
    const error = await failure((async () => { for await (const _ of stream); })());
    assert.ok(error instanceof OpenAI.APIError && error.code === 'broken_stream', error);
  },

  async 'cancel in mid-stream'() {
    const stream = await client.chat.completions.create(ask('slow', { stream: true }));
    for await (const chunk of stream) {
      if (chunk.choices[0].delta.content) break;
    }
    assert.ok(stream.controller.signal.aborted);
  },

  async 'cancel before the answer'() {
    const controller = new AbortController();
    const request = client.chat.completions.create(ask('hang'), { signal: controller.signal });
    setTimeout(() => controller.abort(), 300);
    assert.ok((await failure(request)) instanceof OpenAI.APIUserAbortError);
  },
};

for (const [name, test] of Object.entries(tests)) {
  await test().catch((error) => {
    console.error(`${name} failed`);
    throw error;
  });
  console.log(`${name}: ok`);
}
