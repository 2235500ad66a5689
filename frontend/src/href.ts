// Decides where a text or a server may send the user.

/** Browsers read a backslash as a slash, and drop control characters and spaces, so no address may have any of them. */
const NEVER = /[\u0000-\u0020\u007f-\u009f\\]/;

/** Returns the URL of a place inside the app, that is a path that every browser resolves to this origin; else null. */
export function internalHref(href: string): URL | null {
  if (!/^\/(?!\/)/.test(href) || NEVER.test(href)) return null;
  const url = new URL(href, location.origin);
  return url.origin === location.origin ? url : null;
}

/** Returns the address if a link may have it: inside the app, or outside with a scheme that cannot run code. */
export function safeHref(href: string): string | null {
  if (NEVER.test(href)) return null;
  return /^(https?:\/\/|mailto:|\/(?!\/)|#)/i.test(href) ? href : null;
}
