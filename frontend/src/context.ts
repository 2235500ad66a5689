// What elements reach through the tree instead of by import.
import { createContext } from "preact";
import { useContext } from "preact/hooks";
import type { Json } from "./json";
import type { Session } from "./session";

const SessionContext = createContext<Session | null>(null);
export const SessionProvider = SessionContext.Provider;

export function useSession(): Session {
  const session = useContext(SessionContext);
  if (!session) throw new Error("an element was rendered outside a session");
  return session;
}

/** Inside a form, widgets collect here and go out with one submit. */
export interface FormValues {
  set(key: string, value: Json): void;
  submit(): void;
}

export const FormContext = createContext<FormValues | null>(null);
export const useForm = (): FormValues | null => useContext(FormContext);
