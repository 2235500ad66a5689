// The scroll position of a list of messages. It follows new messages while the end is in view, stays in place while
// older ones are inserted above, and marks messages as read.
import type { RefObject } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import type { Message } from "./reducer";
import type { Room } from "./room";

/** Distance from the end, in pixels, within which the list follows new messages. */
const NEAR_END = 48;
/** Distance from the top, in pixels, at which older messages are loaded. */
const NEAR_TOP = 120;

export interface Scroll {
  box: RefObject<HTMLDivElement | null>;
  content: RefObject<HTMLDivElement | null>;
  /** Whether the list follows new messages. */
  following: boolean;
  /** How many messages of others arrived below the view. */
  unseen: number;
  toEnd(): void;
  scrolled(): void;
}

export function useScroll(room: Room, messages: Message[], me: string): Scroll {
  const box = useRef<HTMLDivElement>(null);
  const content = useRef<HTMLDivElement>(null);
  const follow = useRef(true);
  /** The first message and the height at the last layout. */
  const before = useRef({ first: 0, height: 0 });
  const lastSeen = useRef(0);
  const [unseen, setUnseen] = useState(0);
  const lastId = messages[messages.length - 1]?.id ?? 0;

  const toEnd = (): void => {
    const el = box.current;
    if (el) el.scrollTop = el.scrollHeight;
    follow.current = true;
    setUnseen(0);
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
      lastSeen.current = lastId;
      room.markRead();
    } else setUnseen(messages.filter((m) => m.id > lastSeen.current && m.user !== me).length);
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
    return () => observer.disconnect();
  }, [room]);

  useEffect(() => {
    const visible = (): void => {
      if (document.hidden) room.markLeft();
      else if (follow.current) room.markRead();
    };
    document.addEventListener("visibilitychange", visible);
    return () => document.removeEventListener("visibilitychange", visible);
  }, [room]);

  const scrolled = (): void => {
    const el = box.current;
    if (!el) return;
    follow.current = el.scrollHeight - el.scrollTop - el.clientHeight < NEAR_END;
    if (follow.current) {
      lastSeen.current = lastId;
      setUnseen(0);
      room.markRead();
    }
    if (el.scrollTop < NEAR_TOP) void room.loadOlder();
  };
  return { box, content, following: follow.current, unseen, toEnd, scrolled };
}
