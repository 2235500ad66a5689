// Codes of the real-time protocol, with the names of crates/wire/src/realtime/codes.rs. Only those are listed that the
// page acts on by name; it acts on the others by their range.

/** Codes of error replies. Those below 100 never come from a server: the client makes them itself. */
export const ErrorCode = {
  /** The command found no connection, or lost it before the reply. */
  notConnected: 0,
  timeout: 1,
  internal: 100,
  unauthorized: 101,
  alreadySubscribed: 105,
} as const;

/** Codes with which a server closes a connection. */
export const CloseCode = {
  invalidToken: 3500,
  forceDisconnect: 3503,
} as const;

/** Whether the code of an error was made by the client itself. */
export const isLocalError = (code: number): boolean => code < ErrorCode.internal;

/** Whether a client must stay disconnected after this close code. */
export const isTerminal = (code: number): boolean => (code >= 3500 && code < 4000) || (code >= 4500 && code < 5000);

/** Whether a client must subscribe again after this unsubscribe code. */
export const asksToResubscribe = (code: number): boolean => code >= 2500;
