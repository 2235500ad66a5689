// Contexts that elements read: the session, and the form around them.
import { createContext } from "preact";
import { useContext } from "preact/hooks";
import type { Json } from "./json";
import type { Session } from "./session";

const SessionContext = createContext<Session | null>(null);
export const SessionProvider = SessionContext.Provider;

export function useSession(): Session {
  const session = useContext(SessionContext);
  if (!session) throw new Error("useSession: no SessionProvider above this element");
  return session;
}

/** Collects the values of a form's widgets, which are sent together on submit. */
export interface FormValues {
  set(key: string, value: Json): void;
  submit(): void;
}

export const FormContext = createContext<FormValues | null>(null);
export const useForm = (): FormValues | null => useContext(FormContext);
