// The app session of a page: its element tree, its location and the events it sends. It sits between the connection and
// the elements.
import { effect, signal } from "@preact/signals";
import { back, forward, type Back, type Failure, type Forward } from "./codec/app";
import type { Partially } from "./codec/proto";
import type { Connection } from "./connection";
import { internalHref } from "./href";
import { fromBytes, toBytes, type Json } from "./json";
import { OutOfStep, Store } from "./store";

export interface User {
  user: string;
  name: string;
}

export interface ToastNote {
  id: number;
  tone: string;
  text: string;
}

const VERSION = 1;
const TOAST_MS = 6_000;

export class Session {
  readonly store = new Store();
  readonly failure = signal<Failure | null>(null);
  readonly toasts = signal<ToastNote[]>([]);
  /** Whether a run was requested and has not finished. */
  readonly busy = signal(false);
  readonly location = signal("");
  /** The open dialog: "place" jumps to a page or room, "room" creates a room. */
  readonly dialog = signal<"" | "place" | "room">("");
  private wantsTree = true;
  private started = false;
  private readonly queue: Partially<Back>[] = [];
  private sending = false;
  private lastToast = 0;

  constructor(
    readonly connection: Connection,
    readonly me: User,
    private readonly id: string,
  ) {
    this.location.value = here();
  }

  start(): void {
    // Subscribe before the first run, so that no message of the run is missed.
    this.connection.subscribe(`app:${this.id}#${this.me.user}`, {
      subscribed: ({ recovered }) => {
        const whole = this.started && recovered && !this.wantsTree;
        this.started = true;
        this.rerun(!whole);
      },
      publication: (publication) => {
        const message = decode(publication.data);
        if (message) this.receive(message);
        else this.fail("received an unreadable message");
      },
      failed: (error) => this.fail(`cannot open this page: ${error.message}`),
    });

    window.addEventListener("popstate", () => this.arrived());
    effect(() => {
      if (this.store.title.value) document.title = this.store.title.value;
    });
  }

  event(key: string, value: Json): void {
    if (key !== "") this.say({ event: { key, value: JSON.stringify(value) } });
  }

  submit(form: string, values: { key: string; value: Json }[]): void {
    this.say({ submit: { form, values: values.map(({ key, value }) => ({ key, value: JSON.stringify(value) })) } });
  }

  stop(): void {
    if (!this.busy.peek()) return;
    // Bypass the queue: the stop must not wait behind the run that it stops.
    const stop = back.encode({ version: VERSION, session: this.id, stop: {} });
    this.connection.rpc("app.event", stop).catch(() => undefined);
  }

  rerun(reset = false): void {
    if (reset) this.wantsTree = true;
    this.say({ rerun: { path: location.pathname, query: location.search.slice(1), reset: this.wantsTree } });
  }

  /** Goes to a place inside the app only. The address bar always holds a link that can be shared. */
  go(href: string): void {
    const url = internalHref(href);
    if (!url) {
      this.toast("bad", "That link leads outside this app.");
      return;
    }
    if (url.pathname + url.search !== here()) history.pushState(null, "", url);
    this.arrived();
  }

  async rpc(method: string, request: Json): Promise<Json> {
    return fromBytes(await this.connection.rpc(method, toBytes(request)));
  }

  toast(tone: string, text: string): void {
    const note = { id: ++this.lastToast, tone, text };
    this.toasts.value = [...this.toasts.peek().slice(-3), note];
    setTimeout(() => this.dismiss(note.id), TOAST_MS);
  }

  dismiss(id: number): void {
    this.toasts.value = this.toasts.peek().filter((note) => note.id !== id);
  }

  private fail(message: string): void {
    this.busy.value = false;
    this.failure.value = { message, traceId: "" };
  }

  private arrived(): void {
    this.location.value = here();
    this.rerun();
  }

  /**
   * Queues a message. Messages go out one at a time, since the server may handle concurrent ones in any order. Of
   * several reruns in a row only the last is sent.
   */
  private say(message: Partially<Back>): void {
    this.busy.value = true;
    const last = this.queue[this.queue.length - 1];
    if (message.rerun && last?.rerun)
      last.rerun = { ...message.rerun, reset: Boolean(message.rerun.reset || last.rerun.reset) };
    else this.queue.push(message);
    if (!this.sending) void this.send();
  }

  private async send(): Promise<void> {
    this.sending = true;
    for (let next = this.queue.shift(); next; next = this.queue.shift()) {
      try {
        await this.connection.rpc("app.event", back.encode({ version: VERSION, session: this.id, ...next }));
      } catch (error) {
        if (this.queue.length === 0) this.busy.value = false;
        // A lost connection has its own banner, and the page reruns after the reconnect. Events in between are dropped.
        if (this.connection.connected) this.toast("bad", `The server refused the action: ${(error as Error).message}`);
        else if (!next.rerun) this.toast("bad", "Not sent: the connection is lost. Try again once it is back.");
      }
    }
    this.sending = false;
  }

  private receive(message: Forward): void {
    if (message.deltas) {
      const { delta } = message.deltas;
      if (this.wantsTree) {
        // Until a reset arrives, deltas belong to a tree that this page does not have.
        const first = delta.findIndex((one) => one.reset);
        if (first < 0) return;
        this.wantsTree = false;
      }
      try {
        this.store.apply(delta);
      } catch (error) {
        if (!(error instanceof OutOfStep)) throw error;
        this.rerun(true);
      }
    } else if (message.runFinished) {
      this.busy.value = false;
      this.failure.value = null;
    } else if (message.error) {
      this.busy.value = false;
      this.failure.value = message.error;
    } else if (message.navigate) {
      const { path, query } = message.navigate;
      this.go(query ? `${path}?${query}` : path);
    } else if (message.toast) {
      this.toast(message.toast.tone, message.toast.text);
    }
  }
}

/** Returns null if the message is unreadable. */
function decode(bytes: Uint8Array): Forward | null {
  try {
    return forward.decode(bytes);
  } catch {
    return null;
  }
}

const here = (): string => location.pathname + location.search;

const KEPT_ID = "beamline.session";
/** How long to wait for the lock: after a reload, the previous page releases it at once. */
const CLAIM_MS = 1_000;

/**
 * Returns the session id of this page: 128 random bits, kept as long as the tab, so that a reload finds its session. A
 * duplicated tab starts with a copy of the id. So pages claim their id, and one that cannot takes a new one.
 */
export async function sessionId(claim: (id: string) => Promise<boolean> = claimed): Promise<string> {
  const kept = sessionStorage.getItem(KEPT_ID);
  if (kept && (await claim(kept))) return kept;

  const made = randomHex(16);
  sessionStorage.setItem(KEPT_ID, made);
  await claim(made);
  return made;
}

/** Claims an id for as long as the page lives. Returns false if another page holds it. */
async function claimed(id: string): Promise<boolean> {
  // Without a secure context (http:// to another host) there are no locks, so every page gets a new session.
  if (!navigator.locks) return false;
  return new Promise((resolve) => {
    const held = new Promise<never>(() => undefined);
    const asked = navigator.locks.request(`beamline.session:${id}`, { signal: AbortSignal.timeout(CLAIM_MS) }, () => {
      resolve(true);
      return held;
    });
    asked.catch(() => resolve(false));
  });
}

export function randomHex(bytes: number): string {
  return [...crypto.getRandomValues(new Uint8Array(bytes))].map((b) => b.toString(16).padStart(2, "0")).join("");
}
