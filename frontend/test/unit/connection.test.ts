// Tests the connection against a fake server, with fake timers.
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import {
  backoff,
  CommandError,
  Connection,
  type Listener,
  type Options,
  type Position,
  type Subscribed,
} from "../../src/connection";
import { CloseCode, ErrorCode } from "../../src/codec/codes";
import { joinFrames } from "../../src/codec/proto";
import { reply, type ClientInfo } from "../../src/codec/realtime";
import { FakeServer } from "./server";

const text = (data: Uint8Array): string => new TextDecoder().decode(data);
const data = (from: string): Uint8Array => new TextEncoder().encode(from);
const settle = (): Promise<unknown> => vi.advanceTimersByTimeAsync(0);

let server: FakeServer;
beforeEach(() => {
  vi.useFakeTimers();
  server = new FakeServer();
});
afterEach(() => {
  vi.useRealTimers();
});

async function connected(options: Partial<Options> = {}): Promise<Connection> {
  const connection = new Connection({
    url: "ws://test/",
    token: () => Promise.resolve("t1"),
    webSocket: server.webSocket,
    random: () => 0.5,
    ...options,
  });
  connection.open();
  await settle();
  return connection;
}

class Heard implements Listener {
  readonly publications: string[] = [];
  readonly positions: Position[] = [];
  readonly subscriptions: Subscribed[] = [];
  readonly people: string[] = [];
  readonly failures: number[] = [];
  publication: Listener["publication"] = (publication, position) => {
    this.publications.push(text(publication.data));
    this.positions.push(position);
  };
  subscribed = (result: Subscribed): void => void this.subscriptions.push(result);
  join = (info: ClientInfo): void => void this.people.push(`+${info.user}`);
  leave = (info: ClientInfo): void => void this.people.push(`-${info.user}`);
  failed = (error: CommandError): void => void this.failures.push(error.code);
}

describe("connect", () => {
  it("sends the token first, over the protobuf subprotocol", async () => {
    const connection = await connected();
    expect(server.socket.protocol).toBe("centrifuge-protobuf");
    expect(server.socket.binaryType).toBe("arraybuffer");
    expect(server.socket.commands[0]?.connect?.token).toBe("t1");
    expect(connection.status.value).toEqual({ name: "connected", client: "c1", node: "n1" });
  });

  it("closes when signed out", async () => {
    const connection = await connected({ token: () => Promise.resolve(null) });
    expect(connection.status.value).toMatchObject({ name: "closed", reason: "signed out" });
    await vi.advanceTimersByTimeAsync(60_000);
    expect(server.sockets).toHaveLength(0);
  });

  it("retries when no token is available", async () => {
    let tries = 0;
    const connection = await connected({
      token: () => (tries++ === 0 ? Promise.reject(new Error("offline")) : Promise.resolve("t")),
    });
    expect(connection.status.value.name).toBe("waiting");
    await vi.advanceTimersByTimeAsync(1_000);
    expect(connection.connected).toBe(true);
  });

  it("asks for a fresh token after the server refused one", async () => {
    const tokens = ["old", "new"];
    server.connect = { error: { code: 109, message: "token expired" } };
    const connection = await connected({ token: () => Promise.resolve(tokens.shift() ?? null) });
    expect(connection.status.value).toMatchObject({ name: "waiting", reason: "token expired" });
    server.connect = { connect: { client: "c2" } };
    await vi.advanceTimersByTimeAsync(1_000);
    expect(server.socket.of("connect")[0]?.token).toBe("new");
    expect(connection.connected).toBe(true);
  });

  it("gives up on a node that does not respond", async () => {
    server.connect = undefined;
    const connection = await connected();
    await vi.advanceTimersByTimeAsync(5_000);
    expect(connection.status.value.name).toBe("waiting");
    expect(server.socket.readyState).toBe(3);
  });
});

