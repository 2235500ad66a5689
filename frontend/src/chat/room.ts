// The state of a room. It is kept while other rooms are shown, so that switching back is instant.
import { effect, signal } from "@preact/signals";
import { ErrorCode } from "../codec/codes";
import type { ClientInfo } from "../codec/realtime";
import { CommandError, type Position } from "../connection";
import { fromBytes, num, object, str, type Json, type JsonObject } from "../json";
import { randomHex, type Session } from "../session";
import { emptyChat, readHistory, readMessage, reduce, type Action, type ChatState, type Message } from "./reducer";

const PAGE = 50;
const TYPING_SHOWN_MS = 5_000;
const TYPING_SENT_MS = 3_000;
const RELOAD_PAUSE_MS = 1_000;

export interface Person {
  user: string;
  name: string;
}

export class Room {
  readonly state = signal<ChatState>(emptyChat);
  readonly people = signal<Person[]>([]);
  readonly typing = signal<(Person & { until: number })[]>([]);
  readonly problem = signal("");
  readonly loadingOlder = signal(false);
  /** The last message id that the user had seen when the room was opened or the window was left. */
  readonly seenBefore = signal(0);
  private position: Position | undefined;
  private queue: Action[] = [];
  private scheduled = false;
  private loading = false;
  /** Messages of the user that the server has not confirmed, in the order of sending. */
  private outbox: Message[] = [];
  private draining = false;
  private loadedAt = 0;
  private typingSentAt = 0;
  private readonly clients = new Map<string, Person>();
  private reloadTimer: ReturnType<typeof setTimeout> | undefined;
  private typingTimer: ReturnType<typeof setTimeout> | undefined;

  constructor(
    readonly id: string,
    readonly channel: string,
    private readonly session: Session,
  ) {
    this.seenBefore.value = Number(localStorage.getItem(this.storageKey("read")) ?? 0);
    // The effect lives as long as the session, so messages written offline are sent even while another room is shown.
    effect(() => {
      if (session.connection.status.value.name === "connected") void this.drain();
    });
  }

  /** Subscribes to the channel; returns the function that ends the subscription. */
  open(): () => void {
    const leave = this.session.connection.subscribe(
      this.channel,
      {
        subscribed: ({ recovered, position }) => {
          this.position = position;
          if (!recovered || !this.state.peek().loaded) void this.load();
          void this.loadPresence();
        },
        publication: (publication, position) => {
          this.position = position;
          this.said(object(fromBytes(publication.data)));
        },
        join: (info) => this.present(info, true),
        leave: (info) => this.present(info, false),
        failed: (error) => {
          this.problem.value = error.message;
        },
      },
      this.state.peek().loaded ? this.position : undefined,
    );
    return () => {
      this.flush();
      leave();
    };
  }

  async load(): Promise<void> {
    if (this.loading) return;
    this.loading = true;
    this.flush();
    const asked = this.state.peek().clock;
    try {
      const reply = readHistory(await this.session.rpc("chat.history", { room: this.id, limit: PAGE }));
      this.flush();
      this.dispatch({ type: "history", ...reply, older: false, asked });
      this.problem.value = "";
    } catch (error) {
      if (this.session.connection.connected) this.problem.value = (error as Error).message;
    } finally {
      this.loading = false;
      this.loadedAt = Date.now();
    }
  }

  async loadOlder(): Promise<void> {
    const state = this.state.peek();
    const first = state.messages.find((message) => message.id > 0);
    if (!state.more || !first || this.loadingOlder.peek()) return;
    this.loadingOlder.value = true;
    try {
      const request = { room: this.id, before: first.id, limit: PAGE };
      const { clock } = this.state.peek();
      const reply = readHistory(await this.session.rpc("chat.history", request));
      this.dispatch({ type: "history", ...reply, older: true, asked: clock });
    } catch (error) {
      if (this.session.connection.connected) this.session.toast("bad", `Older messages: ${(error as Error).message}`);
    } finally {
      this.loadingOlder.value = false;
    }
  }

