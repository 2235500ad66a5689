// What a text is worth before it is sent: its length as the server counts it, and whether it asks the assistant.

/** As the server takes it, in bytes. */
export const MAX_BYTES = 8 * 1024;
/** What is left is shown from here on. */
const NEAR = 512;

const encoder = new TextEncoder();

/** Bytes that are left, below zero if it is too long; null while there are plenty. */
export function bytesLeft(text: string): number | null {
  // No character has more than three bytes a code unit: a short text needs no counting.
  if (text.length * 3 < MAX_BYTES - NEAR) return null;
  const left = MAX_BYTES - encoder.encode(text.trim()).length;
  return left > NEAR ? null : left;
}

/** The assistant is named, but not at the beginning, where it would be asked. */
export function namesInVain(text: string, assistant: string): boolean {
  const name = `@${assistant.toLowerCase()}`;
  const said = text.trim().toLowerCase();
  if (assistant === "" || !said.includes(name)) return false;
  const after = (word: string): string | null => (word.startsWith(name) ? word.slice(name.length) : null);
  const asks = (rest: string | null): boolean => rest !== null && !/^[\p{L}\p{N}._-]/u.test(rest);
  // A full stop ends a sentence, or goes on as part of another name.
  return !asks(after(said)) && said.split(/[\s(]+/).some((word) => asks(after(word.replace(/\.+$/, ""))));
}