describe("subscribe", () => {
  it("delivers publications, joins and leaves, with the position", async () => {
    server.subscribe = () => ({ subscribe: { epoch: "e1", offset: 7 } });
    const connection = await connected();
    const heard = new Heard();
    connection.subscribe("chat:general", heard);
    await settle();

    expect(heard.subscriptions).toEqual([{ recovered: false, position: { epoch: "e1", offset: 7 } }]);
    expect(server.socket.of("subscribe")[0]).toMatchObject({
      channel: "chat:general",
      recover: false,
      joinLeave: true,
      recoverable: true,
      positioned: true,
    });

    server.publish("chat:general", data("a"), 8);
    server.publish("chat:other", data("x"), 1);
    server.socket.say(
      { push: { channel: "chat:general", join: { info: { user: "ann" } } } },
      { push: { channel: "chat:general", leave: { info: { user: "ann" } } } },
    );

    expect(heard.publications).toEqual(["a"]);
    expect(heard.positions).toEqual([{ epoch: "e1", offset: 8 }]);
    expect(heard.people).toEqual(["+ann", "-ann"]);
  });

  it("ignores publications of clients where only services publish", async () => {
    const forgery = (offset: number) => ({ data: data("forged"), info: { user: "mallory", client: "c9" }, offset });
    server.subscribe = () => ({ subscribe: { epoch: "e1", offset: 0, recoverable: true, publications: [] } });
    server.other = () => ({
      history: { publications: [forgery(1), { data: data("real"), offset: 2 }], epoch: "e1", offset: 2 },
    });
    const connection = await connected();
    for (const channel of ["chat:general", "app:s1#ann", "ops:live"]) {
      const heard = new Heard();
      connection.subscribe(channel, heard);
      await settle();

      server.socket.say({ push: { channel, pub: forgery(1) } });
      server.publish(channel, data("real"), 2);
      server.socket.say({ push: { channel, pub: forgery(0) } });
      expect(heard.publications).toEqual(["real"]);
      expect(heard.positions).toEqual([{ epoch: "e1", offset: 2 }]);

      const kept = connection.history(channel, -1);
      await settle();
      expect((await kept).publications.map((publication) => text(publication.data))).toEqual(["real"]);
    }

    // Clients may publish in other namespaces.
    const heard = new Heard();
    connection.subscribe("news", heard);
    await settle();
    server.socket.say({ push: { channel: "news", pub: forgery(1) } });
    expect(heard.publications).toEqual(["forged"]);
  });

  it("delivers each offset once and publications without an offset always", async () => {
    const connection = await connected();
    const heard = new Heard();
    connection.subscribe("c", heard);
    await settle();
    for (const [what, offset] of [
      ["a", 1],
      ["b", 2],
      ["a again", 1],
      ["b again", 2],
      ["no history", 0],
      ["c", 3],
    ] as const)
      server.publish("c", data(what), offset);
    expect(heard.publications).toEqual(["a", "b", "no history", "c"]);
  });

  it("subscribes once connected, in the frame after connect", async () => {
    const connection = new Connection({
      url: "ws://test/",
      token: () => Promise.resolve("t"),
      webSocket: server.webSocket,
    });
    connection.subscribe("a", new Heard());
    connection.subscribe("b", new Heard());
    connection.open();
    await settle();
    expect(server.socket.of("subscribe").map(({ channel }) => channel)).toEqual(["a", "b"]);
    expect(server.socket.frames).toBe(2);
  });

  it("reports a listener that throws, and nobody else notices", async () => {
    const reported: unknown[] = [];
    vi.stubGlobal("reportError", (error: unknown) => reported.push(error));
    const connection = await connected();
    const bug = new Error("a bug of the listener");
    const fail = (): never => {
      throw bug;
    };
    const heard = new Heard();
    connection.subscribe("c", { publication: fail, subscribed: fail, join: fail, leave: fail });
    connection.subscribe("c", heard);
    await settle();

    server.socket.say(
      { push: { channel: "c", pub: { data: data("a"), offset: 1 } } },
      { push: { channel: "c", join: { info: { user: "ann" } } } },
      { push: { channel: "c", leave: { info: { user: "ann" } } } },
      { push: { channel: "c", pub: { data: data("b"), offset: 2 } } },
    );
    vi.unstubAllGlobals();

    expect(reported).toEqual([bug, bug, bug, bug, bug]);
    expect([heard.publications, heard.people]).toEqual([
      ["a", "b"],
      ["+ann", "-ann"],
    ]);
    expect(connection.connected).toBe(true);
    expect(server.socket.of("subscribe")).toHaveLength(1);
  });

  it("reports a listener that throws on a refusal", async () => {
    const reported: unknown[] = [];
    vi.stubGlobal("reportError", (error: unknown) => reported.push(error));
    server.subscribe = () => ({ error: { code: ErrorCode.unauthorized, message: "unauthorized" } });
    const connection = await connected();
    const heard = new Heard();
    connection.subscribe("c", {
      publication: () => undefined,
      failed: () => {
        throw new Error("a bug of the listener");
      },
    });
    connection.subscribe("c", heard);
    await settle();
    vi.unstubAllGlobals();
    expect([reported.length, heard.failures]).toEqual([1, [ErrorCode.unauthorized]]);
  });

  it("shares one subscription and ends it with the last listener", async () => {
    const connection = await connected();
    const [first, second] = [new Heard(), new Heard()];
    const leaveFirst = connection.subscribe("c", first);
    await settle();

    const leaveSecond = connection.subscribe("c", second);
    await settle();
    expect(second.subscriptions).toEqual([{ recovered: false, position: { epoch: "e", offset: 0 } }]);
    expect(server.socket.of("subscribe")).toHaveLength(1);

    leaveFirst();
    leaveFirst();
    server.publish("c", data("x"), 1);
    expect([first.publications, second.publications]).toEqual([[], ["x"]]);

    leaveSecond();
    await settle();
    expect(server.socket.of("unsubscribe")).toEqual([{ channel: "c" }]);
  });

  it("recovers what a listener missed since a position", async () => {
    server.subscribe = () => ({
      subscribe: {
        epoch: "e",
        offset: 6,
        wasRecovering: true,
        recovered: true,
        publications: [
          { data: data("5"), offset: 5 },
          { data: data("6"), offset: 6 },
        ],
      },
    });
    const connection = await connected();
    const heard = new Heard();
    connection.subscribe("c", heard, { epoch: "e", offset: 4 });
    await settle();
    expect(server.socket.of("subscribe")[0]).toMatchObject({ recover: true, epoch: "e", offset: 4 });
    expect(heard.subscriptions).toEqual([{ recovered: true, position: { epoch: "e", offset: 4 } }]);
    expect(heard.publications).toEqual(["5", "6"]);
  });

  it("reports a refusal and removes the subscription", async () => {
    server.subscribe = () => ({ error: { code: 103, message: "permission denied" } });
    const connection = await connected();
    const heard = new Heard();
    const leave = connection.subscribe("secret", heard);
    await settle();
    expect(heard.failures).toEqual([103]);

    server.subscribe = () => ({ subscribe: { epoch: "e" } });
    const again = new Heard();
    connection.subscribe("secret", again);
    await settle();

    leave(); // ends the refused subscription; the new one stays
    server.publish("secret", data("x"), 1);
    expect(again.publications).toEqual(["x"]);
  });

  it("backs off after temporary errors", async () => {
    let tries = 0;
    server.subscribe = () =>
      ++tries < 3 ? { error: { code: 100, message: "internal", temporary: true } } : { subscribe: { epoch: "e" } };
    const connection = await connected();
    const heard = new Heard();
    connection.subscribe("c", heard);
    await settle();

    expect(tries).toBe(1);
    await vi.advanceTimersByTimeAsync(750);
    expect(tries).toBe(2);
    await vi.advanceTimersByTimeAsync(1_249);
    expect(tries).toBe(2);

    await vi.advanceTimersByTimeAsync(1);
    expect(heard.subscriptions).toHaveLength(1);
  });

  it("resubscribes after code 2500 but not after 2000", async () => {
    const connection = await connected();
    const [lost, ended] = [new Heard(), new Heard()];
    connection.subscribe("lost", lost);
    connection.subscribe("ended", ended);
    await settle();

    server.publish("lost", data("a"), 3);
    server.socket.say(
      { push: { channel: "lost", unsubscribe: { code: 2500, reason: "insufficient state" } } },
      { push: { channel: "ended", unsubscribe: { code: 2000, reason: "server" } } },
    );

    await vi.advanceTimersByTimeAsync(1_000);
    expect(ended.failures).toEqual([2000]);
    expect(server.socket.of("subscribe").map(({ channel, recover, offset }) => [channel, recover, offset])).toEqual([
      ["lost", false, 0],
      ["ended", false, 0],
      ["lost", true, 3],
    ]);
  });
});

