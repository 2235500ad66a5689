// Accounts over HTTP. The browser keeps a cookie; the connection uses short-lived tokens.
import { object, parse, str } from "./json";

export interface Account {
  user: string;
  name: string;
  token: string;
}

export type Whoami = Account | { signedOut: true; signup: boolean };

async function call(path: string, init: RequestInit): Promise<{ status: number; body: ReturnType<typeof object> }> {
  const response = await fetch(path, { credentials: "same-origin", cache: "no-store", ...init });
  return { status: response.status, body: object(parse(await response.text())) };
}

const account = (body: ReturnType<typeof object>): Account => ({
  user: str(body["user"]),
  name: str(body["name"]) || str(body["user"]),
  token: str(body["token"]),
});

/** Returns the signed-in account with a fresh token, or that nobody is signed in. Throws when the server fails. */
export async function whoami(): Promise<Whoami> {
  const { status, body } = await call("/auth/token", { method: "GET" });
  if (status === 200) return account(body);
  if (status === 401) return { signedOut: true, signup: body["signup"] === true };
  throw new Error(str(body["error"], `the server returned status ${status}`));
}

export async function authenticate(
  how: "login" | "signup",
  name: string,
  password: string,
): Promise<Account | { error: string }> {
  try {
    const { status, body } = await call(`/auth/${how}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ name, password }),
    });
    if (status === 200) return account(body);
    return {
      error:
        str(body["error"]) ||
        (status === 429
          ? "Too many attempts. Wait a minute and try again."
          : `The server returned status ${status}. Try again.`),
    };
  } catch {
    return { error: "Cannot reach the server. Try again." };
  }
}

export async function signOut(): Promise<void> {
  await call("/auth/logout", { method: "POST" }).catch(() => undefined);
}
