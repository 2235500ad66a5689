// The sign-in and sign-up page. The server sets a cookie that keeps the user signed in, and returns a token that opens
// the connection.
import { useState } from "preact/hooks";
import { authenticate, type Account } from "../auth";
import { sentence } from "../format";
import { Logo } from "../icons";

/** The minimum length that the server accepts. */
const PASSWORD_MIN = 8;

export function LoginPage({
  signup,
  notice,
  onSignedIn,
}: {
  signup: boolean;
  notice: string;
  onSignedIn: (account: Account) => void;
}) {
  const [creating, setCreating] = useState(false);
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState("");

  const submit = async (event: SubmitEvent): Promise<void> => {
    event.preventDefault();
    const form = new FormData(event.currentTarget as HTMLFormElement);
    const name = String(form.get("name") ?? "").trim();
    const password = String(form.get("password") ?? "");
    if (name === "" || password === "") {
      setError("Enter a name and a password.");
      return;
    }
    if (creating && password.length < PASSWORD_MIN) {
      setError(`The password must have at least ${PASSWORD_MIN} characters.`);
      return;
    }
    setBusy(true);
    setError("");
    const result = await authenticate(creating ? "signup" : "login", name, password);
    setBusy(false);
    if ("error" in result) setError(sentence(result.error));
    else onSignedIn(result);
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
            <button
              type="button"
              class="text-button"
              data-testid="login-mode"
              onClick={() => {
                setCreating(!creating);
                setError("");
              }}
            >
              {creating ? "Sign in" : "Create an account"}
            </button>
          </p>
        )}
      </div>
    </main>
  );
}
