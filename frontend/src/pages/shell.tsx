// The frame around an app: sidebar or drawer, connection state, jump dialog, banners and toasts.
import { useEffect, useRef, useState } from "preact/hooks";
import { signOut } from "../auth";
import { forgetRoom } from "../chat/room";
import type { Status } from "../connection";
import { SessionProvider } from "../context";
import { Avatar } from "../elements/avatar";
import { sentence } from "../format";
import { Icon, Logo } from "../icons";
import { fromBytes, object, str } from "../json";
import { Element } from "../render";
import type { Session } from "../session";
import { walk, type TreeNode } from "../store";
import { nextTheme, theme } from "../theme";

export function Shell({ session }: { session: Session }) {
  const [drawer, setDrawer] = useState(false);
  const { store, dialog } = session;
  const jump = dialog.value;
  const setJump = (value: typeof jump): void => {
    dialog.value = value;
  };

  const { sidebar, main } = parts(store.root);
  const place = session.location.value;

  useEffect(() => setDrawer(false), [place, jump]);

  useEffect(() => {
    const key = (event: KeyboardEvent): void => {
      if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
        event.preventDefault();
        setJump("place");
      } else if (event.key === "/" && !typingIn(event.target)) {
        event.preventDefault();
        const field = document.querySelector<HTMLElement>("[data-focus='/']");
        if (field) field.focus();
        else setJump("place");
      } else if (event.key === "Escape" && !event.defaultPrevented) {
        setDrawer(false);
        session.stop();
      }
    };
    window.addEventListener("keydown", key);
    return () => window.removeEventListener("keydown", key);
  }, [session]);

  // Rerun when a room is created or deleted, so that every sidebar shows the rooms that exist.
  useEffect(
    () =>
      session.connection.subscribe("chat:lobby", {
        publication: ({ data }) => {
          const event = object(fromBytes(data));
          if (event["type"] === "gone") forgetRoom(session, str(event["room"]));
          session.rerun();
        },
      }),
    [session],
  );

  // Follow internal links in texts without leaving the page.
  const follow = (event: MouseEvent): void => {
    const link = (event.target as Element | null)?.closest?.("a");
    if (!link || event.defaultPrevented || event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey)
      return;
    if (link.target === "_blank" || link.origin !== location.origin || link.pathname.startsWith("/auth/")) return;
    event.preventDefault();
    session.go(link.pathname + link.search + link.hash);
  };

  return (
    <SessionProvider value={session}>
      <div class={`shell ${drawer ? "drawer-open" : ""}`} onClick={follow}>
        <a
          class="skip"
          href="#main"
          onClick={(event) => {
            event.preventDefault();
            document.getElementById("main")?.focus();
          }}
        >
          Skip to content
        </a>
        <ConnectionBanner session={session} />
        <header class="topbar">
          <button
            type="button"
            class="ghost icon-button"
            aria-label="Menu"
            aria-expanded={drawer}
            onClick={() => setDrawer(!drawer)}
          >
            <Icon name="menu" />
          </button>
          <span class="brand">
            <Logo />
            <span>Beamline</span>
          </span>
          <button type="button" class="ghost icon-button" aria-label="Jump to" onClick={() => setJump("place")}>
            <Icon name="search" />
          </button>
        </header>
        {drawer && <div class="scrim" onClick={() => setDrawer(false)} />}
        <nav class="sidebar" aria-label="Main">
          <div class="brand">
            <Logo />
            <span>Beamline</span>
          </div>
          <button type="button" class="jump" onClick={() => setJump("place")}>
            <Icon name="search" />
            <span>Jump to…</span>
            <kbd>Ctrl K</kbd>
          </button>
          <div class="sidebar-tree">
            {sidebar.map((node) => (
              <Element key={node.id} node={node} />
            ))}
          </div>
          <Foot session={session} />
        </nav>
        <main id="main" class="main" tabIndex={-1} aria-busy={session.busy.value}>
          <div class={`run-bar ${session.busy.value ? "on" : ""}`} aria-hidden="true" />
          <FailureBox session={session} />
          {!store.ready.value ? <LoadingPage /> : main.map((node) => <Element key={node.id} node={node} />)}
        </main>
        {jump && <Jump key={jump} session={session} fresh={jump === "room"} close={() => setJump("")} />}
        <Toasts session={session} />
      </div>
    </SessionProvider>
  );
}