describe("reconnect", () => {
  it("backs off with full jitter between the first delay and the cap", () => {
    for (let attempt = 0; attempt < 12; attempt++) {
      const upper = Math.min(20_000, 500 * 2 ** (attempt + 1));
      expect(backoff(attempt, 0)).toBe(500);
      expect(backoff(attempt, 1)).toBe(upper);
      expect(backoff(attempt, 0.5)).toBe(Math.round((500 + upper) / 2));
    }
    expect([backoff(0, 0), backoff(0, 1)]).toEqual([500, 1_000]);
    expect(backoff(60, 1)).toBe(20_000);
  });

  it("recovers each channel from its position", async () => {
    server.subscribe = () => ({ subscribe: { epoch: "e1", offset: 2 } });
    const connection = await connected();
    const heard = new Heard();
    connection.subscribe("c", heard);
    await settle();

    server.publish("c", data("3"), 3);
    server.subscribe = () => ({
      subscribe: {
        epoch: "e1",
        offset: 5,
        wasRecovering: true,
        recovered: true,
        publications: [
          { data: data("4"), offset: 4 },
          { data: data("5"), offset: 5 },
        ],
      },
    });

    server.socket.drop();
    expect(connection.status.value).toMatchObject({ name: "waiting", retryAt: Date.now() + 750 });
    await vi.advanceTimersByTimeAsync(749);
    expect(server.sockets).toHaveLength(1);
    await vi.advanceTimersByTimeAsync(1);
    expect(connection.connected).toBe(true);

    expect(server.socket.of("subscribe")[0]).toMatchObject({ recover: true, epoch: "e1", offset: 3 });
    expect(heard.subscriptions[1]).toEqual({ recovered: true, position: { epoch: "e1", offset: 3 } });
    expect(heard.publications).toEqual(["3", "4", "5"]);
    expect(heard.positions[2]).toEqual({ epoch: "e1", offset: 5 });
  });

  it("takes the new position when recovery failed", async () => {
    server.subscribe = () => ({ subscribe: { epoch: "e1", offset: 90 } });
    const connection = await connected();
    const heard = new Heard();
    connection.subscribe("c", heard);
    await settle();

    server.subscribe = () => ({ subscribe: { epoch: "e2", offset: 4, wasRecovering: true, recovered: false } });
    server.socket.drop();
    await vi.advanceTimersByTimeAsync(1_000);
    expect(heard.subscriptions[1]).toEqual({ recovered: false, position: { epoch: "e2", offset: 4 } });

    server.publish("c", data("x"), 5); // lower than the offset of the old epoch
    expect(heard.publications).toEqual(["x"]);
  });

  it("waits longer after each failure up to the cap, and resets the delay once connected", async () => {
    const connection = await connected();
    server.up = false;
    const waits: number[] = [];
    server.socket.drop();

    for (let i = 0; i < 8; i++) {
      const status = connection.status.value;
      if (status.name !== "waiting") throw new Error(`expected status waiting, got ${status.name}`);
      waits.push(status.retryAt - Date.now());
      await vi.advanceTimersByTimeAsync(status.retryAt - Date.now());
    }
    expect(waits).toEqual([750, 1_250, 2_250, 4_250, 8_250, 10_250, 10_250, 10_250]);

    server.up = true;
    await vi.advanceTimersByTimeAsync(20_000);
    expect(connection.connected).toBe(true);
    server.socket.drop();
    expect(connection.status.value).toMatchObject({ name: "waiting", retryAt: Date.now() + 750 });
  });

  it("reconnects immediately on request", async () => {
    const connection = await connected();
    server.socket.drop();
    connection.retryNow();
    await settle();
    expect(connection.connected).toBe(true);
    await vi.advanceTimersByTimeAsync(5_000);
    expect(server.sockets).toHaveLength(2);
  });

  it.each([3000, 3001, 3005, 3008, 3011, 3012, 1006])("comes back after code %i", async (code) => {
    const connection = await connected();
    server.socket.drop(code, "why");
    expect(connection.status.value).toMatchObject({ name: "waiting", reason: "why" });
    await vi.advanceTimersByTimeAsync(1_000);
    expect(connection.connected).toBe(true);
  });

  it.each([3500, 3501, 3503, 3507, 4500])("stays closed after code %i", async (code) => {
    const connection = await connected();
    server.socket.drop(code, "refused");
    expect(connection.status.value).toEqual({ name: "closed", code, reason: "refused" });
    await vi.advanceTimersByTimeAsync(60_000);
    expect(server.sockets).toHaveLength(1);
    connection.open();
    await settle();
    expect(connection.connected).toBe(true);
  });

  it("treats a disconnect push like a close", async () => {
    const connection = await connected();
    server.socket.say({ push: { disconnect: { code: CloseCode.forceDisconnect, reason: "force disconnect" } } });
    expect(connection.status.value).toMatchObject({ name: "closed", code: CloseCode.forceDisconnect });
  });

  it("drops a connection with unreadable messages and ignores a replaced socket", async () => {
    const connection = await connected();
    const first = server.socket;
    first.raw(Uint8Array.of(9, 1));
    expect(connection.status.value).toMatchObject({ name: "waiting", reason: "received an unreadable message" });
    await vi.advanceTimersByTimeAsync(1_000);
    first.drop(CloseCode.forceDisconnect);
    expect(connection.connected).toBe(true);
  });

  it("drops a frame with an unreadable message whole, and recovers its publications", async () => {
    const connection = await connected();
    const heard = new Heard();
    connection.subscribe("c", heard);
    await settle();

    const readable = reply.encode({ push: { channel: "c", pub: { data: data("a"), offset: 1 } } });
    server.socket.raw(joinFrames([readable, Uint8Array.of(0xff)]));
    expect(heard.publications).toEqual([]);
    await vi.advanceTimersByTimeAsync(1_000);
    expect(server.socket.of("subscribe")[0]).toMatchObject({ recover: true, offset: 0 });
  });

  it("close stops every timer and retry", async () => {
    const connection = await connected();
    connection.close("signed out");
    await vi.advanceTimersByTimeAsync(120_000);
    expect(server.sockets).toHaveLength(1);
    expect(connection.status.value).toMatchObject({ name: "closed", reason: "signed out" });
    expect(vi.getTimerCount()).toBe(0);
  });
});

