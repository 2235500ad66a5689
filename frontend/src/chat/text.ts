// Checks of a message before it is sent: its length as the server counts it, and whether it addresses the assistant.

/** The maximum length of a message that the server accepts, in bytes. */
export const MAX_BYTES = 8 * 1024;
/** The remaining length is shown once it is this small, in bytes. */
const NEAR = 512;

const encoder = new TextEncoder();

/** The number of bytes left, negative if the text is too long; null while more than `NEAR` are left. */
export function bytesLeft(text: string): number | null {
  // A UTF-16 code unit takes at most three bytes of UTF-8, so a short text need not be encoded.
  if (text.length * 3 < MAX_BYTES - NEAR) return null;
  const left = MAX_BYTES - encoder.encode(text.trim()).length;
  return left > NEAR ? null : left;
}

/** Whether the text names the assistant somewhere other than at its start, where the name has no effect. */
export function mentionsWithoutEffect(text: string, assistant: string): boolean {
  const name = `@${assistant.toLowerCase()}`;
  const said = text.trim().toLowerCase();
  if (assistant === "" || !said.includes(name)) return false;

  const after = (word: string): string | null => (word.startsWith(name) ? word.slice(name.length) : null);
  const asks = (rest: string | null): boolean => rest !== null && !/^[\p{L}\p{N}._-]/u.test(rest);

  // Full stops after a word end the sentence; one inside is part of another name.
  return !asks(after(said)) && said.split(/[\s(]+/).some((word) => asks(after(word.replace(/\.+$/, ""))));
}

/** Names offered at most. */
const COMPLETIONS = 6;

/** The part of a name that the text ends with after an @, and the names that complete it. */
export function completions(text: string, names: string[]): { partial: string; matches: string[] } {
  const partial = /(?:^|\s)@([\w.-]*)$/.exec(text)?.[1];
  if (partial === undefined) return { partial: "", matches: [] };
  const fits = (name: string): boolean => name.toLowerCase().startsWith(partial.toLowerCase()) && name !== partial;
  return { partial, matches: names.filter(fits).slice(0, COMPLETIONS) };
}