/** Separates the sidebar, which may stand next to the page or inside it, from the other elements. */
function parts(root: TreeNode): { sidebar: TreeNode[]; main: TreeNode[] } {
  const sidebar: TreeNode[] = [];
  const main: TreeNode[] = [];
  const sort = (node: TreeNode): void => {
    if (node.kind === "sidebar") sidebar.push(node);
    else if (node.kind === "page") node.children.value.forEach(sort);
    else main.push(node);
  };
  root.children.value.forEach(sort);
  return { sidebar, main };
}

function typingIn(target: EventTarget | null): boolean {
  return (
    target instanceof HTMLElement && (target.isContentEditable || /^(input|textarea|select)$/i.test(target.tagName))
  );
}

const LABELS: Record<Status["name"], string> = {
  connected: "Connected",
  connecting: "Connecting…",
  waiting: "Offline",
  closed: "Disconnected",
};
const DOTS: Record<Status["name"], string> = { connected: "ok", connecting: "warn", waiting: "bad", closed: "bad" };
const THEMES = { auto: ["auto", "System"], light: ["sun", "Light"], dark: ["moon", "Dark"] } as const;

function Foot({ session }: { session: Session }) {
  const { name } = session.connection.status.value;
  const [icon, label] = THEMES[theme.value];
  return (
    <div class="foot">
      <div class="foot-row" data-testid="connection-state" data-state={name} role="status">
        <span class={`dot ${DOTS[name]}`} /> <span class="muted">{LABELS[name]}</span>
      </div>
      <div class="foot-row">
        <Avatar name={session.me.name} id={session.me.user} small />
        <span class="ellipsis grow" data-testid="me">
          {session.me.name}
        </span>
        <button
          type="button"
          class="ghost icon-button"
          aria-label={`Theme: ${label}`}
          title={`Theme: ${label}`}
          data-testid="theme"
          onClick={nextTheme}
        >
          <Icon name={icon} />
        </button>
        <button
          type="button"
          class="ghost icon-button"
          aria-label="Sign out"
          title="Sign out"
          data-testid="sign-out"
          onClick={() => void signOut().then(() => location.assign("/"))}
        >
          <Icon name="leave" />
        </button>
      </div>
    </div>
  );
}

function ConnectionBanner({ session }: { session: Session }) {
  const status = session.connection.status.value;
  const [now, setNow] = useState(Date.now());
  useEffect(() => {
    if (status.name !== "waiting") return;
    setNow(Date.now());
    const timer = setInterval(() => setNow(Date.now()), 250);
    return () => clearInterval(timer);
  }, [status]);

  if (status.name === "waiting") {
    const seconds = Math.max(0, Math.ceil((status.retryAt - now) / 1000));
    return (
      <div class="banner" role="status" data-testid="offline">
        <span>
          Connection lost. Retrying in <b class="tabular">{seconds} s</b>.
        </span>
        <button type="button" class="small" onClick={() => session.connection.retryNow()}>
          Retry now
        </button>
      </div>
    );
  }
  if (status.name === "closed") {
    return (
      <div class="banner" role="alert">
        <span>Disconnected: {status.reason}.</span>
        <button type="button" class="small" onClick={() => session.connection.open()}>
          Reconnect
        </button>
      </div>
    );
  }
  return null;
}

function FailureBox({ session }: { session: Session }) {
  const failure = session.failure.value;
  if (!failure) return null;
  return (
    <div class="alert bad" role="alert" data-testid="failure">
      <div>
        <strong>This page ran into an error</strong>
        <span>{sentence(failure.message)}</span>
        {failure.traceId !== "" && (
          <span class="muted">
            Trace <code>{failure.traceId}</code>
          </span>
        )}
      </div>
      <button type="button" class="small" onClick={() => session.rerun(true)}>
        <Icon name="retry" /> Run again
      </button>
    </div>
  );
}

