// Tests a room over a connection to a fake server.
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { roomOf, type Room } from "../../src/chat/room";
import { Connection } from "../../src/connection";
import { fromBytes, num, object, str, toBytes, type Json, type JsonObject } from "../../src/json";
import { Session } from "../../src/session";
import { FakeServer } from "./server";

const CHANNEL = "chat:general";
const frame = (): Promise<unknown> => vi.advanceTimersByTimeAsync(100);
const texts = (room: Room): string[] => room.state.value.messages.map((m) => `${m.id}:${m.text}:${m.state}`);

let server: FakeServer;
let session: Session;
let calls: { method: string; request: JsonObject }[];
let answers: Record<string, (request: JsonObject) => Json>;
let offset: number;

beforeEach(async () => {
  vi.useFakeTimers();
  const kept = new Map<string, string>();
  vi.stubGlobal("localStorage", {
    getItem: (k: string) => kept.get(k) ?? null,
    setItem: (k: string, v: string) => kept.set(k, v),
    removeItem: (k: string) => kept.delete(k),
  });
  vi.stubGlobal("requestAnimationFrame", () => 0); // like a hidden window, where only the timer applies updates
  vi.stubGlobal("location", new URL("http://app.test/"));
  server = new FakeServer();
  calls = [];
  offset = 0;
  answers = {
    "chat.history": () => ({
      messages: [{ id: 1, user: "bob", name: "Bob", text: "hi", at: 1, state: "done" }],
      more: false,
    }),
    "chat.send": (request) => ({
      message: {
        id: 9,
        user: "ann",
        name: "Ann",
        text: str(request["text"]),
        at: 2,
        nonce: str(request["nonce"]),
        state: "done",
      },
    }),
  };
  server.rpc = (method, data) => {
    const request = object(fromBytes(data));
    calls.push({ method, request });
    const answer = answers[method];
    return answer ? { rpc: { data: toBytes(answer(request)) } } : { rpc: { data: toBytes({}) } };
  };
  server.other = (sent) =>
    sent.presence
      ? {
          presence: {
            presence: {
              c1: { user: "ann", client: "c1" },
              c2: { user: "bob", client: "c2", connInfo: toBytes({ name: "Bob" }) },
            },
          },
        }
      : {};
  const connection = new Connection({
    url: "ws://test/",
    token: () => Promise.resolve("t"),
    webSocket: server.webSocket,
    random: () => 0,
  });
  session = new Session(connection, { user: "ann", name: "Ann" }, "0123");
  connection.open();
  await vi.advanceTimersByTimeAsync(0);
});
afterEach(() => {
  vi.useRealTimers();
  vi.unstubAllGlobals();
});

const room = (): Room => roomOf(session, "general", CHANNEL);
const said = (event: Json, history = true): void => server.publish(CHANNEL, toBytes(event), history ? ++offset : 0);
const of = (method: string): JsonObject[] => calls.filter((one) => one.method === method).map(({ request }) => request);

async function opened(): Promise<Room> {
  const one = room();
  one.open();
  await frame();
  return one;
}

