import { afterEach, beforeEach, expect, it, vi } from "vitest";
import { internalHref, safeHref } from "../../src/href";

beforeEach(() => void vi.stubGlobal("location", new URL("http://app.test/rooms/general")));
afterEach(() => void vi.unstubAllGlobals());

/** Address, inside the app, may be a link. The server's test (crates/webapp/src/app/href.rs) has the same rows. */
const ROWS: [string, boolean, boolean][] = [
  ["/", true, true],
  ["/rooms/general", true, true],
  ["/rooms/a?b=//c#d", true, true],
  ["/%5Chost", true, true],
  ["/./host", true, true],
  ["/rooms//x", true, true],
  ["/café", true, true],
  ["//host", false, false],
  ["///host", false, false],
  ["/\\host", false, false],
  ["\\\\host", false, false],
  ["\\/host", false, false],
  ["/\t/host", false, false],
  ["/\n/host", false, false],
  ["/\r\\host", false, false],
  ["\t//host", false, false],
  [" /host", false, false],
  ["/ /host", false, false],
  ["/\u0000/host", false, false],
  ["/\u007f/host", false, false],
  ["/\u0085/host", false, false],
  ["rooms/general", false, false],
  ["", false, false],
  ["?x=1", false, false],
  ["#part", false, true],
  ["https://host/x", false, true],
  ["HTTP://host", false, true],
  ["https:\\\\host", false, false],
  ["https:host", false, false],
  ["mailto:ann@host", false, true],
  ["javascript:alert(1)", false, false],
  ["java\nscript:alert(1)", false, false],
  ["data:text/html,x", false, false],
];

it.each(ROWS)("%j is inside: %s, may be a link: %s", (href, internal, safe) => {
  expect(internalHref(href) !== null).toBe(internal);
  expect(safeHref(href) !== null).toBe(safe);
  // What counts as inside is inside for the browser, too.
  if (internal) expect(new URL(href, location.href).origin).toBe("http://app.test");
});
