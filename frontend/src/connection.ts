// The WebSocket connection to a node. It sends commands, recovers subscriptions by offset and epoch, and reconnects.
import { signal, type ReadonlySignal } from "@preact/signals";
import { asksToResubscribe, ErrorCode, isLocalError, isTerminal } from "./codec/codes";
import { joinFrames, splitFrames, type Partially } from "./codec/proto";
import * as wire from "./codec/realtime";

export type Status =
  | { name: "connecting" }
  | { name: "connected"; client: string; node: string }
  | { name: "waiting"; retryAt: number; reason: string }
  /** Signed out, refused or closed by the page; the connection does not retry by itself. */
  | { name: "closed"; code: number; reason: string };

export interface Position {
  offset: number;
  epoch: string;
}

export interface Subscribed {
  /** Whether all missed publications were or will be delivered, so that the listener's data stays complete. */
  recovered: boolean;
  position: Position;
}

export interface Listener {
  publication(publication: wire.Publication, position: Position): void;
  subscribed?(result: Subscribed): void;
  join?(info: wire.ClientInfo): void;
  leave?(info: wire.ClientInfo): void;
  failed?(error: CommandError): void;
}

export interface Options {
  url: string;
  /** Returns a fresh access token, or null when signed out. */
  token: () => Promise<string | null>;
  webSocket?: (url: string, protocol: string) => WebSocket;
  random?: () => number;
  firstDelay?: number;
  maxDelay?: number;
  commandTimeout?: number;
}

export class CommandError extends Error {
  constructor(
    readonly code: number,
    message: string,
    readonly temporary: boolean,
  ) {
    super(message);
  }
}

const PROTOCOL = "centrifuge-protobuf";
/** Namespaces in which only services may publish. A publication by a client there is a forgery and is ignored. */
const SERVICES_ONLY = ["app:", "chat:", "ops:"];
/** How late the server's ping may be, in ms, before the connection counts as lost. */
const PING_GRACE = 10_000;

type Timer = ReturnType<typeof setTimeout>;

interface Pending {
  resolve(reply: wire.Reply): void;
  reject(error: CommandError): void;
  timer: Timer;
}

interface Subscription {
  channel: string;
  listeners: Set<Listener>;
  position: Position | undefined;
  live: boolean;
  attempts: number;
  timer: Timer | undefined;
}

/** Delay in ms before retry `attempt` (from 0), with full jitter so that clients do not storm a restarted node. */
export function backoff(attempt: number, random: number, first = 500, cap = 20_000): number {
  const upper = Math.min(cap, first * 2 ** (attempt + 1));
  return Math.round(first + random * (upper - first));
}

/** A message of the server. An empty frame is a ping. */
type Received = { ping: true } | { ping: false; reply: wire.Reply };

/** Returns null if any of the messages is unreadable. */
function decode(frame: ArrayBuffer): Received[] | null {
  try {
    return splitFrames(new Uint8Array(frame)).map((message) =>
      message.length === 0 ? { ping: true } : { ping: false, reply: wire.reply.decode(message) },
    );
  } catch {
    return null;
  }
}

function forged(channel: string, publication: wire.Publication): boolean {
  return publication.info !== undefined && SERVICES_ONLY.some((namespace) => channel.startsWith(namespace));
}

export class Connection {
  private readonly statusSignal = signal<Status>({ name: "connecting" });
  private readonly subscriptions = new Map<string, Subscription>();
  private readonly pending = new Map<number, Pending>();
  private socket: WebSocket | undefined;
  private generation = 0;
  private lastId = 0;
  private attempts = 0;
  private retryTimer: Timer | undefined;
  private pingTimer: Timer | undefined;
  private refreshTimer: Timer | undefined;
  private pingInterval = 0;
  private echoPing = false;
  private outbox: Uint8Array[] = [];
  private flushing = false;

  constructor(private readonly options: Options) {}

  get status(): ReadonlySignal<Status> {
    return this.statusSignal;
  }

  get connected(): boolean {
    return this.statusSignal.peek().name === "connected";
  }

  open(): void {
    this.attempts = 0;
    this.dial();
  }

  /** Reconnects immediately instead of waiting for the delay. */
  retryNow(): void {
    if (this.statusSignal.peek().name === "waiting") this.dial();
  }

