// Accounts over HTTP: a cookie for the browser, short tokens for the connection.
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

/** Throws when the server cannot be asked. */
export async function whoami(): Promise<Whoami> {
  const { status, body } = await call("/auth/token", { method: "GET" });
  if (status === 200) return account(body);
  if (status === 401) return { signedOut: true, signup: body["signup"] === true };
  throw new Error(str(body["error"], `the server answered ${status}`));
}

export async function authenticate(how: "login" | "signup", name: string, password: string): Promise<Account | { error: string }> {
  try {
    const { status, body } = await call(`/auth/${how}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ name, password }),
    });
    if (status === 200) return account(body);
    return { error: str(body["error"]) || (status === 429 ? "Too many tries. Wait a minute." : `The server answered ${status}.`) };
  } catch {
    return { error: "The server cannot be reached. Try again." };
  }
}

export async function signOut(): Promise<void> {
  await call("/auth/logout", { method: "POST" }).catch(() => undefined);
}
