// Tests a session over a connection to a fake server, with stubs for the browser's globals.
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { back, forward, type Back, type Delta, type Forward } from "../../src/codec/app";
import type { Partially } from "../../src/codec/proto";
import { Connection } from "../../src/connection";
import { Session, sessionId } from "../../src/session";
import { FakeServer } from "./server";

const CHANNEL = "app:0123#ann";
const settle = (): Promise<unknown> => vi.advanceTimersByTimeAsync(0);

let server: FakeServer;
let said: Back[];
let offset: number;
let popstate: (() => void) | undefined;

beforeEach(() => {
  vi.useFakeTimers();
  const place = new URL("http://app.test/chat?room=general");
  vi.stubGlobal("location", place);
  vi.stubGlobal("history", {
    pushState: (_state: unknown, _title: string, url: URL) => {
      place.href = url.href;
    },
  });
  vi.stubGlobal("window", {
    addEventListener: (name: string, listener: () => void) => {
      if (name === "popstate") popstate = listener;
    },
  });
  vi.stubGlobal("document", { title: "" });
  const kept = new Map<string, string>();
  vi.stubGlobal("sessionStorage", {
    getItem: (key: string) => kept.get(key) ?? null,
    setItem: (key: string, value: string) => kept.set(key, value),
  });
  server = new FakeServer();
  said = [];
  offset = 0;
  server.rpc = (method, data) => {
    if (method === "app.event") said.push(back.decode(data));
    return { rpc: {} };
  };
});
afterEach(() => {
  vi.useRealTimers();
  vi.unstubAllGlobals();
});

async function started(): Promise<Session> {
  const connection = new Connection({
    url: "ws://test/",
    token: () => Promise.resolve("t"),
    webSocket: server.webSocket,
    random: () => 0,
  });
  const session = new Session(connection, { user: "ann", name: "Ann" }, "0123");
  session.start();
  connection.open();
  await settle();
  return session;
}

function forwards(message: Partially<Forward>): void {
  server.publish(CHANNEL, forward.encode({ version: 1, run: 1, ...message }), ++offset);
}
const deltas = (...delta: Partially<Delta>[]): void => forwards({ deltas: { delta } });
const tree = (): void =>
  deltas({ reset: { title: "Chat", children: [{ id: 1, kind: "text", props: [{ name: "text", text: "hi" }] }] } });

describe("start", () => {
  it("subscribes to its own channel before it asks for the tree", async () => {
    const session = await started();
    expect(server.socket.commands.map((c) => c.subscribe?.channel ?? c.rpc?.method ?? "connect")).toEqual([
      "connect",
      CHANNEL,
      "app.event",
    ]);
    expect(said).toMatchObject([
      { version: 1, session: "0123", rerun: { path: "/chat", query: "room=general", reset: true } },
    ]);
    expect([session.busy.value, session.store.ready.value]).toEqual([true, false]);
    tree();
    forwards({ runFinished: {} });
    expect([session.busy.value, session.store.ready.value, document.title]).toEqual([false, true, "Chat"]);
  });

  it("ignores deltas of a tree that it does not have yet", async () => {
    const session = await started();
    deltas({ update: { id: 1, set: [{ name: "text", text: "x" }] } });
    expect(said).toHaveLength(1);
    tree();
    expect(session.store.get(1)?.props.value).toEqual({ text: "hi" });
  });

  it("shows a refused channel as a failure", async () => {
    server.subscribe = () => ({ error: { code: 103, message: "permission denied" } });
    const session = await started();
    expect(session.failure.value?.message).toContain("permission denied");
  });
});

describe("reconnect", () => {
  const reconnect = async (recovered: boolean, missed: Partially<Forward>[] = []): Promise<void> => {
    const publications = missed.map((message) => ({
      data: forward.encode({ version: 1, run: 1, ...message }),
      offset: ++offset,
    }));
    server.subscribe = () => ({ subscribe: { epoch: "e", offset, wasRecovering: true, recovered, publications } });
    said.length = 0;
    server.socket.drop();
    await vi.advanceTimersByTimeAsync(1_000);
  };

  it("keeps the tree when the channel recovered", async () => {
    const session = await started();
    tree();
    await reconnect(true, [{ deltas: { delta: [{ appendText: { id: 1, prop: "text", text: " there" } }] } }]);
    expect(said).toMatchObject([{ rerun: { reset: false } }]);
    expect(session.store.get(1)?.props.value).toEqual({ text: "hi there" });
  });

  it("requests the whole tree when the channel did not recover, and shows the old one meanwhile", async () => {
    const session = await started();
    tree();
    await reconnect(false);
    expect(said).toMatchObject([{ rerun: { reset: true } }]);
    expect(session.store.get(1)?.props.value).toEqual({ text: "hi" });
    deltas({ remove: { id: 1 } }); // a delta of a tree that the page does not have
    expect(session.store.get(1)).toBeDefined();
    deltas({ reset: {} });
    expect(session.store.get(1)).toBeUndefined();
  });
});