describe("a room", () => {
  it("loads history and presence, then follows the channel", async () => {
    const one = await opened();
    expect(texts(one)).toEqual(["1:hi:done"]);
    expect(one.people.value).toEqual([
      { user: "ann", name: "Ann" },
      { user: "bob", name: "Bob" },
    ]);
    said({ type: "message", message: { id: 2, user: "bob", name: "Bob", text: "more", at: 2, state: "done" } });
    server.socket.say({ push: { channel: CHANNEL, leave: { info: { user: "bob", client: "c2" } } } });
    await frame();
    expect(texts(one)).toEqual(["1:hi:done", "2:more:done"]);
    expect(one.people.value.map(({ user }) => user)).toEqual(["ann"]);
  });

  it("is kept while another room is shown, and recovers from its position", async () => {
    const one = room();
    const leave = one.open();
    await frame();
    said({ type: "message", message: { id: 2, user: "bob", text: "more", at: 2 } });
    leave();
    expect(texts(one)).toEqual(["1:hi:done", "2:more:done"]);
    server.subscribe = () => ({ subscribe: { epoch: "e", offset: 1, wasRecovering: true, recovered: true } });
    await opened();
    expect(room()).toBe(one);
    expect(server.socket.of("subscribe")[1]).toMatchObject({ recover: true, offset: 1, epoch: "e" });
    expect(of("chat.history")).toHaveLength(1);
  });

  it("reloads when the channel could not recover", async () => {
    const one = await opened();
    answers["chat.history"] = () => ({ messages: [{ id: 7, text: "later", user: "bob" }], more: true });
    server.socket.drop();
    await vi.advanceTimersByTimeAsync(2_000);
    expect(texts(one)).toEqual(["7:later:done"]);
  });

  it("says why it cannot be loaded, and recovers on retry", async () => {
    const whole = server.rpc;
    server.rpc = () => ({ error: { code: 103, message: "permission denied" } });
    const one = await opened();
    expect(one.problem.value).toBe("permission denied");
    server.rpc = whole;
    await one.load();
    expect([one.problem.value, texts(one)]).toEqual(["", ["1:hi:done"]]);
  });

  it("loads one page of older messages at a time", async () => {
    answers["chat.history"] = (request) =>
      request["before"] === undefined
        ? { messages: [{ id: 60, text: "b" }], more: true }
        : { messages: [{ id: 10, text: "a" }], more: false };
    const one = await opened();
    await Promise.all([one.loadOlder(), one.loadOlder()]);
    await one.loadOlder();
    expect(texts(one)).toEqual(["10:a:done", "60:b:done"]);
    expect(of("chat.history").map((request) => num(request["before"]))).toEqual([0, 60]);
  });
});

describe("sending", () => {
  it("shows the message immediately, then as the server stored it", async () => {
    const one = await opened();
    one.send("hello");
    expect(texts(one)).toEqual(["1:hi:done", "0:hello:sending"]);
    await frame();
    expect(texts(one)).toEqual(["1:hi:done", "9:hello:done"]);
  });

  it("keeps the order of messages sent in quick succession", async () => {
    const one = await opened();
    let id = 20;
    answers["chat.send"] = (request) => ({
      message: { id: ++id, user: "ann", text: str(request["text"]), nonce: str(request["nonce"]) },
    });

    const whole = server.rpc;
    let waiting = 0;
    server.rpc = (method, data) => {
      expect(waiting++).toBe(0);
      queueMicrotask(() => waiting--);
      return whole(method, data);
    };

    for (const text of ["a", "b", "c"]) one.send(text);
    expect(texts(one).slice(1)).toEqual(["0:a:sending", "0:b:sending", "0:c:sending"]);
    await frame();
    expect(texts(one).slice(1)).toEqual(["21:a:done", "22:b:done", "23:c:done"]);
  });

  it("holds messages while offline and sends each once, in order, after the reconnect", async () => {
    const one = await opened();
    let id = 20;
    answers["chat.send"] = (request) => ({
      message: { id: ++id, user: "ann", text: str(request["text"]), nonce: str(request["nonce"]) },
    });

    server.socket.drop();
    for (const text of ["a", "b", "c"]) one.send(text);
    await vi.advanceTimersByTimeAsync(0);
    expect(texts(one).slice(1)).toEqual(["0:a:waiting", "0:b:waiting", "0:c:waiting"]);

    one.discard(one.state.value.messages[2]!);
    await vi.advanceTimersByTimeAsync(2_000);
    expect(texts(one).slice(1)).toEqual(["21:a:done", "22:c:done"]);
    expect(of("chat.send").map((request) => request["text"])).toEqual(["a", "c"]);

    server.socket.drop();
    await vi.advanceTimersByTimeAsync(2_000);
    expect(of("chat.send")).toHaveLength(2);
  });

  it("resends a message with the same nonce after a lost connection, unless the room has it", async () => {
    const one = await opened();
    const whole = server.rpc;
    const lost: JsonObject[] = [];
    server.rpc = (method, data) => {
      if (method !== "chat.send") return whole(method, data);
      lost.push(object(fromBytes(data)));
      return undefined; // no reply
    };

    one.send("a");
    one.send("b");
    await vi.advanceTimersByTimeAsync(0);

    server.socket.drop();
    await vi.advanceTimersByTimeAsync(0);
    expect(texts(one).slice(1)).toEqual(["0:a:waiting", "0:b:waiting"]);
    expect(lost).toHaveLength(1);

    server.rpc = whole;
    await vi.advanceTimersByTimeAsync(2_000);
    expect(of("chat.send").map(({ text, nonce }) => [text, nonce === lost[0]?.["nonce"]])).toEqual([
      ["a", true],
      ["b", false],
    ]);
  });

  it("shows why a message was refused, and retries it only on request with the same nonce", async () => {
    const one = await opened();
    const whole = server.rpc;
    server.rpc = () => ({ error: { code: 108, message: "too many" } });
    one.send("hello");
    await frame();
    const failed = one.state.value.messages[1];
    expect([failed?.state, failed?.error]).toEqual(["failed", "too many"]);

    server.rpc = whole;
    server.socket.drop();
    await vi.advanceTimersByTimeAsync(2_000);
    expect(of("chat.send")).toEqual([]);

    one.retry(failed!);
    await frame();
    expect(texts(one)).toEqual(["1:hi:done", "9:hello:done"]);
    expect(of("chat.send")).toMatchObject([{ text: "hello", nonce: failed?.nonce }]);
  });

  it("reports typing, but not for every key", async () => {
    const one = await opened();
    one.isTyping();
    one.isTyping();
    await vi.advanceTimersByTimeAsync(3_000);
    one.isTyping();
    await frame();
    expect(of("chat.typing")).toHaveLength(2);
  });

  it("keeps a draft", () => {
    room().draft = "half a th";
    expect(room().draft).toBe("half a th");
    room().draft = "";
    expect(localStorage.getItem("beamline.draft:ann:general")).toBeNull();
  });
});

