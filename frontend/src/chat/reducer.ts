// The messages of a room as a pure state: merges the channel's events, history and the user's unsent messages.
import { num, object, str, type Json } from "../json";

export type MessageState = "waiting" | "sending" | "done" | "streaming" | "failed" | "stopped";

export interface Message {
  /** 0 until the server has assigned one. */
  id: number;
  nonce: string;
  user: string;
  name: string;
  text: string;
  at: number;
  state: MessageState;
  replyTo: number;
  /** Of an answer: who asked for it. */
  asker: string;
  error: string;
  /** For a streaming answer: the attempt and, in `seq`, the last delta applied; null if history did not say. */
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
  /** Counts what the channel has said. */
  clock: number;
  /** When the channel last changed a message, by id. */
  changed: ReadonlyMap<number, number>;
}

export type Action =
  /** `asked`: the clock when the history was asked for. */
  | { type: "history"; messages: Message[]; more: boolean; older: boolean; asked: number }
  | { type: "message"; message: Message }
  | { type: "delta"; id: number; seq: number; attempt: number; text: string }
  | { type: "send"; message: Message }
  /** The progress of an unconfirmed message of the user. */
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

/** By id; ours that have none yet stay last, and the echo of one takes its place. */
function put(messages: Message[], message: Message): Message[] {
  const mine = message.nonce === "" ? -1 : messages.findIndex((m) => m.id === 0 && m.nonce === message.nonce);
  const rest = mine < 0 ? messages : messages.filter((_, i) => i !== mine);
  const index = rest.findIndex((m) => m.id === 0 || m.id >= message.id);
  if (index < 0) return [...rest, message];
  const there = rest[index];
  if (there?.id !== message.id) return [...rest.slice(0, index), message, ...rest.slice(index)];
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
    // Without a known attempt (from history) the text is the newest one, so keep it.
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
    // What was said before the next history is asked for is in that history.
    changed: new Map([...state.changed].filter(([, clock]) => clock > asked)),
  };
}

/**
 * Of a message that the channel changed while its history was on the way, the state that is further on. An answer that
 * has ended does not stream again by a late history; one that was asked for anew does so by the channel.
 */
function later(held: Message | undefined, fresh: Message): Message {
  if (!held || fresh.state !== "streaming") return fresh;
  if (held.state !== "streaming") return held;
  const ahead = fresh.attempt - held.attempt || (fresh.seq ?? 0) - (held.seq ?? 0);
  return ahead > 0 ? fresh : held;
}

/** A message as the server writes it; null if it is none. */
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
