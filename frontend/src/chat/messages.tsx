// The list of messages, grouped by author and divided by day. It keeps its scroll position while messages arrive.
import { memo } from "../memo";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { Avatar } from "../elements/avatar";
import { clock, day, moment } from "../format";
import { Icon } from "../icons";
import { Markdown } from "../markdown";
import type { Message } from "./reducer";
import type { Room } from "./room";

/** Messages of one author within this time form a group. */
const GROUP_MS = 5 * 60_000;
/** Distance from the end, in pixels, within which the list follows new messages. */
const NEAR_END = 48;
/** Distance from the top, in pixels, at which older messages are loaded. */
const NEAR_TOP = 120;
/** After this time without output, the task probably waits for a provider. */
const THINKING_MS = 2_000;

/** What this person may do with answers that others asked for. */
export interface Powers {
  /** Delete the room, and stop any answer in it. */
  manages: boolean;
  /** Ask again for any answer. */
  operates: boolean;
}

export function MessageList({
  room,
  me,
  assistant,
  powers,
}: {
  room: Room;
  me: string;
  assistant: string;
  powers: Powers;
}) {
  const { messages, more, loaded } = room.state.value;
  const seen = room.seenBefore.value;
  const box = useRef<HTMLDivElement>(null);
  const content = useRef<HTMLDivElement>(null);
  const follow = useRef(true);
  const before = useRef({ first: 0, height: 0 });
  const [away, setAway] = useState(0);
  const lastId = messages[messages.length - 1]?.id ?? 0;
  const lastSeenAtEnd = useRef(0);

  const toEnd = (): void => {
    const el = box.current;
    if (el) el.scrollTop = el.scrollHeight;
    follow.current = true;
    setAway(0);
  };

  useLayoutEffect(() => {
    const el = box.current;
    if (!el) return;
    const first = messages[0]?.id ?? 0;
    const grown = el.scrollHeight - before.current.height;

    const last = messages[messages.length - 1]?.state;
    const mine = last === "sending" || last === "waiting";
    // After older messages were inserted above, scroll by their height so that the visible ones stay in place.
    if (follow.current || mine) toEnd();
    else if (first < before.current.first && grown > 0) el.scrollTop += grown;
    before.current = { first, height: el.scrollHeight };

    if (follow.current && !document.hidden) {
      lastSeenAtEnd.current = lastId;
      room.markRead();
    } else setAway(messages.filter((m) => m.id > lastSeenAtEnd.current && m.user !== me).length);
  }, [messages]);

  useEffect(() => {
    const el = box.current;
    const inner = content.current;
    if (!el || !inner) return;
    // Images, fonts and a resized window change the height without a new message.
    const observer = new ResizeObserver(() => {
      if (follow.current) el.scrollTop = el.scrollHeight;
      before.current.height = el.scrollHeight;
    });
    observer.observe(inner);
    observer.observe(el);

    const visible = (): void => {
      if (document.hidden) room.markLeft();
      else if (follow.current) room.markRead();
    };

    document.addEventListener("visibilitychange", visible);
    return () => {
      observer.disconnect();
      document.removeEventListener("visibilitychange", visible);
    };
  }, [room]);

  const scrolled = (): void => {
    const el = box.current;
    if (!el) return;
    follow.current = el.scrollHeight - el.scrollTop - el.clientHeight < NEAR_END;
    if (follow.current) {
      lastSeenAtEnd.current = lastId;
      setAway(0);
      room.markRead();
    }
    if (el.scrollTop < NEAR_TOP) void room.loadOlder();
  };

  let marked = false;
  return (
    <div class="messages-wrap">
      <div
        class="messages"
        ref={box}
        onScroll={scrolled}
        tabIndex={0}
        role="log"
        aria-live="polite"
        aria-relevant="additions"
        aria-label="Messages"
      >
        <div class="messages-content" ref={content}>
          {more && (
            <div class="older">
              {room.loadingOlder.value ? (
                <span class="spinner" aria-label="Loading older messages" />
              ) : (
                <button class="ghost small" type="button" onClick={() => void room.loadOlder()}>
                  Older messages
                </button>
              )}
            </div>
          )}
          {!loaded && !room.problem.value && <Skeletons />}
          {loaded && messages.length === 0 && (
            <div class="empty">
              <Icon name="chat" />
              <strong>Nothing here yet</strong>
              <p>
                Say hello, or write <code>{assistant ? `@${assistant} status` : "a first message"}</code> to ask the
                assistant.
              </p>
            </div>
          )}
          {messages.map((message, i) => {
            const previous = messages[i - 1];
            const newDay = !previous || new Date(previous.at).toDateString() !== new Date(message.at).toDateString();
            const unread = !marked && seen > 0 && message.id > seen && message.user !== me && previous !== undefined;
            if (unread) marked = true;
            const grouped =
              !newDay && !unread && previous?.user === message.user && message.at - previous.at < GROUP_MS;
            return (
              <div key={message.id > 0 ? message.id : message.nonce}>
                {newDay && (
                  <div class="day" role="separator">
                    <span>{day(message.at)}</span>
                  </div>
                )}
                {unread && (
                  <div class="unread" role="separator">
                    <span>New</span>
                  </div>
                )}
                <MessageView
                  message={message}
                  grouped={grouped}
                  mine={message.user === me}
                  assistant={message.user === assistant}
                  room={room}
                  mayStop={powers.manages || isMine(message, me)}
                  mayRetry={powers.operates || isMine(message, me)}
                />
              </div>
            );
          })}
        </div>
      </div>
      {(away > 0 || !follow.current) && (
        <button type="button" class="to-end" onClick={toEnd}>
          <Icon name="down" /> {away > 0 ? `${away} new` : "Latest"}
        </button>
      )}
    </div>
  );
}