describe("ping", () => {
  it("is answered and keeps the connection open", async () => {
    const connection = await connected();
    for (let i = 0; i < 4; i++) {
      await vi.advanceTimersByTimeAsync(25_000);
      server.socket.ping();
    }
    await settle();
    expect(server.socket.pongs).toBe(4);
    expect(connection.connected).toBe(true);
  });

  it("drops the connection when missing for the interval and the grace period", async () => {
    const connection = await connected();
    await vi.advanceTimersByTimeAsync(34_999);
    expect(connection.connected).toBe(true);
    await vi.advanceTimersByTimeAsync(1);
    expect(connection.status.value).toMatchObject({ name: "waiting", reason: "the server stopped responding" });
  });

  it("is not answered unless the server asked for pongs", async () => {
    server.connect = { connect: { ping: 25 } };
    await connected();
    server.socket.ping();
    await settle();
    expect(server.socket.pongs).toBe(0);
  });
});

describe("token refresh", () => {
  it("repeats before each token expires", async () => {
    server.connect = { connect: { expires: true, ttl: 900 } };
    let made = 0;
    await connected({ token: () => Promise.resolve(`t${++made}`) });
    await vi.advanceTimersByTimeAsync(720_000);
    expect(server.socket.of("refresh")).toEqual([{ token: "t2" }]);
    await vi.advanceTimersByTimeAsync(720_000);
    expect(server.socket.of("refresh")).toHaveLength(2);
  });

  it("closes the connection when signed out meanwhile", async () => {
    server.connect = { connect: { expires: true, ttl: 60 } };
    const tokens: (string | null)[] = ["t1", null];
    const connection = await connected({ token: () => Promise.resolve(tokens.shift() ?? null) });
    await vi.advanceTimersByTimeAsync(48_000);
    expect(connection.status.value).toMatchObject({ name: "closed", reason: "signed out" });
  });

  it("retries without a token and stays connected", async () => {
    server.connect = { connect: { expires: true, ttl: 100 } };
    let calls = 0;
    const connection = await connected({
      token: () => (++calls === 2 ? Promise.reject(new Error("offline")) : Promise.resolve("t")),
    });
    await vi.advanceTimersByTimeAsync(80_000);
    expect(server.socket.of("refresh")).toHaveLength(0);
    await vi.advanceTimersByTimeAsync(24_000);
    expect(server.socket.of("refresh")).toHaveLength(1);
    expect(connection.connected).toBe(true);
  });
});

