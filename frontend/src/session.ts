// One page's app session: its tree, the events it sends and where it is. Transport below, elements above.
import { effect, signal } from "@preact/signals";
import { back, forward, type Back, type Failure, type Forward } from "./codec/app";
import type { Partially } from "./codec/proto";
import type { Connection } from "./connection";
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
  /** A run was asked for and has not finished. */
  readonly busy = signal(false);
  readonly location = signal("");
  /** The dialog over the page: to jump to a place, or to make a room. */
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
    // The channel is subscribed before the first run, so that nothing the run says can be missed.
    this.connection.subscribe(`app:${this.id}#${this.me.user}`, {
      subscribed: ({ recovered }) => {
        const whole = this.started && recovered && !this.wantsTree;
        this.started = true;
        this.rerun(!whole);
      },
      publication: (publication) => this.receive(forward.decode(publication.data)),
      failed: (error) => {
        this.failure.value = { message: `this page cannot be opened: ${error.message}`, traceId: "" };
      },
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
    // Not behind what it is to stop.
    this.connection.rpc("app.event", back.encode({ version: VERSION, session: this.id, stop: {} })).catch(() => undefined);
  }

  rerun(reset = false): void {
    if (reset) this.wantsTree = true;
    this.say({ rerun: { path: location.pathname, query: location.search.slice(1), reset: this.wantsTree } });
  }

  /** Goes to a place inside the app; the address bar always holds a link that can be shared. */
  go(href: string): void {
    const url = new URL(href, location.href);
    if (url.origin !== location.origin) {
      location.assign(url);
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

  private arrived(): void {
    this.location.value = here();
    this.rerun();
  }

  /** In order, one at a time: the server may take two that are on their way at once in either order. */
  private say(message: Partially<Back>): void {
    this.busy.value = true;
    const last = this.queue[this.queue.length - 1];
    if (message.rerun && last?.rerun) last.rerun = { ...message.rerun, reset: Boolean(message.rerun.reset || last.rerun.reset) };
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
        // A lost connection has its own banner, and the page reruns when it is back; what was done meanwhile is lost.
        if (this.connection.connected) this.toast("bad", `The server did not take that: ${(error as Error).message}`);
        else if (!next.rerun) this.toast("bad", "That was not sent: the connection is lost.");
      }
    }
    this.sending = false;
  }

  private receive(message: Forward): void {
    if (message.deltas) {
      const { delta } = message.deltas;
      if (this.wantsTree) {
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

const here = (): string => location.pathname + location.search;

/** 128 random bits, kept as long as the tab: a reload finds its session again. */
export function sessionId(): string {
  const kept = sessionStorage.getItem("beamline.session");
  if (kept) return kept;
  const made = randomHex(16);
  sessionStorage.setItem("beamline.session", made);
  return made;
}

export function randomHex(bytes: number): string {
  return [...crypto.getRandomValues(new Uint8Array(bytes))].map((b) => b.toString(16).padStart(2, "0")).join("");
}
