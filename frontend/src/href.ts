// Which addresses a text or a server may send somebody to.

/** A backslash is a slash to browsers, and they drop control characters and spaces around: no address of ours has any. */
const NEVER = /[\u0000-\u0020\u007f-\u009f\\]/;

/** A place inside the app: a path of this origin, whatever a browser makes of it. Null for anything else. */
export function internalHref(href: string): URL | null {
  if (!/^\/(?!\/)/.test(href) || NEVER.test(href)) return null;
  const url = new URL(href, location.origin);
  return url.origin === location.origin ? url : null;
}

/** An address that a link may have: inside the app, or outside by a scheme that cannot run anything. */
export function safeHref(href: string): string | null {
  if (NEVER.test(href)) return null;
  return /^(https?:\/\/|mailto:|\/(?!\/)|#)/i.test(href) ? href : null;
}
