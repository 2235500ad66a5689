// The message composer. It grows with the text, keeps a draft for each room and completes names after an @.
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { Icon } from "../icons";
import type { Room } from "./room";
import { bytesLeft, mentionsWithoutEffect } from "./text";

const MAX_HEIGHT = 220;

export function Composer({
  room,
  title,
  names,
  assistant,
}: {
  room: Room;
  title: string;
  names: string[];
  assistant: string;
}) {
  const [text, setText] = useState(room.draft);
  const [choice, setChoice] = useState(0);
  const [dismissed, setDismissed] = useState(false);
  const field = useRef<HTMLTextAreaElement>(null);

  const partial = /(?:^|\s)@([\w.-]*)$/.exec(text)?.[1];
  const matches =
    partial === undefined || dismissed
      ? []
      : names.filter((name) => name.toLowerCase().startsWith(partial.toLowerCase()) && name !== partial).slice(0, 6);
  const left = bytesLeft(text);
  const tooLong = left !== null && left < 0;
  const note =
    left !== null
      ? tooLong
        ? `${-left} bytes too long`
        : `${left} bytes left`
      : matches.length === 0 && mentionsWithoutEffect(text, assistant)
        ? `Start the message with @${assistant} to ask the assistant.`
        : "";
  const chosen = matches[Math.min(choice, matches.length - 1)];

  useLayoutEffect(() => {
    const el = field.current;
    if (!el) return;
    el.style.height = "auto";
    el.style.height = `${Math.min(el.scrollHeight, MAX_HEIGHT)}px`;
  }, [text]);

  useEffect(() => {
    // Not on touch screens, where focus would open the keyboard over the messages.
    if (matchMedia("(pointer: fine)").matches) field.current?.focus();
  }, []);

  const change = (value: string): void => {
    setText(value);
    setChoice(0);
    setDismissed(false);
    room.draft = value;
    if (value.trim() !== "") room.isTyping();
  };

  const complete = (name: string): void => {
    change(`${text.slice(0, text.length - (partial?.length ?? 0))}${name} `);
    field.current?.focus();
  };

  const send = (): void => {
    const trimmed = text.trim();
    if (trimmed === "" || tooLong) return;
    room.send(trimmed);
    setText("");
    room.draft = "";
    field.current?.focus();
  };

  const key = (event: KeyboardEvent): void => {
    if (event.isComposing) return;
    if (matches.length > 0 && chosen !== undefined) {
      if (event.key === "Tab" || event.key === "Enter") {
        event.preventDefault();
        complete(chosen);
        return;
      }
      if (event.key === "ArrowDown" || event.key === "ArrowUp") {
        event.preventDefault();
        setChoice((choice + (event.key === "ArrowDown" ? 1 : matches.length - 1)) % matches.length);
        return;
      }
      if (event.key === "Escape") {
        event.stopPropagation();
        setDismissed(true);
        return;
      }
    }

    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      send();
    }
  };

  return (
    <form
      class="composer"
      onSubmit={(event) => {
        event.preventDefault();
        send();
      }}
    >
      {matches.length > 0 && (
        <ul class="mentions" role="listbox" aria-label="People" id="mentions">
          {matches.map((name) => (
            <li
              key={name}
              id={`mention-${name}`}
              role="option"
              aria-selected={name === chosen}
              onMouseDown={(event) => {
                event.preventDefault();
                complete(name);
              }}
            >
              @{name}
            </li>
          ))}
        </ul>
      )}
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
      <button
        type="submit"
        class="primary icon-button"
        data-testid="send"
        disabled={text.trim() === "" || tooLong}
        aria-label="Send"
        title="Send (Enter)"
      >
        <Icon name="send" />
      </button>
      <span
        id="composer-note"
        class={`composer-note ${tooLong ? "bad" : ""}`}
        role="status"
        data-testid="composer-note"
      >
        {note}
      </span>
    </form>
  );
}
