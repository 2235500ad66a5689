// The message composer. It grows with the text, keeps a draft for each room and completes names after an @.
import type { RefObject } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { Icon } from "../icons";
import type { Room } from "./room";
import { bytesLeft, completions, mentionsWithoutEffect } from "./text";

const MAX_HEIGHT = 220;

interface ComposerProps {
  room: Room;
  title: string;
  names: string[];
  assistant: string;
}

export function Composer({ room, title, names, assistant }: ComposerProps) {
  const [text, setText] = useState(room.draft);
  const field = useRef<HTMLTextAreaElement>(null);
  useHeightOf(field, text);
  useFocusAtStart(field);

  const change = (value: string): void => {
    setText(value);
    mentions.restart();
    room.draft = value;
    if (value.trim() !== "") room.isTyping();
  };
  const mentions = useMentions(text, names, (completed) => {
    change(completed);
    field.current?.focus();
  });

  const left = bytesLeft(text);
  const tooLong = left !== null && left < 0;
  const sendable = text.trim() !== "" && !tooLong;
  const send = (): void => {
    if (!sendable) return;
    room.send(text.trim());
    setText("");
    room.draft = "";
    field.current?.focus();
  };

  const key = (event: KeyboardEvent): void => {
    if (event.isComposing || mentions.handle(event)) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      send();
    }
  };

  const { chosen } = mentions;
  return (
    <form
      class="composer"
      onSubmit={(event) => {
        event.preventDefault();
        send();
      }}
    >
      <MentionList mentions={mentions} />
      <textarea
        ref={field}
        rows={1}
        value={text}
        aria-invalid={tooLong}
        aria-describedby="composer-note"
        data-testid="composer"
        data-focus="/"
        placeholder={`Message ${title}`}
        aria-label={`Message ${title}`}
        aria-autocomplete="list"
        {...(chosen === undefined ? {} : { "aria-controls": "mentions", "aria-activedescendant": `mention-${chosen}` })}
        onInput={(event) => change(event.currentTarget.value)}
        onKeyDown={key}
      />
      <SendButton disabled={!sendable} />
      <Note bad={tooLong} text={chosen === undefined || left !== null ? note(text, left, assistant) : ""} />
    </form>
  );
}

/** What the line below the field says: how much fits, or how to address the assistant. */
function note(text: string, left: number | null, assistant: string): string {
  if (left !== null) return left < 0 ? `${-left} bytes too long` : `${left} bytes left`;
  return mentionsWithoutEffect(text, assistant) ? `Start the message with @${assistant} to ask the assistant.` : "";
}

function useHeightOf(field: RefObject<HTMLTextAreaElement | null>, text: string): void {
  useLayoutEffect(() => {
    const el = field.current;
    if (!el) return;
    // The scroll height only shrinks if the height is reset first.
    el.style.height = "auto";
    el.style.height = `${Math.min(el.scrollHeight, MAX_HEIGHT)}px`;
  }, [text]);
}

function useFocusAtStart(field: RefObject<HTMLTextAreaElement | null>): void {
  useEffect(() => {
    // Not on touch screens, where focus would open the keyboard over the messages.
    if (matchMedia("(pointer: fine)").matches) field.current?.focus();
  }, []);
}

interface Mentions {
  matches: string[];
  chosen: string | undefined;
  complete(name: string): void;
  /** Offers names again, from the first one, after the text has changed. */
  restart(): void;
  /** Returns whether the key chose, completed or dismissed a name. */
  handle(event: KeyboardEvent): boolean;
}

/** Completes the name that is being typed after an @, with the keyboard or a click. */
function useMentions(text: string, names: string[], completed: (text: string) => void): Mentions {
  const [choice, setChoice] = useState(0);
  const [dismissed, setDismissed] = useState(false);
  const { partial, matches: found } = completions(text, names);
  const matches = dismissed ? [] : found;
  const chosen = matches[Math.min(choice, matches.length - 1)];

  const complete = (name: string): void => completed(`${text.slice(0, text.length - partial.length)}${name} `);
  const handle = (event: KeyboardEvent): boolean => {
    if (chosen === undefined) return false;
    switch (event.key) {
      case "Tab":
      case "Enter":
        event.preventDefault();
        complete(chosen);
        return true;
      case "ArrowDown":
      case "ArrowUp":
        event.preventDefault();
        setChoice((choice + (event.key === "ArrowDown" ? 1 : matches.length - 1)) % matches.length);
        return true;
      case "Escape":
        // Escape would also stop a streaming answer.
        event.stopPropagation();
        setDismissed(true);
        return true;
      default:
        return false;
    }
  };

  const restart = (): void => {
    setChoice(0);
    setDismissed(false);
  };
  return { matches, chosen, complete, restart, handle };
}

function MentionList({ mentions: { matches, chosen, complete } }: { mentions: Mentions }) {
  if (matches.length === 0) return null;
  return (
    <ul class="mentions" role="listbox" aria-label="People" id="mentions">
      {matches.map((name) => (
        <li
          key={name}
          id={`mention-${name}`}
          role="option"
          aria-selected={name === chosen}
          onMouseDown={(event) => {
            // Keeps the focus in the field.
            event.preventDefault();
            complete(name);
          }}
        >
          @{name}
        </li>
      ))}
    </ul>
  );
}

function SendButton({ disabled }: { disabled: boolean }) {
  return (
    <button
      type="submit"
      class="primary icon-button"
      data-testid="send"
      disabled={disabled}
      aria-label="Send"
      title="Send (Enter)"
    >
      <Icon name="send" />
    </button>
  );
}

function Note({ text, bad }: { text: string; bad: boolean }) {
  return (
    <span id="composer-note" class={`composer-note ${bad ? "bad" : ""}`} role="status" data-testid="composer-note">
      {text}
    </span>
  );
}