/** Whether this person sent the message, or asked for the answer. An older server does not say who asked: it decides itself. */
export const isMine = (message: Message, me: string): boolean =>
  message.user === me || message.asker === me || message.asker === "";

interface MessageProps {
  message: Message;
  grouped: boolean;
  mine: boolean;
  assistant: boolean;
  room: Room;
  mayStop: boolean;
  mayRetry: boolean;
}

const MessageView = memo(function MessageView({
  message,
  grouped,
  mine,
  assistant,
  room,
  mayStop,
  mayRetry,
}: MessageProps) {
  const streaming = message.state === "streaming";
  const state = message.state === "done" ? "sent" : message.state;
  return (
    <article
      class={`message ${grouped ? "grouped" : ""} ${assistant ? "assistant" : ""} ${mine ? "mine" : ""} ${state}`}
      data-testid="message"
      data-state={state}
      data-user={message.user}
      data-id={message.id}
      aria-busy={streaming}
    >
      {grouped ? (
        <time class="gutter" dateTime={new Date(message.at).toISOString()} title={moment(message.at)}>
          {clock(message.at)}
        </time>
      ) : (
        <Avatar name={message.name} id={message.user} assistant={assistant} />
      )}
      <div class="message-main">
        {!grouped && (
          <header>
            <strong class="author">{message.name}</strong>
            {assistant && <span class="tag">assistant</span>}
            <time dateTime={new Date(message.at).toISOString()} title={moment(message.at)}>
              {clock(message.at)}
            </time>
          </header>
        )}
        <div class="body" data-testid="message-text">
          {streaming && message.text === "" ? (
            <Thinking />
          ) : (
            <Markdown text={message.text} tail={streaming ? <span class="caret" aria-hidden="true" /> : undefined} />
          )}
        </div>
        <Footer message={message} state={state} room={room} mayStop={mayStop} mayRetry={mayRetry} />
      </div>
    </article>
  );
});

/** A placeholder for an answer without text. After a while it says that the task waits for a provider. */
function Thinking() {
  const [long, setLong] = useState(false);
  useEffect(() => {
    const timer = setTimeout(() => setLong(true), THINKING_MS);
    return () => clearTimeout(timer);
  }, []);
  return (
    <span class="thinking">
      <span class="spinner" /> {long ? "Waiting for a provider…" : "Thinking…"}
    </span>
  );
}

function Footer({
  message,
  state,
  room,
  mayStop,
  mayRetry,
}: {
  message: Message;
  state: string;
  room: Room;
  mayStop: boolean;
  mayRetry: boolean;
}) {
  if (state === "streaming") {
    if (!mayStop) return null;
    return (
      <footer>
        <button type="button" class="small" data-testid="stop" onClick={() => room.stop(message)}>
          <Icon name="stop" /> Stop <kbd>Esc</kbd>
        </button>
      </footer>
    );
  }
  if (state === "sending")
    return (
      <footer class="muted">
        <span role="status">Sending…</span>
      </footer>
    );
  if (state === "waiting") {
    return (
      <footer class="muted">
        <span role="status">Waiting for the connection</span>
        <button type="button" class="ghost small" onClick={() => room.discard(message)}>
          Discard
        </button>
      </footer>
    );
  }
  if (state === "stopped") return <footer class="muted">Stopped</footer>;
  if (state !== "failed") return null;
  return (
    <footer class="bad">
      <span role="alert">
        {message.id === 0 ? "Not sent" : "The answer failed"}
        {message.error ? `: ${message.error}` : ""}
      </span>
      {mayRetry && (
        <button type="button" class="small" data-testid="retry" onClick={() => room.retry(message)}>
          <Icon name="retry" /> Retry
        </button>
      )}
      {message.id === 0 && (
        <button type="button" class="ghost small" onClick={() => room.discard(message)}>
          Discard
        </button>
      )}
    </footer>
  );
}

function Skeletons() {
  return (
    <div class="skeletons delayed" aria-hidden="true">
      {[62, 38, 80, 51].map((width) => (
        <div class="skeleton-row" key={width}>
          <span class="skeleton round" />
          <span class={`skeleton line w${width}`} />
        </div>
      ))}
    </div>
  );
}
