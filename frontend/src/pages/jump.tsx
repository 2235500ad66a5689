// The dialog that opens a page or a room by its name, and creates rooms.
import { useEffect, useRef, useState } from "preact/hooks";
import { Icon } from "../icons";
import { object, str } from "../json";
import type { Session } from "../session";
import { walk, type TreeNode } from "../store";

interface Place {
  href: string;
  label: string;
  active: boolean;
}

function places(root: TreeNode): Place[] {
  const found = new Map<string, Place>();
  for (const node of walk(root)) {
    const props = node.props.value;
    const href = str(props["href"]);
    if (node.kind === "link" && href.startsWith("/") && !found.has(href)) {
      found.set(href, { href, label: str(props["label"], href), active: props["active"] === true });
    }
  }
  return [...found.values()];
}

/** The address prefix of rooms; undefined if this app cannot create rooms. */
function roomsHref(root: TreeNode): string | undefined {
  for (const node of walk(root)) if (node.kind === "new_room") return str(node.props.value["href"]);
  return undefined;
}

/** What the dialog offers for a query. */
interface Offer {
  found: Place[];
  /** The name of a room to create; empty if there is none. */
  create: string;
  /** The address prefix of rooms. */
  rooms: string | undefined;
}

function offerFor(root: TreeNode, query: string, fresh: boolean): Offer {
  const wanted = query.trim().toLowerCase();
  const all = fresh && wanted === "" ? [] : places(root);
  const found = all.filter((place) => place.label.toLowerCase().includes(wanted));

  const name = query.trim().replace(/^#/, "");
  const rooms = roomsHref(root);
  const exists = found.some((place) => place.label.toLowerCase().replace(/^#\s*/, "") === name.toLowerCase());
  return { found, create: rooms === undefined || exists ? "" : name, rooms };
}

async function createRoom(session: Session, name: string, rooms = ""): Promise<void> {
  try {
    const room = object(object(await session.rpc("chat.create_room", { name }))["room"]);
    session.go(rooms + str(room["id"], name));
  } catch (error) {
    session.toast("bad", `Cannot create the room: ${(error as Error).message}`);
  }
}

/** With `fresh`, the dialog is for a new room. */
export function Jump({ session, fresh, close }: { session: Session; fresh: boolean; close: () => void }) {
  const [query, setQuery] = useState("");
  const [picked, setPicked] = useState<number | null>(null);
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => dialog.current?.showModal(), []);

  const offer = offerFor(session.store.root, query, fresh);
  const { found, create, rooms } = offer;
  const count = found.length + (create ? 1 : 0);
  const chosen = picked ?? (fresh && create ? found.length : 0);

  const take = (index: number): void => {
    const place = found[index];
    close();
    if (place) session.go(place.href);
    else if (create) void createRoom(session, create, rooms);
  };
  const key = (event: KeyboardEvent): void => {
    if (event.key === "Enter") {
      event.preventDefault();
      take(chosen);
    } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      setPicked((chosen + (event.key === "ArrowDown" ? 1 : count - 1)) % Math.max(1, count));
    }
  };

  const title = fresh ? "New room" : "Jump to";
  return (
    <dialog
      ref={dialog}
      class="dialog jump-dialog"
      aria-label={title}
      onClose={close}
      onClick={(event) => {
        // A click on the backdrop has the dialog itself as its target.
        if (event.target === dialog.current) close();
      }}
    >
      <div class="jump-field">
        <Icon name={fresh ? "plus" : "search"} />
        <input
          type="text"
          value={query}
          placeholder={placeholder(fresh, rooms !== undefined)}
          aria-label={title}
          role="combobox"
          aria-expanded={count > 0}
          aria-controls="jump-list"
          {...(count > 0 ? { "aria-activedescendant": `place-${chosen}` } : {})}
          data-testid="jump-input"
          onInput={(event) => {
            setQuery(event.currentTarget.value);
            setPicked(null);
          }}
          onKeyDown={key}
        />
      </div>
      <Offers offer={offer} chosen={chosen} pick={setPicked} take={take} />
      {count === 0 && <p class="jump-hint muted">{fresh ? "Enter a name for the room." : "Nothing matches."}</p>}
    </dialog>
  );
}

function placeholder(fresh: boolean, hasRooms: boolean): string {
  if (fresh) return "Name of the new room";
  return hasRooms ? "Jump to a room or page, or name a new room" : "Jump to a page";
}

interface OffersProps {
  offer: Offer;
  chosen: number;
  pick: (index: number) => void;
  take: (index: number) => void;
}

function Offers({ offer: { found, create }, chosen, pick, take }: OffersProps) {
  const option = (index: number) => ({
    id: `place-${index}`,
    role: "option" as const,
    "aria-selected": index === chosen,
    onMouseEnter: () => pick(index),
    onClick: () => take(index),
  });
  return (
    <ul id="jump-list" role="listbox" aria-label="Pages and rooms" hidden={found.length === 0 && !create}>
      {found.map((place, i) => (
        <li key={place.href} {...option(i)}>
          <span class="ellipsis">{place.label}</span>
          {place.active && <span class="muted">open</span>}
        </li>
      ))}
      {create && (
        <li {...option(found.length)}>
          <Icon name="plus" />
          <span class="ellipsis">Create room “{create}”</span>
        </li>
      )}
    </ul>
  );
}
