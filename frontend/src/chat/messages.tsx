// The list of messages, grouped by author and divided by day. It keeps its scroll position while messages arrive.
import { memo } from "../memo";
import { useEffect, useState } from "preact/hooks";
import { Avatar } from "../elements/avatar";
import { clock, day, moment } from "../format";
import { Icon } from "../icons";
import { Markdown } from "../markdown";
import type { Message } from "./reducer";
import type { Room } from "./room";
import { useScroll } from "./scroll";

/** Messages of one author within this time form a group. */
const GROUP_MS = 5 * 60_000;
/** After this time without output, the task probably waits for a provider. */
const THINKING_MS = 2_000;

/** What this person may do with answers that others asked for. */
export interface Powers {
  /** Delete the room, and stop any answer in it. */
  manages: boolean;
  /** Ask again for any answer. */
  operates: boolean;
}

interface ListProps {
  room: Room;
  me: string;
  assistant: string;
  powers: Powers;
}

export function MessageList({ room, me, assistant, powers }: ListProps) {
  const { messages, more, loaded } = room.state.value;
  const { box, content, following, unseen, toEnd, scrolled } = useScroll(room, messages, me);
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
          {more && <Older room={room} />}
          {!loaded && !room.problem.value && <Skeletons />}
          {loaded && messages.length === 0 && <Nothing assistant={assistant} />}
          {rows(messages, room.seenBefore.value, me).map(({ message, newDay, unread, grouped }) => (
            <div key={message.id > 0 ? message.id : message.nonce}>
              {newDay && <Separator kind="day" text={day(message.at)} />}
              {unread && <Separator kind="unread" text="New" />}
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
          ))}
        </div>
      </div>
      {(unseen > 0 || !following) && (
        <button type="button" class="to-end" onClick={toEnd}>
          <Icon name="down" /> {unseen > 0 ? `${unseen} new` : "Latest"}
        </button>
      )}
    </div>
  );
}

interface Row {
  message: Message;
  newDay: boolean;
  /** Whether this is the first message that the user has not seen. */
  unread: boolean;
  /** Whether the message continues the group of the one before it. */
  grouped: boolean;
}

/** Divides messages by day and by what the user has seen, and groups them by author. */
function rows(messages: Message[], seen: number, me: string): Row[] {
  const firstUnread =
    seen > 0 ? messages.findIndex((message, i) => i > 0 && message.id > seen && message.user !== me) : -1;
  return messages.map((message, i) => {
    const previous = messages[i - 1];
    const newDay = !previous || new Date(previous.at).toDateString() !== new Date(message.at).toDateString();
    const unread = i === firstUnread;
    const grouped = !newDay && !unread && previous.user === message.user && message.at - previous.at < GROUP_MS;
    return { message, newDay, unread, grouped };
  });
}

function Separator({ kind, text }: { kind: "day" | "unread"; text: string }) {
  return (
    <div class={kind} role="separator">
      <span>{text}</span>
    </div>
  );
}

function Older({ room }: { room: Room }) {
  return (
    <div class="older">
      {room.loadingOlder.value ? (
        <span class="spinner" aria-label="Loading older messages" />
      ) : (
        <button class="ghost small" type="button" onClick={() => void room.loadOlder()}>
          Older messages
        </button>
      )}
    </div>
  );
}

function Nothing({ assistant }: { assistant: string }) {
  return (
    <div class="empty">
      <Icon name="chat" />
      <strong>Nothing here yet</strong>
      <p>
        Say hello, or write <code>{assistant ? `@${assistant} status` : "a first message"}</code> to ask the assistant.
      </p>
    </div>
  );
}

/**
 * Whether this person sent the message, or asked for the answer. An older server does not name the asker, so everybody
 * is offered the buttons, and that server decides.
 */
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

interface FooterProps {
  message: Message;
  state: string;
  room: Room;
  mayStop: boolean;
  mayRetry: boolean;
}

function Footer({ message, state, room, mayStop, mayRetry }: FooterProps) {
  switch (state) {
    case "streaming":
      return mayStop ? (
        <footer>
          <button type="button" class="small" data-testid="stop" onClick={() => room.stop(message)}>
            <Icon name="stop" /> Stop <kbd>Esc</kbd>
          </button>
        </footer>
      ) : null;
    case "sending":
      return (
        <footer class="muted">
          <span role="status">Sending…</span>
        </footer>
      );
    case "waiting":
      return (
        <footer class="muted">
          <span role="status">Waiting for the connection</span>
          <Discard room={room} message={message} />
        </footer>
      );
    case "stopped":
      return <footer class="muted">Stopped</footer>;
    case "failed":
      return <FailedFooter room={room} message={message} mayRetry={mayRetry} />;
    default:
      return null;
  }
}

function FailedFooter({ room, message, mayRetry }: { room: Room; message: Message; mayRetry: boolean }) {
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
      {message.id === 0 && <Discard room={room} message={message} />}
    </footer>
  );
}

function Discard({ room, message }: { room: Room; message: Message }) {
  return (
    <button type="button" class="ghost small" onClick={() => room.discard(message)}>
      Discard
    </button>
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