  send(text: string): void {
    const { user, name } = this.session.me;
    this.deliver({
      id: 0,
      nonce: randomHex(8),
      user,
      name,
      text,
      at: Date.now(),
      state: "sending",
      replyTo: 0,
      asker: "",
      error: "",
      attempt: 0,
      seq: null,
    });
  }

  /** Sends an unconfirmed message again with the same nonce, or asks for a failed answer again. */
  retry(message: Message): void {
    if (message.id === 0) this.deliver(message);
    else this.command("chat.retry", message);
  }

  stop(message: Message): void {
    this.command("chat.stop", message);
  }

  /** Deletes the room on the server, for everybody. */
  async remove(): Promise<void> {
    await this.session.rpc("chat.delete_room", { room: this.id });
  }

  discard(message: Message): void {
    this.dispatch({ type: "discard", nonce: message.nonce });
  }

  isTyping(): void {
    const now = Date.now();
    if (now - this.typingSentAt < TYPING_SENT_MS) return;
    this.typingSentAt = now;
    this.session.rpc("chat.typing", { room: this.id }).catch(() => undefined);
  }

  /** Marks all messages of the room as read. */
  markRead(): void {
    const last = this.lastId();
    if (last > 0) localStorage.setItem(this.storageKey("read"), String(last));
  }

  /** Marks later messages as new, because the window was left or the room is opened again. */
  markLeft(): void {
    this.seenBefore.value = Number(localStorage.getItem(this.storageKey("read")) ?? 0);
  }

  get draft(): string {
    return localStorage.getItem(this.storageKey("draft")) ?? "";
  }

  set draft(text: string) {
    try {
      if (text === "") localStorage.removeItem(this.storageKey("draft"));
      else localStorage.setItem(this.storageKey("draft"), text);
    } catch {
      // The browser's storage is full. The draft stays in the input field only.
    }
  }

  private deliver(message: Message): void {
    this.dispatch({
      type: "send",
      message: { ...message, state: this.session.connection.connected ? "sending" : "waiting" },
    });
    this.seenBefore.value = Infinity;
    this.typingSentAt = 0;
    this.outbox.push(message);
    void this.drain();
  }

  /** Sends the outbox one message at a time, since concurrent requests may arrive in any order. */
  private async drain(): Promise<void> {
    if (this.draining) return;
    this.draining = true;
    for (let next = this.outbox[0]; next && this.session.connection.connected; next = this.outbox[0]) {
      if (this.isPending(next) && !(await this.sendNow(next))) break;
      this.outbox.shift();
    }
    for (const { nonce } of this.outbox) this.dispatch({ type: "outgoing", nonce, state: "waiting", error: "" });
    this.draining = false;
  }

  /** Returns false if the message must be sent again. The nonce makes that idempotent. */
  private async sendNow({ text, nonce }: Message): Promise<boolean> {
    this.dispatch({ type: "outgoing", nonce, state: "sending", error: "" });
    try {
      const sent = readMessage(object(await this.session.rpc("chat.send", { room: this.id, text, nonce }))["message"]);
      if (sent) this.dispatch({ type: "message", message: { ...sent, nonce } });
    } catch (error) {
      if (error instanceof CommandError && error.code === ErrorCode.notConnected) return false;
      this.dispatch({ type: "outgoing", nonce, state: "failed", error: (error as Error).message });
    }
    return true;
  }

  /** Whether the message still waits: it was neither discarded nor confirmed by the channel. */
  private isPending({ nonce }: Message): boolean {
    return this.state.peek().messages.some((message) => message.id === 0 && message.nonce === nonce);
  }

  private command(method: string, message: Message): void {
    this.session.rpc(method, { message: message.id }).catch((error: Error) => this.session.toast("bad", error.message));
  }

  private said(event: JsonObject): void {
    switch (event["type"]) {
      case "message": {
        const message = readMessage(event["message"]);
        if (!message) return;
        this.queue.push({ type: "message", message });
        this.typing.value = this.typing.peek().filter((person) => person.user !== message.user);
        break;
      }
      case "delta":
        this.queue.push({
          type: "delta",
          id: num(event["id"]),
          seq: num(event["seq"]),
          attempt: num(event["attempt"]),
          text: str(event["text"]),
        });
        break;
      case "typing":
        this.isTypingHere(event);
        return;
      default:
        return;
    }
    this.schedule();
  }