describe("commands", () => {
  it("carry bytes both ways as rpc", async () => {
    server.rpc = (method, sent) => ({ rpc: { data: data(`${method} ${text(sent)}`) } });
    const connection = await connected();
    expect(text(await connection.rpc("chat.rooms", data("{}")))).toBe("chat.rooms {}");
  });

  it("fail with the server's error", async () => {
    server.rpc = () => ({ error: { code: 111, message: "too many requests", temporary: true } });
    const connection = await connected();
    await expect(connection.rpc("x", data(""))).rejects.toMatchObject({
      code: 111,
      message: "too many requests",
      temporary: true,
    });
  });

  it("fail after five seconds without a reply, and a late reply is ignored", async () => {
    server.rpc = () => undefined;
    const connection = await connected();
    const asked = expect(connection.rpc("slow", data(""))).rejects.toMatchObject({ code: 1, temporary: true });
    await vi.advanceTimersByTimeAsync(5_000);
    await asked;
    server.socket.say({ id: server.socket.commands[1]?.id ?? 0, rpc: {} });
    expect(connection.connected).toBe(true);
  });

  it("fail immediately without a connection or when it is lost", async () => {
    server.rpc = () => undefined;
    const connection = await connected();
    const asked = expect(connection.rpc("x", data(""))).rejects.toBeInstanceOf(CommandError);
    await settle();
    server.socket.drop();
    await asked;
    await expect(connection.publish("c", data(""))).rejects.toMatchObject({ message: "not connected" });
  });

  it("read the replies of presence and history", async () => {
    server.other = (sent) =>
      sent.presence
        ? { presence: { presence: { c1: { user: "ann", client: "c1" } } } }
        : { history: { epoch: "e", offset: 2, publications: [{ data: data("a"), offset: 2 }] } };
    const connection = await connected();
    expect(await connection.presence("c")).toMatchObject([{ user: "ann", client: "c1" }]);
    const history = await connection.history("c", -1, { epoch: "e", offset: 1 });
    expect(history).toMatchObject({ epoch: "e", offset: 2 });
    expect(server.socket.of("history")[0]).toMatchObject({ limit: -1, since: { epoch: "e", offset: 1 } });
  });

  it("of one turn share a frame", async () => {
    const connection = await connected();
    const before = server.socket.frames;
    await Promise.all([
      connection.rpc("a", data("")),
      connection.rpc("b", data("")),
      connection.publish("c", data("")),
    ]);
    expect(server.socket.frames).toBe(before + 1);
  });
});