describe("an answer", () => {
  const start = { type: "message", message: { id: 2, user: "assistant", text: "", at: 2, state: "streaming" } };

  it("streams, with several deltas in one update", async () => {
    const one = await opened();
    let changes = -1;
    one.state.subscribe(() => changes++);
    said(start);
    for (const [i, text] of ["All ", "is ", "well"].entries())
      said({ type: "delta", id: 2, seq: i + 1, attempt: 1, text });
    await frame();
    expect([texts(one)[1], changes]).toEqual(["2:All is well:streaming", 1]);
    one.stop(one.state.value.messages[1]!);
    await frame();
    expect(of("chat.stop")).toEqual([{ message: 2 }]);
  });

  it("is reloaded when a delta is missing, at most once a second", async () => {
    const one = await opened();
    await vi.advanceTimersByTimeAsync(2_000);
    said(start);
    said({ type: "delta", id: 2, seq: 3, attempt: 1, text: "c" });
    answers["chat.history"] = () => ({
      messages: [{ id: 2, user: "assistant", text: "abc", state: "streaming", seq: 3, attempt: 1 }],
      more: false,
    });
    await frame();
    await frame();

    said({ type: "delta", id: 2, seq: 4, attempt: 1, text: "d" });
    await frame();
    expect(texts(one)).toEqual(["1:hi:done", "2:abcd:streaming"]);

    for (let i = 0; i < 5; i++) {
      said({ type: "delta", id: 2, seq: 10 + 2 * i, attempt: 1, text: "x" });
      await frame();
    }
    expect(of("chat.history")).toHaveLength(2);
    await vi.advanceTimersByTimeAsync(1_000);
    expect(of("chat.history")).toHaveLength(3);
  });
});

it("typing of other users shows for a while", async () => {
  const one = await opened();
  said({ type: "typing", user: "bob", name: "Bob" }, false);
  said({ type: "typing", user: "ann", name: "Ann" }, false);
  expect(one.typing.value.map(({ name }) => name)).toEqual(["Bob"]);
  await vi.advanceTimersByTimeAsync(6_000);
  expect(one.typing.value).toEqual([]);
});
