// The messages of a room as pure state. It merges the channel's events, the history and the user's unsent messages.
import { num, object, str, type Json } from "../json";

export type MessageState = "waiting" | "sending" | "done" | "streaming" | "failed" | "stopped";

export interface Message {
  /** 0 until the server has confirmed the message. */
  id: number;
  nonce: string;
  user: string;
  name: string;
  text: string;
  at: number;
  state: MessageState;
  replyTo: number;
  /** For an answer: the user who asked for it. */
  asker: string;
  error: string;
  /** For a streaming answer: the attempt and, in `seq`, its last delta that was applied; null if that is unknown. */
  attempt: number;
  seq: number | null;
}

export interface ChatState {
  messages: Message[];
  /** Whether older messages exist. */
  more: boolean;
  loaded: boolean;
  /** Whether a delta of an answer is missing, so that the room must be reloaded. */
  gap: boolean;
  /** Counts the changes that came from the channel. */
  clock: number;
  /** The value of `clock` when the channel last changed a message, by id. */
  changed: ReadonlyMap<number, number>;
}

export type Action =
  /** `asked` is the value of `clock` when the history was requested. */
  | { type: "history"; messages: Message[]; more: boolean; older: boolean; asked: number }
  | { type: "message"; message: Message }
  | { type: "delta"; id: number; seq: number; attempt: number; text: string }
  | { type: "send"; message: Message }
  /** The progress of a message that the server has not confirmed. */
  | { type: "outgoing"; nonce: string; state: "waiting" | "sending" | "failed"; error: string }
  | { type: "discard"; nonce: string };

export const emptyChat: ChatState = {
  messages: [],
  more: false,
  loaded: false,
  gap: false,
  clock: 0,
  changed: new Map(),
};

export function reduce(state: ChatState, action: Action): ChatState {
  switch (action.type) {
    case "history":
      return action.older ? prepend(state, action.messages, action.more) : reload(state, action);
    case "message":
      return touch({ ...state, messages: put(state.messages, action.message) }, action.message.id);
    case "delta":
      return append(state, action);
    case "send": {
      const others = state.messages.filter((m) => m.id > 0 || m.nonce !== action.message.nonce);
      return { ...state, messages: [...others, { ...action.message, id: 0, error: "" }] };
    }
    case "outgoing":
      return {
        ...state,
        messages: state.messages.map((m) =>
          m.id === 0 && m.nonce === action.nonce ? { ...m, state: action.state, error: action.error } : m,
        ),
      };
    case "discard":
      return { ...state, messages: state.messages.filter((m) => m.id > 0 || m.nonce !== action.nonce) };
  }
}

function touch(state: ChatState, id: number): ChatState {
  const clock = state.clock + 1;
  return { ...state, clock, changed: new Map(state.changed).set(id, clock) };
}

/**
 * Inserts a message in the order of ids. Unconfirmed messages stay last, and a confirmed one replaces the one with its
 * nonce.
 */
function put(messages: Message[], message: Message): Message[] {
  const mine = message.nonce === "" ? -1 : messages.findIndex((m) => m.id === 0 && m.nonce === message.nonce);
  const rest = mine < 0 ? messages : messages.filter((_, i) => i !== mine);

  const index = rest.findIndex((m) => m.id === 0 || m.id >= message.id);
  if (index < 0) return [...rest, message];
  const there = rest[index];
  if (there?.id !== message.id) return [...rest.slice(0, index), message, ...rest.slice(index)];

  // An unchanged text has the deltas that were applied to it, even if this version does not say how many.
  const seq = message.state === "streaming" && message.text === there.text ? there.seq : message.seq;
  return [...rest.slice(0, index), { ...message, seq }, ...rest.slice(index + 1)];
}

