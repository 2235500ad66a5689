// The chat element, which shows a room and follows its channel.
import { useEffect, useRef, useState } from "preact/hooks";
import { useSession } from "../context";
import { Avatar } from "../elements/avatar";
import type { ElementProps } from "../elements/element";
import { sentence } from "../format";
import { Icon } from "../icons";
import { str } from "../json";
import { Composer } from "./composer";
import { isMine, MessageList, type Powers } from "./messages";
import { roomOf, type Person, type Room } from "./room";

export function Chat({ node }: ElementProps) {
  const session = useSession();
  const props = node.props.value;
  const id = str(props["room"]);
  const channel = str(props["channel"], `chat:${id}`);
  const room = roomOf(session, id, channel);
  return (
    <RoomView
      key={channel}
      room={room}
      title={str(props["title"], id)}
      me={str(props["me"], session.me.user)}
      assistant={str(props["assistant"])}
      manages={props["manages"] === true}
      operates={props["operates"] === true}
    />
  );
}

interface RoomProps extends Powers {
  room: Room;
  title: string;
  me: string;
  assistant: string;
}

function RoomView({ room, title, me, assistant, manages, operates }: RoomProps) {
  const [showPeople, setShowPeople] = useState(false);
  const [deleting, setDeleting] = useState(false);
  const people = room.people.value;

  useEffect(() => {
    room.markLeft();
    return room.open();
  }, [room]);
  useEscapeToStop(room, me, manages);

  const shown = title.startsWith("#") ? title : `#${title}`;
  const others = people.filter((person) => person.user !== me).map((person) => person.name);
  const names = [...new Set([...(assistant ? [assistant] : []), ...others])];
  return (
    <section class="chat" aria-label={`Room ${title}`} data-room={room.id}>
      <header class="chat-head">
        <h1>{shown}</h1>
        {manages && <DeleteButton onClick={() => setDeleting(true)} />}
        <button
          type="button"
          class="ghost people-toggle"
          aria-expanded={showPeople}
          onClick={() => setShowPeople(!showPeople)}
          aria-label={`${people.length} people here; show them`}
        >
          <Icon name="people" /> <span class="tabular">{people.length}</span>
        </button>
      </header>
      <Problem room={room} />
      <div class="chat-body">
        <div class="chat-column">
          <MessageList room={room} me={me} assistant={assistant} powers={{ manages, operates }} />
          <TypingLine room={room} />
          <Composer room={room} title={shown} names={names} assistant={assistant} />
        </div>
        <People people={people} me={me} assistant={assistant} open={showPeople} />
      </div>
      {deleting && <DeleteRoom room={room} title={shown} close={() => setDeleting(false)} />}
    </section>
  );
}

/** Stops the newest streaming answer that this user may stop when Escape is pressed. */
function useEscapeToStop(room: Room, me: string, manages: boolean): void {
  useEffect(() => {
    const escape = (event: KeyboardEvent): void => {
      if (event.key !== "Escape" || event.defaultPrevented) return;
      const { messages } = room.state.peek();
      for (let i = messages.length - 1; i >= 0; i--) {
        const message = messages[i];
        if (message?.state === "streaming" && (manages || isMine(message, me))) {
          room.stop(message);
          return;
        }
      }
    };
    window.addEventListener("keydown", escape);
    return () => window.removeEventListener("keydown", escape);
  }, [room, manages, me]);
}

function DeleteButton({ onClick }: { onClick: () => void }) {
  return (
    <button
      type="button"
      class="ghost icon-button"
      aria-label="Delete this room"
      title="Delete this room"
      data-testid="delete-room"
      onClick={onClick}
    >
      <Icon name="trash" />
    </button>
  );
}

function Problem({ room }: { room: Room }) {
  if (!room.problem.value) return null;
  return (
    <div class="alert bad" role="alert">
      <span>Cannot load this room: {room.problem.value}</span>
      <button type="button" class="small" onClick={() => void room.load()}>
        <Icon name="retry" /> Try again
      </button>
    </div>
  );
}

function People({ people, me, assistant, open }: { people: Person[]; me: string; assistant: string; open: boolean }) {
  const online = useSession().connection.status.value.name === "connected";
  return (
    <aside class={`people ${open ? "open" : ""}`} aria-label="Who is here">
      <h2>
        Here now <span class="tabular muted">{people.length}</span>
      </h2>
      <ul>
        {people.map((person) => (
          <li key={person.user}>
            <Avatar name={person.name} id={person.user} small />
            <span class="ellipsis">
              {person.name}
              {person.user === me && <span class="muted"> (you)</span>}
            </span>
            <span class={`dot ${online ? "ok" : ""}`} title={online ? "online" : "unknown while disconnected"} />
          </li>
        ))}
        {assistant && (
          <li>
            <Avatar name={assistant} id={assistant} assistant small />
            <span class="ellipsis">@{assistant}</span>
          </li>
        )}
      </ul>
      {assistant && (
        <p class="muted hint">
          Start a message with <code>@{assistant}</code> to ask the assistant, for example{" "}
          <code>@{assistant} status</code>.
        </p>
      )}
    </aside>
  );
}

/** Asks for confirmation. After the deletion, the server tells every page, this one included. */
function DeleteRoom({ room, title, close }: { room: Room; title: string; close: () => void }) {
  const dialog = useRef<HTMLDialogElement>(null);
  const [problem, setProblem] = useState("");
  const [busy, setBusy] = useState(false);
  useEffect(() => dialog.current?.showModal(), []);

  const remove = async (): Promise<void> => {
    setBusy(true);
    try {
      await room.remove();
      close();
    } catch (error) {
      setBusy(false);
      setProblem(sentence((error as Error).message));
    }
  };
  return (
    <dialog ref={dialog} class="dialog" aria-label={`Delete ${title}`} onClose={close}>
      <header>
        <h2>Delete {title}?</h2>
      </header>
      <p>All its messages are deleted with it, for everybody. This cannot be undone.</p>
      {problem !== "" && (
        <div class="alert bad" role="alert">
          <span>{problem}</span>
        </div>
      )}
      <div class="dialog-buttons">
        <button type="button" onClick={close}>
          Keep it
        </button>
        <button
          type="button"
          class="danger"
          disabled={busy}
          data-testid="delete-room-confirm"
          onClick={() => void remove()}
        >
          Delete the room
        </button>
      </div>
    </dialog>
  );
}

function TypingLine({ room }: { room: Room }) {
  const names = room.typing.value.map((person) => person.name);
  const text =
    names.length === 0
      ? ""
      : names.length === 1
        ? `${names[0]} is typing…`
        : names.length === 2
          ? `${names[0]} and ${names[1]} are typing…`
          : "Several people are typing…";
  return (
    <div class="typing" aria-live="polite">
      {text}
    </div>
  );
}