  close(reason = "closed"): void {
    this.drop();
    this.statusSignal.value = { name: "closed", code: 0, reason };
  }

  /**
   * Subscribes a listener; returns the function that ends it. All listeners of a channel share one subscription.
   * `since` recovers what the first listener missed after that position.
   */
  subscribe(channel: string, listener: Listener, since?: Position): () => void {
    let subscription = this.subscriptions.get(channel);
    if (!subscription) {
      subscription = { channel, listeners: new Set(), position: since, live: false, attempts: 0, timer: undefined };
      this.subscriptions.set(channel, subscription);
      subscription.listeners.add(listener);
      if (this.connected) void this.join(subscription);
    } else {
      subscription.listeners.add(listener);
      if (subscription.live && subscription.position) {
        listener.subscribed?.({ recovered: false, position: subscription.position });
      }
    }

    const held = subscription;
    return () => {
      if (!held.listeners.delete(listener) || held.listeners.size > 0) return;
      // A refused subscription was already removed, and the channel may have a newer one.
      if (this.subscriptions.get(channel) !== held) return;
      this.subscriptions.delete(channel);
      clearTimeout(held.timer);
      if (this.connected) this.request({ unsubscribe: { channel } }).catch(() => undefined);
    };
  }

  async rpc(method: string, data: Uint8Array): Promise<Uint8Array> {
    const reply = await this.request({ rpc: { method, data } });
    return reply.rpc?.data ?? new Uint8Array(0);
  }

  async publish(channel: string, data: Uint8Array): Promise<void> {
    await this.request({ publish: { channel, data } });
  }

  async presence(channel: string): Promise<wire.ClientInfo[]> {
    const reply = await this.request({ presence: { channel } });
    return Object.values(reply.presence?.presence ?? {});
  }

  async history(channel: string, limit: number, since?: Position): Promise<wire.HistoryResult> {
    const { history = wire.historyResult.empty() } = await this.request({ history: { channel, limit, since } });
    return { ...history, publications: history.publications.filter((publication) => !forged(channel, publication)) };
  }

  private dial(): void {
    this.drop();
    const generation = ++this.generation;
    this.statusSignal.value = { name: "connecting" };
    this.options.token().then(
      (token) => {
        if (generation !== this.generation) return;
        if (token === null)
          this.statusSignal.value = { name: "closed", code: ErrorCode.unauthorized, reason: "signed out" };
        else this.openSocket(token, generation);
      },
      () => {
        if (generation === this.generation) this.wait("cannot reach the server");
      },
    );
  }

  private openSocket(token: string, generation: number): void {
    const make = this.options.webSocket ?? ((url, protocol) => new WebSocket(url, protocol));
    const socket = make(this.options.url, PROTOCOL);
    socket.binaryType = "arraybuffer";
    this.socket = socket;

    const current = (): boolean => generation === this.generation && socket === this.socket;
    // Without this limit, the browser tries for minutes to connect to a node that does not respond.
    this.pingTimer = setTimeout(
      () => current() && this.lost("the server did not respond in time"),
      this.commandTimeout * 2,
    );

    socket.onopen = () => {
      if (current()) void this.handshake(token, generation);
    };

    socket.onmessage = (message: MessageEvent) => {
      if (!current() || !(message.data instanceof ArrayBuffer)) return;
      const received = decode(message.data);
      if (received) received.forEach((one) => this.receive(one));
      else this.lost("received an unreadable message");
    };

    socket.onclose = (close: CloseEvent) => {
      if (current()) this.ended(close.code, close.reason);
    };
    socket.onerror = () => undefined;
  }

  private async handshake(token: string, generation: number): Promise<void> {
    let result: wire.ConnectResult;
    try {
      const reply = await this.request({ connect: { token, name: "beamline" } });
      result = reply.connect ?? wire.connectResult.empty();
    } catch (error) {
      if (generation === this.generation) this.lost(error instanceof Error ? error.message : "cannot connect");
      return;
    }
    if (generation !== this.generation) return;

    this.attempts = 0;
    this.pingInterval = result.ping * 1000;
    this.echoPing = result.pong;
    this.watchPing();
    if (result.expires) this.refreshIn(result.ttl);

    for (const subscription of this.subscriptions.values()) void this.join(subscription);
    this.statusSignal.value = { name: "connected", client: result.client, node: result.node };
  }