function append(state: ChatState, delta: { id: number; seq: number; attempt: number; text: string }): ChatState {
  const index = state.messages.findIndex((m) => m.id === delta.id);
  const message = state.messages[index];
  if (!message) return state.loaded ? { ...state, gap: true } : state;
  if (message.state !== "streaming" && delta.attempt <= message.attempt) return state;
  if (delta.attempt < message.attempt) return state;

  let { text } = message;
  let seq = message.seq;
  if (delta.attempt > message.attempt) {
    // A new attempt starts the text over. A text from a history that did not name the attempt is the newest: keep it.
    if (seq !== null || message.attempt > 0) {
      text = "";
      seq = 0;
    }
  }
  if (seq !== null && delta.attempt === message.attempt && seq > 0 && delta.seq <= seq) return state;
  if (seq !== null && delta.seq > seq + 1) return { ...state, gap: true };

  const next: Message = {
    ...message,
    text: text + delta.text,
    seq: delta.seq,
    attempt: delta.attempt,
    state: "streaming",
  };
  return touch({ ...state, messages: state.messages.map((m, i) => (i === index ? next : m)) }, delta.id);
}

function prepend(state: ChatState, older: Message[], more: boolean): ChatState {
  const first = state.messages.find((m) => m.id > 0)?.id ?? Infinity;
  return { ...state, messages: [...older.filter((m) => m.id < first), ...state.messages], more };
}

function reload(
  state: ChatState,
  { messages: fresh, more, asked }: { messages: Message[]; more: boolean; asked: number },
): ChatState {
  const from = fresh[0]?.id ?? Infinity;
  const last = fresh[fresh.length - 1]?.id ?? 0;
  const known = new Map(state.messages.map((m) => [m.id, m]));
  const nonces = new Set(fresh.map((m) => m.nonce).filter((nonce) => nonce !== ""));

  // Keep older messages only if the known ones overlap with the reloaded ones; otherwise there is a gap between them.
  const joins = fresh.some((m) => known.has(m.id));
  const before = joins ? state.messages.filter((m) => m.id > 0 && m.id < from) : [];
  const after = state.messages.filter((m) => m.id > last);
  const pending = state.messages.filter((m) => m.id === 0 && !nonces.has(m.nonce));

  const since = (id: number): boolean => (state.changed.get(id) ?? 0) > asked;
  return {
    ...state,
    messages: [...before, ...fresh.map((m) => (since(m.id) ? later(known.get(m.id), m) : m)), ...after, ...pending],
    more: before.length > 0 ? state.more : more,
    loaded: true,
    gap: false,
    // A later history contains all changes up to its request, so older entries are not needed any more.
    changed: new Map([...state.changed].filter(([, clock]) => clock > asked)),
  };
}

/**
 * Chooses between two versions of a message that the channel changed while the history was on its way: the one that has
 * progressed further. A late history does not make an ended answer stream again; only the channel does, after a retry.
 */
function later(held: Message | undefined, fresh: Message): Message {
  if (!held || fresh.state !== "streaming") return fresh;
  if (held.state !== "streaming") return held;
  const ahead = fresh.attempt - held.attempt || (fresh.seq ?? 0) - (held.seq ?? 0);
  return ahead > 0 ? fresh : held;
}

/** Reads a message as the server writes it. Returns null if it has no id. */
export function readMessage(from: Json | undefined): Message | null {
  const m = object(from);
  const id = num(m["id"]);
  if (id <= 0) return null;
  const state = str(m["state"], "done");
  const known: MessageState = state === "streaming" || state === "failed" || state === "stopped" ? state : "done";
  const text = str(m["text"]);
  const seq = typeof m["seq"] === "number" ? num(m["seq"]) : known === "streaming" && text === "" ? 0 : null;
  return {
    id,
    nonce: str(m["nonce"]),
    user: str(m["user"]),
    name: str(m["name"]) || str(m["user"]),
    text,
    at: num(m["at"]),
    state: known,
    replyTo: num(m["reply_to"]),
    asker: str(m["asker"]),
    error: str(m["error"]),
    attempt: num(m["attempt"]),
    seq,
  };
}

export function readHistory(from: Json): { messages: Message[]; more: boolean } {
  const reply = object(from);
  const listed = Array.isArray(reply["messages"]) ? reply["messages"] : [];
  const messages = listed.map(readMessage).filter((m): m is Message => m !== null);
  return { messages, more: reply["more"] === true };
}
