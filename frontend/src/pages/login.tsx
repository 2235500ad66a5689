// The sign-in and sign-up page. The server sets a cookie that keeps the user signed in, and returns a token that opens
// the connection.
import { useState } from "preact/hooks";
import { authenticate, type Account } from "../auth";
import { sentence } from "../format";
import { Logo } from "../icons";

/** The minimum length that the server accepts. */
const PASSWORD_MIN = 8;

interface LoginProps {
  signup: boolean;
  notice: string;
  onSignedIn: (account: Account) => void;
}

export function LoginPage({ signup, notice, onSignedIn }: LoginProps) {
  const [creating, setCreating] = useState(false);
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState("");

  const submit = async (event: SubmitEvent): Promise<void> => {
    event.preventDefault();
    const { name, password } = credentials(event.currentTarget as HTMLFormElement);
    const mistake = mistakeIn(name, password, creating);
    setError(mistake);
    if (mistake !== "") return;

    setBusy(true);
    const result = await authenticate(creating ? "signup" : "login", name, password);
    setBusy(false);
    if ("error" in result) setError(sentence(result.error));
    else onSignedIn(result);
  };
  const switchMode = (): void => {
    setCreating(!creating);
    setError("");
  };

  return (
    <main class="login">
      <div class="login-card">
        <div class="brand">
          <Logo />
          <span>Beamline</span>
        </div>
        <h1>{creating ? "Create an account" : "Sign in"}</h1>
        {notice !== "" && (
          <div class="alert info" role="status">
            <span>{notice}</span>
          </div>
        )}
        <form class="stack" onSubmit={(event) => void submit(event)}>
          <NameField creating={creating} />
          <PasswordField creating={creating} />
          {error !== "" && (
            <div class="alert bad" role="alert" data-testid="login-error">
              <span>{error}</span>
            </div>
          )}
          <button type="submit" class="primary wide" disabled={busy} data-testid="login-submit">
            {busy ? "One moment…" : creating ? "Create account" : "Sign in"}
          </button>
        </form>
        {signup && (
          <p class="muted center">
            {creating ? "Already have an account?" : "New here?"}{" "}
            <button type="button" class="text-button" data-testid="login-mode" onClick={switchMode}>
              {creating ? "Sign in" : "Create an account"}
            </button>
          </p>
        )}
      </div>
    </main>
  );
}

function credentials(from: HTMLFormElement): { name: string; password: string } {
  const form = new FormData(from);
  return { name: String(form.get("name") ?? "").trim(), password: String(form.get("password") ?? "") };
}

/** What is wrong with the input, before the server is asked; empty if nothing is. */
function mistakeIn(name: string, password: string, creating: boolean): string {
  if (name === "" || password === "") return "Enter a name and a password.";
  if (creating && password.length < PASSWORD_MIN) return `The password must have at least ${PASSWORD_MIN} characters.`;
  return "";
}

function NameField({ creating }: { creating: boolean }) {
  return (
    <label class="field">
      <span class="field-label">Name</span>
      <input
        name="name"
        type="text"
        autocomplete="username"
        autocapitalize="none"
        spellcheck={false}
        maxLength={64}
        required
        autofocus
        aria-describedby="name-rule"
        data-testid="login-name"
      />
      {creating && (
        <span id="name-rule" class="muted hint">
          2 to 32 letters, digits, dots, dashes or underscores
        </span>
      )}
    </label>
  );
}

function PasswordField({ creating }: { creating: boolean }) {
  return (
    <label class="field">
      <span class="field-label">Password</span>
      <input
        name="password"
        type="password"
        autocomplete={creating ? "new-password" : "current-password"}
        maxLength={256}
        required
        aria-describedby="password-rule"
        data-testid="login-password"
      />
      {creating && (
        <span id="password-rule" class="muted hint">
          At least {PASSWORD_MIN} characters
        </span>
      )}
    </label>
  );
}