describe("messages from the server", () => {
  it("request the whole tree once when a delta does not fit", async () => {
    const session = await started();
    tree();
    said.length = 0;
    deltas({ remove: { id: 77 } });
    deltas({ remove: { id: 78 } });
    await settle();
    expect(said).toMatchObject([{ rerun: { reset: true } }]);
    tree();
    expect(session.store.ready.value).toBe(true);
  });

  it("show a failure when one is unreadable, and the connection stays", async () => {
    const session = await started();
    tree();
    server.publish(CHANNEL, Uint8Array.of(0xff), ++offset);
    expect(session.failure.value?.message).toBe("received an unreadable message");
    expect([session.busy.value, session.connection.connected]).toEqual([false, true]);

    forwards({ runFinished: {} });
    expect(session.failure.value).toBeNull();
  });

  it("show an error until a run has finished", async () => {
    const session = await started();
    forwards({ error: { message: "division by zero", traceId: "abc" } });
    expect([session.failure.value, session.busy.value]).toEqual([
      { message: "division by zero", traceId: "abc" },
      false,
    ]);
    forwards({ runFinished: {} });
    expect(session.failure.value).toBeNull();
  });

  it("navigate, and show a bounded number of toasts for a while", async () => {
    const session = await started();
    said.length = 0;
    forwards({ navigate: { path: "/console", query: "tab=1" } });
    await settle();
    expect([location.pathname, location.search, session.location.value]).toEqual([
      "/console",
      "?tab=1",
      "/console?tab=1",
    ]);
    expect(said).toMatchObject([{ rerun: { path: "/console", query: "tab=1", reset: true } }]);
    for (let i = 0; i < 9; i++) forwards({ toast: { tone: "ok", text: `saved ${i}` } });
    expect(session.toasts.value.map(({ text }) => text)).toEqual(["saved 5", "saved 6", "saved 7", "saved 8"]);
    await vi.advanceTimersByTimeAsync(6_000);
    expect(session.toasts.value).toEqual([]);
  });
});

describe("messages to the server", () => {
  it("carry events and forms as JSON", async () => {
    const session = await started();
    said.length = 0;
    session.event("k1", { a: [1, "é"] });
    session.event("", 1); // an element without a key has no listener
    session.submit("f", [
      { key: "name", value: "Ann" },
      { key: "age", value: 41 },
    ]);
    await settle();
    expect(said).toMatchObject([
      { session: "0123", event: { key: "k1", value: '{"a":[1,"é"]}' } },
      {
        submit: {
          form: "f",
          values: [
            { key: "name", value: '"Ann"' },
            { key: "age", value: "41" },
          ],
        },
      },
    ]);
  });

  it("stop a run only while there is one", async () => {
    const session = await started();
    session.stop();
    forwards({ runFinished: {} });
    session.stop();
    await settle();
    expect(said.filter((one) => one.stop)).toHaveLength(1);
  });

  it("rerun after a change of the address, also on back", async () => {
    const session = await started();
    tree();
    said.length = 0;
    session.go("/console");
    location.href = "http://app.test/chat";
    popstate?.();
    await settle();
    expect(said).toMatchObject([{ rerun: { path: "/console", reset: false } }, { rerun: { path: "/chat" } }]);
    expect(session.location.value).toBe("/chat");
  });

  it("go out in order, one at a time, with only the last of several addresses", async () => {
    const session = await started();
    tree();
    said.length = 0;
    server.rpc = (_method, data) => void said.push(back.decode(data)) as undefined; // no reply yet

    session.rerun();
    session.event("k1", 1);
    session.go("/rooms/a");
    session.go("/rooms/b");
    session.stop();

    await settle();
    expect(said).toMatchObject([{ rerun: { path: "/chat" } }, { stop: {} }]);

    const answer = (): void =>
      server.socket.say({
        id: server.socket.commands.filter((c) => c.rpc && !back.decode(c.rpc.data).stop).pop()?.id ?? 0,
        rpc: {},
      });
    answer();
    await settle();
    answer();
    await settle();
    answer();
    await settle();

    expect(said.slice(2)).toMatchObject([{ event: { key: "k1" } }, { rerun: { path: "/rooms/b" } }]);
    expect(said).toHaveLength(4);
  });

  it("are dropped with a toast while the connection is lost", async () => {
    const session = await started();
    server.socket.drop();
    session.event("k1", 1);
    await settle();
    expect(session.toasts.value).toMatchObject([{ tone: "bad" }]);
    said.length = 0;
    await vi.advanceTimersByTimeAsync(1_000);
    expect(said).toMatchObject([{ rerun: { reset: true } }]);
  });

  it("show a toast when an event is refused, and stop being busy", async () => {
    const session = await started();
    server.rpc = () => ({ error: { code: 107, message: "bad request" } });
    session.event("k", null);
    await settle();
    expect(session.toasts.value).toMatchObject([{ tone: "bad", text: "The server refused the action: bad request" }]);
    expect(session.busy.value).toBe(false);
  });
});

describe("the session id", () => {
  const held = new Set<string>();
  const claim = (id: string): Promise<boolean> => Promise.resolve(!held.has(id) && Boolean(held.add(id)));
  beforeEach(() => held.clear());

  it("is 128 random bits and survives a reload", async () => {
    const id = await sessionId(claim);
    expect(id).toMatch(/^[0-9a-f]{32}$/);
    held.delete(id); // the page before the reload is gone
    expect(await sessionId(claim)).toBe(id);
  });

  it("of a duplicated tab is another one, from then on", async () => {
    const original = await sessionId(claim);
    // The duplicate starts with a copy of what the tab keeps, while the original is open.
    const duplicate = await sessionId(claim);
    expect(duplicate).not.toBe(original);
    held.delete(duplicate);
    expect(await sessionId(claim)).toBe(duplicate);
  });
});

it("goes to places inside the app only", async () => {
  const session = await started();
  said.length = 0;
  for (const outside of ["//evil.test/x", "/\\evil.test/x", "https://evil.test/", "javascript:alert(1)"])
    session.go(outside);
  forwards({ navigate: { path: "/\\evil.test", query: "" } });
  await settle();
  expect([location.href, said]).toEqual(["http://app.test/chat?room=general", []]);
  expect(session.toasts.value.length).toBeGreaterThan(0);
});
