import { render } from "preact";
import { effect, signal } from "@preact/signals";
import "./theme.css";
import { whoami, type Account } from "./auth";
import { CloseCode } from "./codec/codes";
import { Connection } from "./connection";
import { LoginPage } from "./pages/login";
import { Shell } from "./pages/shell";
import { Session, sessionId } from "./session";
import { startTheme } from "./theme";

type View =
  | { name: "loading" }
  | { name: "unreachable" }
  | { name: "login"; signup: boolean; notice: string }
  | { name: "app"; session: Session };

const view = signal<View>({ name: "loading" });
/** The session belongs to the page, whoever signs in, so its id is taken once. */
const ownId = sessionId();
/** The close codes of a connection whose user has signed out. */
const SIGNED_OUT: number[] = [CloseCode.invalidToken, CloseCode.forceDisconnect];

async function begin(): Promise<void> {
  view.value = { name: "loading" };
  try {
    const who = await whoami();
    if ("signedOut" in who) view.value = { name: "login", signup: who.signup, notice: "" };
    else await open(who);
  } catch {
    view.value = { name: "unreachable" };
  }
}

async function open(account: Account): Promise<void> {
  const id = await ownId;
  // The first connection uses the token that came with the account; each later one asks for a fresh token.
  let first: string | undefined = account.token;
  const connection = new Connection({
    url: `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/connection/websocket`,
    token: async () => {
      const token = first;
      first = undefined;
      if (token) return token;
      const who = await whoami();
      if (!("signedOut" in who)) return who.token;
      connection.close("signed out");
      signedOut(who.signup);
      return null;
    },
  });

  const session = new Session(connection, { user: account.user, name: account.name }, id);
  session.start();
  connection.open();

  // A sign-out in another window closes the connection of this one too.
  effect(() => {
    const status = connection.status.value;
    if (status.name === "closed" && SIGNED_OUT.includes(status.code)) void leaveIfSignedOut();
  });

  window.addEventListener("online", () => connection.retryNow());
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) connection.retryNow();
  });

  view.value = { name: "app", session };
}

async function leaveIfSignedOut(): Promise<void> {
  const who = await whoami().catch(() => null);
  if (who && "signedOut" in who) signedOut(who.signup);
}

function signedOut(signup: boolean): void {
  view.value = { name: "login", signup, notice: "You have been signed out. Sign in again to continue." };
}

function Root() {
  const now = view.value;
  switch (now.name) {
    case "loading":
      return (
        <div class="center-page delayed" role="status">
          <span class="spinner" /> Loading…
        </div>
      );
    case "unreachable":
      return (
        <main class="center-page">
          <div class="empty" role="alert">
            <strong>Cannot reach the server</strong>
            <p>It may be restarting, or you are offline.</p>
            <button type="button" class="primary" onClick={() => void begin()}>
              Try again
            </button>
          </div>
        </main>
      );
    case "login":
      return <LoginPage signup={now.signup} notice={now.notice} onSignedIn={(account) => void open(account)} />;
    case "app":
      return <Shell session={now.session} />;
  }
}

startTheme();
const host = document.getElementById("app");
if (host) render(<Root />, host);
void begin();