function LoadingPage() {
  return (
    <div class="stack delayed" role="status" aria-label="Loading">
      <span class="skeleton line w38" />
      <span class="skeleton block" />
      <span class="skeleton block" />
    </div>
  );
}

function Toasts({ session }: { session: Session }) {
  return (
    <div class="toasts" aria-live="polite">
      {session.toasts.value.map((note) => (
        <div key={note.id} class={`toast ${note.tone}`}>
          <span>{note.text}</span>
          <button type="button" class="ghost icon-button" aria-label="Dismiss" onClick={() => session.dismiss(note.id)}>
            <Icon name="close" />
          </button>
        </div>
      ))}
    </div>
  );
}

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

/** The dialog that opens a page or a room, or with `fresh` creates a room. */
function Jump({ session, fresh, close }: { session: Session; fresh: boolean; close: () => void }) {
  const [query, setQuery] = useState("");
  const [picked, setChosen] = useState<number | null>(null);
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => dialog.current?.showModal(), []);

  const wanted = query.trim().toLowerCase();
  const title = fresh ? "New room" : "Jump to";
  const found =
    fresh && wanted === ""
      ? []
      : places(session.store.root).filter((place) => place.label.toLowerCase().includes(wanted));
  const name = query.trim().replace(/^#/, "");
  const rooms = roomsHref(session.store.root);
  const creates =
    rooms !== undefined &&
    name !== "" &&
    !found.some((place) => place.label.toLowerCase().replace(/^#\s*/, "") === name.toLowerCase());

  const count = found.length + (creates ? 1 : 0);
  const chosen = picked ?? (fresh && creates ? found.length : 0);

  const create = async (): Promise<void> => {
    try {
      const room = object(object(await session.rpc("chat.create_room", { name }))["room"]);
      session.go(rooms + str(room["id"], name));
    } catch (error) {
      session.toast("bad", `Cannot create the room: ${(error as Error).message}`);
    }
  };
  const take = (index: number): void => {
    const place = found[index];
    close();
    if (place) session.go(place.href);
    else if (creates) void create();
  };
  const key = (event: KeyboardEvent): void => {
    if (event.key === "Enter") {
      event.preventDefault();
      take(chosen);
    } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      setChosen((chosen + (event.key === "ArrowDown" ? 1 : count - 1)) % Math.max(1, count));
    }
  };
  return (
    <dialog
      ref={dialog}
      class="dialog jump-dialog"
      aria-label={title}
      onClose={close}
      onClick={(event) => {
        if (event.target === dialog.current) close();
      }}
    >
      <div class="jump-field">
        <Icon name={fresh ? "plus" : "search"} />
        <input
          type="text"
          value={query}
          placeholder={
            fresh
              ? "Name of the new room"
              : rooms === undefined
                ? "Jump to a page"
                : "Jump to a room or page, or name a new room"
          }
          aria-label={title}
          role="combobox"
          aria-expanded={count > 0}
          aria-controls="jump-list"
          {...(count > 0 ? { "aria-activedescendant": `place-${chosen}` } : {})}
          data-testid="jump-input"
          onInput={(event) => {
            setQuery(event.currentTarget.value);
            setChosen(null);
          }}
          onKeyDown={key}
        />
      </div>
      <ul id="jump-list" role="listbox" aria-label="Pages and rooms" hidden={count === 0}>
        {found.map((place, i) => (
          <li
            key={place.href}
            id={`place-${i}`}
            role="option"
            aria-selected={i === chosen}
            onMouseEnter={() => setChosen(i)}
            onClick={() => take(i)}
          >
            <span class="ellipsis">{place.label}</span>
            {place.active && <span class="muted">open</span>}
          </li>
        ))}
        {creates && (
          <li
            id={`place-${found.length}`}
            role="option"
            aria-selected={chosen === found.length}
            onMouseEnter={() => setChosen(found.length)}
            onClick={() => take(found.length)}
          >
            <Icon name="plus" />
            <span class="ellipsis">Create room “{name}”</span>
          </li>
        )}
      </ul>
      {count === 0 && <p class="jump-hint muted">{fresh ? "Enter a name for the room." : "Nothing matches."}</p>}
    </dialog>
  );
}