  private async join(subscription: Subscription): Promise<void> {
    clearTimeout(subscription.timer);
    const generation = this.generation;
    const { channel, position } = subscription;
    const current = (): boolean => generation === this.generation && this.subscriptions.get(channel) === subscription;

    const request: Partially<wire.Command> = {
      subscribe: { channel, joinLeave: true, recoverable: true, positioned: true },
    };
    if (position && request.subscribe) Object.assign(request.subscribe, { recover: true, ...position });

    let result: wire.SubscribeResult;
    try {
      result = (await this.request(request)).subscribe ?? wire.subscribeResult.empty();
    } catch (error) {
      if (!current()) return;
      const known = error instanceof CommandError;
      this.notJoined(subscription, known ? error : new CommandError(ErrorCode.notConnected, String(error), true));
      return;
    }
    if (current()) this.joined(subscription, result);
  }

  private joined(subscription: Subscription, result: wire.SubscribeResult): void {
    const recovered = result.wasRecovering && result.recovered;
    subscription.live = true;
    subscription.attempts = 0;

    const last = { epoch: result.epoch, offset: result.offset };
    const start = recovered && subscription.position ? { ...subscription.position, epoch: result.epoch } : last;
    subscription.position = start;

    this.notify(subscription, (listener) => listener.subscribed?.({ recovered, position: start }));
    for (const publication of result.publications) this.deliver(subscription, publication);
    if (last.offset > subscription.position.offset) subscription.position = last;
  }

  private notJoined(subscription: Subscription, error: CommandError): void {
    if (error.code === ErrorCode.alreadySubscribed) return;
    if (error.temporary || isLocalError(error.code)) {
      this.rejoinLater(subscription);
      return;
    }
    this.subscriptions.delete(subscription.channel);
    this.notify(subscription, (listener) => listener.failed?.(error));
  }

  private rejoinLater(subscription: Subscription): void {
    subscription.live = false;
    clearTimeout(subscription.timer);
    subscription.timer = setTimeout(
      () => this.connected && !subscription.live && void this.join(subscription),
      this.delay(subscription.attempts++),
    );
  }

  private receive(received: Received): void {
    if (received.ping) {
      this.watchPing();
      if (this.echoPing) this.write(new Uint8Array(0));
    } else if (received.reply.push) this.pushed(received.reply.push);
    else this.replied(received.reply);
  }

  private replied(reply: wire.Reply): void {
    const waiting = this.pending.get(reply.id);
    if (!waiting) return;
    this.pending.delete(reply.id);
    clearTimeout(waiting.timer);
    if (!reply.error) waiting.resolve(reply);
    else waiting.reject(new CommandError(reply.error.code, reply.error.message, reply.error.temporary));
  }

  private pushed(push: wire.Push): void {
    if (push.disconnect) {
      this.ended(push.disconnect.code, push.disconnect.reason);
      return;
    }
    const subscription = this.subscriptions.get(push.channel);
    if (!subscription) return;

    const { pub, join, leave, unsubscribe } = push;
    if (pub) this.deliver(subscription, pub);
    else if (join?.info) this.notify(subscription, (listener) => listener.join?.(join.info as wire.ClientInfo));
    else if (leave?.info) this.notify(subscription, (listener) => listener.leave?.(leave.info as wire.ClientInfo));
    else if (unsubscribe) {
      const { code, reason } = unsubscribe;
      if (asksToResubscribe(code)) this.rejoinLater(subscription);
      else this.notJoined(subscription, new CommandError(Math.max(code, ErrorCode.internal), reason, false));
    }
  }

  private deliver(subscription: Subscription, publication: wire.Publication): void {
    const position = subscription.position;
    // A publication without an offset has no place in the history; otherwise offsets only grow.
    if (publication.offset > 0 && position) {
      if (publication.offset <= position.offset) return;
      subscription.position = { epoch: position.epoch, offset: publication.offset };
    }
    // A forged publication advances the position but is not delivered.
    if (forged(subscription.channel, publication)) return;
    const now = subscription.position ?? { epoch: "", offset: 0 };
    this.notify(subscription, (listener) => listener.publication(publication, now));
  }