  /** Applies queued actions once a frame, since deltas of an answer arrive faster than the screen draws. */
  private schedule(): void {
    if (this.scheduled) return;
    this.scheduled = true;
    const run = (): void => {
      if (this.scheduled) this.flush();
    };
    requestAnimationFrame(run);
    setTimeout(run, 100); // a hidden window gets no animation frames
  }

  private flush(): void {
    this.scheduled = false;
    const actions = this.queue;
    this.queue = [];
    if (actions.length === 0) return;
    this.state.value = actions.reduce(reduce, this.state.peek());
    if (this.state.peek().gap) this.reload();
  }

  /** Reloads at most once in `RELOAD_PAUSE_MS`, however many deltas are missing. */
  private reload(): void {
    this.reloadTimer ??= setTimeout(
      () => {
        this.reloadTimer = undefined;
        if (this.state.peek().gap) void this.load();
      },
      Math.max(0, this.loadedAt + RELOAD_PAUSE_MS - Date.now()),
    );
  }

  private dispatch(action: Action): void {
    this.state.value = reduce(this.state.peek(), action);
  }

  private isTypingHere(event: JsonObject): void {
    const user = str(event["user"]);
    if (user === "" || user === this.session.me.user) return;

    const until = Date.now() + TYPING_SHOWN_MS;
    const others = this.typing.peek().filter((person) => person.user !== user);
    this.typing.value = [...others, { user, name: str(event["name"], user), until }];

    clearTimeout(this.typingTimer);
    const expire = (): void => {
      const now = Date.now();
      this.typing.value = this.typing.peek().filter((person) => person.until > now);
      if (this.typing.peek().length > 0) this.typingTimer = setTimeout(expire, 1_000);
    };
    this.typingTimer = setTimeout(expire, TYPING_SHOWN_MS + 50);
  }

  private async loadPresence(): Promise<void> {
    try {
      const infos = await this.session.connection.presence(this.channel);
      this.clients.clear();
      for (const info of infos) this.clients.set(info.client, this.person(info));
      this.listPeople();
    } catch {
      this.people.value = []; // presence may be disabled for the namespace
    }
  }

  private present(info: ClientInfo, here: boolean): void {
    if (here) this.clients.set(info.client, this.person(info));
    else this.clients.delete(info.client);
    this.listPeople();
  }

  private listPeople(): void {
    const byUser = new Map<string, Person>();
    for (const person of this.clients.values()) byUser.set(person.user, person);
    this.people.value = [...byUser.values()].sort((a, b) => a.name.localeCompare(b.name));
  }

  private person(info: ClientInfo): Person {
    const named = (bytes: Uint8Array): Json | undefined =>
      bytes.length > 0 ? object(fromBytes(bytes))["name"] : undefined;
    // Not every token carries a name. A message of the user may have it.
    const known = this.state.peek().messages.find((message) => message.user === info.user)?.name;
    const own = info.user === this.session.me.user ? this.session.me.name : undefined;
    return { user: info.user, name: str(named(info.connInfo) ?? named(info.chanInfo) ?? own ?? known ?? info.user) };
  }

  private lastId(): number {
    const { messages } = this.state.peek();
    for (let i = messages.length - 1; i >= 0; i--) {
      const id = messages[i]?.id ?? 0;
      if (id > 0) return id;
    }
    return 0;
  }

  private storageKey(what: string): string {
    return `beamline.${what}:${this.session.me.user}:${this.id}`;
  }
}

const rooms = new WeakMap<Session, Map<string, Room>>();

export function roomOf(session: Session, id: string, channel: string): Room {
  let known = rooms.get(session);
  if (!known) rooms.set(session, (known = new Map()));
  let room = known.get(channel);
  if (!room) known.set(channel, (room = new Room(id, channel, session)));
  return room;
}

/** Forgets a deleted room, since a later one with the same name is another room. */
export function forgetRoom(session: Session, id: string): void {
  const known = rooms.get(session);
  for (const [channel, room] of known ?? []) if (room.id === id) known?.delete(channel);
}
