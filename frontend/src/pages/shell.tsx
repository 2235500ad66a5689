// The frame around an app: sidebar or drawer, connection state, jump dialog, banners and toasts.
import { useEffect, useState } from "preact/hooks";
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
import type { TreeNode } from "../store";
import { nextTheme, theme } from "../theme";
import { Jump } from "./jump";

export function Shell({ session }: { session: Session }) {
  const [drawer, setDrawer] = useState(false);
  const { store, dialog, busy } = session;
  const { sidebar, main } = parts(store.root);
  const jump = (): void => void (dialog.value = "place");

  useEffect(() => setDrawer(false), [session.location.value, dialog.value]);
  useKeys(session, () => setDrawer(false));
  useLobby(session);

  return (
    <SessionProvider value={session}>
      <div class={`shell ${drawer ? "drawer-open" : ""}`} onClick={(event) => follow(session, event)}>
        <SkipLink />
        <ConnectionBanner session={session} />
        <Topbar drawer={drawer} toggle={() => setDrawer(!drawer)} jump={jump} />
        {drawer && <div class="scrim" onClick={() => setDrawer(false)} />}
        <Sidebar session={session} nodes={sidebar} jump={jump} />
        <main id="main" class="main" tabIndex={-1} aria-busy={busy.value}>
          <div class={`run-bar ${busy.value ? "on" : ""}`} aria-hidden="true" />
          <FailureBox session={session} />
          {!store.ready.value ? <LoadingPage /> : main.map((node) => <Element key={node.id} node={node} />)}
        </main>
        {dialog.value && (
          <Jump
            key={dialog.value}
            session={session}
            fresh={dialog.value === "room"}
            close={() => void (dialog.value = "")}
          />
        )}
        <Toasts session={session} />
      </div>
    </SessionProvider>
  );
}

/** Keys that work everywhere: Ctrl K and / find something, Escape closes or stops. */
function useKeys(session: Session, closeDrawer: () => void): void {
  useEffect(() => {
    const key = (event: KeyboardEvent): void => {
      if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
        event.preventDefault();
        session.dialog.value = "place";
      } else if (event.key === "/" && !typingIn(event.target)) {
        event.preventDefault();
        const field = document.querySelector<HTMLElement>("[data-focus='/']");
        if (field) field.focus();
        else session.dialog.value = "place";
      } else if (event.key === "Escape" && !event.defaultPrevented) {
        closeDrawer();
        session.stop();
      }
    };
    window.addEventListener("keydown", key);
    return () => window.removeEventListener("keydown", key);
  }, [session]);
}

/** Reruns when a room is created or deleted, so that every sidebar shows the rooms that exist. */
function useLobby(session: Session): void {
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
}

/** Follows internal links in texts without leaving the page. */
function follow(session: Session, event: MouseEvent): void {
  const link = (event.target as Element | null)?.closest?.("a");
  if (!link || event.defaultPrevented || event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey) return;
  if (link.target === "_blank" || link.origin !== location.origin || link.pathname.startsWith("/auth/")) return;
  event.preventDefault();
  session.go(link.pathname + link.search + link.hash);
}

function SkipLink() {
  return (
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
  );
}

function Brand({ as: Tag }: { as: "div" | "span" }) {
  return (
    <Tag class="brand">
      <Logo />
      <span>Beamline</span>
    </Tag>
  );
}

function Topbar({ drawer, toggle, jump }: { drawer: boolean; toggle: () => void; jump: () => void }) {
  return (
    <header class="topbar">
      <button type="button" class="ghost icon-button" aria-label="Menu" aria-expanded={drawer} onClick={toggle}>
        <Icon name="menu" />
      </button>
      <Brand as="span" />
      <button type="button" class="ghost icon-button" aria-label="Jump to" onClick={jump}>
        <Icon name="search" />
      </button>
    </header>
  );
}

function Sidebar({ session, nodes, jump }: { session: Session; nodes: TreeNode[]; jump: () => void }) {
  return (
    <nav class="sidebar" aria-label="Main">
      <Brand as="div" />
      <button type="button" class="jump" onClick={jump}>
        <Icon name="search" />
        <span>Jump to…</span>
        <kbd>Ctrl K</kbd>
      </button>
      <div class="sidebar-tree">
        {nodes.map((node) => (
          <Element key={node.id} node={node} />
        ))}
      </div>
      <Foot session={session} />
    </nav>
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