  /**
   * Calls every listener. One that throws has a bug. The browser reports it as an uncaught error, and neither the
   * connection nor the other listeners notice.
   */
  private notify(subscription: Subscription, call: (listener: Listener) => void): void {
    for (const listener of [...subscription.listeners]) {
      try {
        call(listener);
      } catch (error) {
        reportError(error);
      }
    }
  }

  private request(command: Partially<wire.Command>): Promise<wire.Reply> {
    return new Promise((resolve, reject) => {
      if (!this.socket || this.socket.readyState !== this.socket.OPEN) {
        reject(new CommandError(ErrorCode.notConnected, "not connected", true));
        return;
      }
      const id = ++this.lastId;
      const timer = setTimeout(() => {
        this.pending.delete(id);
        reject(new CommandError(ErrorCode.timeout, "the server did not respond in time", true));
      }, this.commandTimeout);
      this.pending.set(id, { resolve, reject, timer });
      this.write(wire.command.encode({ ...command, id }));
    });
  }

  /** Queues a message. All messages of one turn of the event loop go out in one frame. */
  private write(message: Uint8Array): void {
    this.outbox.push(message);
    if (this.flushing) return;
    this.flushing = true;
    queueMicrotask(() => {
      this.flushing = false;
      const messages = this.outbox;
      this.outbox = [];
      if (messages.length > 0 && this.socket?.readyState === this.socket?.OPEN) {
        this.socket?.send(joinFrames(messages) as Uint8Array<ArrayBuffer>);
      }
    });
  }

  private watchPing(): void {
    clearTimeout(this.pingTimer);
    if (this.pingInterval > 0) {
      this.pingTimer = setTimeout(() => this.lost("the server stopped responding"), this.pingInterval + PING_GRACE);
    }
  }

  private refreshIn(ttl: number): void {
    clearTimeout(this.refreshTimer);
    // Refresh before the token expires, but never in a tight loop.
    this.refreshTimer = setTimeout(() => void this.refresh(), Math.max(5, Math.min(ttl * 0.8, 1_000_000)) * 1000);
  }

  private async refresh(): Promise<void> {
    const generation = this.generation;
    try {
      const token = await this.options.token();
      if (generation !== this.generation) return;
      if (token === null) {
        this.close("signed out");
        return;
      }
      const result = (await this.request({ refresh: { token } })).refresh;
      if (generation === this.generation && result?.expires) this.refreshIn(result.ttl);
    } catch {
      // Retry later. If the token expires first, the server closes with a code that lets the client reconnect.
      if (generation === this.generation) this.refreshIn(30);
    }
  }

  private ended(code: number, reason: string): void {
    if (!isTerminal(code)) {
      this.lost(reason || "the connection was lost");
      return;
    }
    this.drop();
    this.statusSignal.value = { name: "closed", code, reason: reason || `refused (${code})` };
  }

  private lost(reason: string): void {
    this.drop();
    this.wait(reason === "" ? "the connection was lost" : reason);
  }

  private wait(reason: string): void {
    const delay = this.delay(this.attempts++);
    this.statusSignal.value = { name: "waiting", retryAt: Date.now() + delay, reason };
    clearTimeout(this.retryTimer);
    this.retryTimer = setTimeout(() => this.dial(), delay);
  }

  private drop(): void {
    this.generation++;
    clearTimeout(this.retryTimer);
    clearTimeout(this.pingTimer);
    clearTimeout(this.refreshTimer);
    this.pingInterval = 0;
    this.outbox = [];

    const socket = this.socket;
    this.socket = undefined;
    if (socket) {
      socket.onopen = socket.onmessage = socket.onclose = null;
      if (socket.readyState <= socket.OPEN) socket.close();
    }
    for (const subscription of this.subscriptions.values()) {
      subscription.live = false;
      clearTimeout(subscription.timer);
    }

    const pending = [...this.pending.values()];
    this.pending.clear();
    for (const { reject, timer } of pending) {
      clearTimeout(timer);
      reject(new CommandError(ErrorCode.notConnected, "the connection was lost", true));
    }
  }

  private delay(attempt: number): number {
    const random = this.options.random ?? Math.random;
    return backoff(attempt, random(), this.options.firstDelay, this.options.maxDelay);
  }

  private get commandTimeout(): number {
    return this.options.commandTimeout ?? 5_000;
  }
}
