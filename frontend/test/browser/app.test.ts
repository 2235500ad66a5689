// Tests the whole product in real browsers: two users, the assistant, the console, and a server that is killed.
import type { Browser, BrowserContextOptions, Page } from "playwright-core";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { launch, WAIT_MS, Window } from "./browser";
import { Server } from "./server";

const PASSWORD = "correct horse battery staple";
const DESKTOP = { width: 1280, height: 800 };
const PHONE = { width: 360, height: 740 };

const server = new Server();
let browser: Browser;
let ann: Window;
let bob: Window;
let console_: Window;
const all = (): Window[] => [ann, bob, console_].filter((one) => one !== undefined);

const open = async (name: string, options: BrowserContextOptions = {}): Promise<Window> => {
  // Reduced motion, so that contrast is not measured during a colour transition.
  const context = await browser.newContext({
    viewport: DESKTOP,
    colorScheme: "light",
    reducedMotion: "reduce",
    ...options,
  });
  return Window.open(context, server.url, name);
};

beforeAll(async () => {
  await server.start();
  browser = await launch();
});
afterAll(async () => {
  await browser?.close();
  await server.end();
});
afterEach(async ({ task }) => {
  if (task.result?.state === "fail") {
    for (const [i, window] of all().entries())
      await window.picture(new URL(`out/failed-${i}.png`, import.meta.url).pathname).catch(() => undefined);
    console.error(server.log.slice(-40).join("\n"));
  }
});

describe("sign in", () => {
  it("a new user creates an account and enters a room", async () => {
    ann = await open("ann");
    await ann.page.goto(server.url);
    await ann.byId("login-name").waitFor();
    await ann.accessible("login");

    await ann.byId("login-mode").click();
    await ann.page.getByText("At least 8 characters").waitFor();
    await ann.accessible("new account");

    await ann.page.setViewportSize(PHONE);
    await ann.fits(PHONE.width);

    await ann.byId("login-name").fill("ann");
    await ann.byId("login-password").fill("short");
    await ann.byId("login-submit").click();
    expect(await ann.byId("login-error").innerText()).toBe("The password must have at least 8 characters.");

    await ann.byId("login-mode").click();
    await ann.page.setViewportSize(DESKTOP);
    await ann.signUp("ann", PASSWORD);
    await ann.byId("composer").waitFor();
  });

  it("works by keyboard alone and names mistakes", async () => {
    bob = await open("bob", { colorScheme: "dark" });
    await bob.page.goto(server.url);
    await bob.byId("login-name").waitFor();
    await bob.accessible("login, dark");

    const keys = bob.page.keyboard;
    // Focus starts in the name field; the button for a new account comes after the form.
    const focused = (): Promise<string | null> =>
      bob.page.evaluate(() => document.activeElement?.getAttribute("data-testid") ?? null);
    expect(await focused()).toBe("login-name");
    for (let i = 0; i < 6 && (await focused()) !== "login-mode"; i++) await keys.press("Tab");

    await keys.press("Enter");
    await bob.page.getByRole("heading", { name: "Create an account" }).waitFor();
    for (let i = 0; i < 6 && (await focused()) !== "login-name"; i++) await keys.press("Shift+Tab");

    await keys.type("ann");
    await keys.press("Tab");
    await keys.type(PASSWORD);
    bob.serverSays(/40\d|422/);
    await keys.press("Enter");
    expect(await bob.byId("login-error").innerText()).toMatch(/^[A-Z].*\.$/); // the name is taken

    for (let i = 0; i < 6 && (await focused()) !== "login-name"; i++) await keys.press("Shift+Tab");
    await keys.press("Control+A");
    await keys.type("bob");
    await keys.press("Enter");
    await bob.connected();
    await bob.byId("composer").waitFor();
  });
});

describe("chat", () => {
  it("messages appear in both windows, in the same order", async () => {
    await ann.send("hello from ann");
    await bob.message("hello from ann").waitFor();
    await ann.message("hello from ann").waitFor();

    // The slash key focuses the composer.
    await bob.page.locator("main").focus();
    await bob.page.keyboard.press("/");
    await bob.page.keyboard.type("hello back, **ann** <script>alert(1)</script>");
    await bob.page.keyboard.press("Enter");
    await ann.message("hello back, ann <script>").waitFor();
    await bob.message("hello back, ann <script>").waitFor();

    await ann.byId("composer").fill("and by the button");
    await ann.byId("send").click();
    await bob.message("and by the button").waitFor();

    expect(await bob.messages()).toEqual(await ann.messages());
  });

  it("the assistant's answer appears in both windows", async () => {
    const answers = (window: Window): ReturnType<Window["message"]> =>
      window.page.locator("[data-testid=message].assistant[data-state=sent]");
    await ann.send("@assistant status");
    for (const window of [ann, bob]) {
      await answers(window).first().waitFor();
      expect((await answers(window).first().getByTestId("message-text").innerText()).length).toBeGreaterThan(10);
    }
    expect(await bob.messages()).toEqual(await ann.messages());
  });

  it("warns about a misplaced mention and about a message that is too long", async () => {
    const note = ann.byId("composer-note");
    await ann.byId("composer").fill("hi @assistant status");
    await expect.poll(() => note.innerText()).toBe("Start the message with @assistant to ask the assistant.");
    await ann.byId("composer").fill("é".repeat(4_000));
    await expect.poll(() => note.innerText()).toBe("192 bytes left");
    await ann.accessible("chat with a note");
    await ann.byId("composer").fill("é".repeat(4_100));
    await expect.poll(() => note.innerText()).toBe("8 bytes too long");
    expect(await ann.byId("send").isDisabled()).toBe(true);
    await ann.byId("composer").fill("");
    await expect.poll(() => note.innerText()).toBe("");
  });

  it("a wide table scrolls sideways and breaks no words", async () => {
    await ann.send(
      "| provider | what it does | where | p95 |\n|---|---|---|---|\n" +
        "| local-echo-provider | says the same words again as they came | europe-west | 12 ms |",
    );
    const table = ann.page.locator(".markdown .table-scroll");
    await table.waitFor();
    await ann.page.setViewportSize(PHONE);
    await ann.page.locator(".markdown .more-right").waitFor();
    const heights = (): Promise<number[]> =>
      table.locator("td").evaluateAll((cells) => cells.map((cell) => cell.clientHeight));
    expect(Math.max(...(await heights()))).toBeLessThan(34);
    await ann.fits(PHONE.width);
    await table.evaluate((element) => element.scrollTo({ left: 9_999 }));
    await ann.page.locator(".markdown .more-left:not(.more-right)").waitFor();
    await ann.page.setViewportSize(DESKTOP);
  });

  it("shows who is present", async () => {
    for (const window of [ann, bob]) {
      const people = window.page.getByRole("complementary", { name: "Who is here" });
      await people.getByText("ann").waitFor();
      await people.getByText("bob").waitFor();
    }
  });

  it("is accessible and fits a phone, light and dark", async () => {
    await ann.accessible("chat");
    await bob.accessible("chat, dark");
    const background = (window: Window): Promise<string> =>
      window.page.evaluate(() => getComputedStyle(document.documentElement).backgroundColor);
    expect(await background(ann)).not.toBe(await background(bob));
    await ann.page.setViewportSize(PHONE);
    await ann.fits(PHONE.width);
    await ann.accessible("chat on a phone");
    await ann.page.setViewportSize(DESKTOP);
  });

  it("the jump dialog opens another page by keyboard, and back returns to the room", async () => {
    await ann.page.keyboard.press("Control+K");
    await ann.byId("jump-input").waitFor();
    await ann.accessible("jump dialog");
    await ann.page.keyboard.type("console");
    await ann.page.keyboard.press("Enter");
    await ann.byId("chart").first().waitFor();
    expect(new URL(ann.page.url()).pathname).toBe("/console");
    await ann.page.goBack();
    await ann.message("hello from ann").waitFor();
  });
});

describe("rooms", () => {
  it("a new room appears in every sidebar and is separate from the others", async () => {
    await ann.byId("nav-console").click(); // from any page
    await ann.byId("chart").first().waitFor();

    await ann.byId("new-room").click();
    await ann.accessible("new room");
    await ann.byId("jump-input").fill("Launch day");
    await ann.page.keyboard.press("Enter");
    await ann.page.getByRole("heading", { level: 1, name: "Launch day" }).waitFor();

    await ann.send("who is with me?");
    await bob.byId("room-link").filter({ hasText: "Launch day" }).click();
    await bob.message("who is with me?").waitFor();
    expect(await bob.message("hello from ann").count()).toBe(0);

    await bob.send("me");
    await ann.message("me").first().waitFor();

    for (const window of [ann, bob]) {
      await window.byId("room-link").filter({ hasText: "general" }).click();
      await window.message("hello from ann").waitFor();
    }
  });
});

describe("a room that is deleted", () => {
  it("asks first, then leaves every sidebar, and links to it say so", async () => {
    await ann.byId("new-room").click();
    await ann.byId("jump-input").fill("Short lived");
    await ann.page.keyboard.press("Enter");
    await ann.page.getByRole("heading", { level: 1, name: "Short lived" }).waitFor();
    await ann.send("soon gone");
    await bob.byId("room-link").filter({ hasText: "Short lived" }).click();
    await bob.message("soon gone").waitFor();
    expect(await bob.byId("delete-room").count()).toBe(0);

    await ann.byId("delete-room").click();
    await ann.byId("delete-room-confirm").waitFor();
    await ann.accessible("deleting a room");
    await ann.page.getByRole("button", { name: "Keep it" }).click();
    await ann.message("soon gone").waitFor();
    await ann.byId("delete-room").click();
    await ann.byId("delete-room-confirm").click();
    for (const window of [ann, bob]) {
      await window.page.getByText("This room was deleted").waitFor();
      await expect.poll(() => window.byId("room-link").filter({ hasText: "Short lived" }).count()).toBe(0);
      await window.byId("room-link").filter({ hasText: "general" }).click();
      await window.message("hello from ann").waitFor();
    }
  });
});

it("a duplicated tab has a session of its own", async () => {
  const kept = (page: Page): Promise<string | null> => page.evaluate(() => sessionStorage.getItem("beamline.session"));
  // Like "duplicate tab", a window that a page opens starts with a copy of the tab's session storage.
  const [copy] = await Promise.all([
    ann.page.waitForEvent("popup"),
    ann.page.evaluate(() => void window.open(location.href)),
  ]);
  await copy.locator("[data-testid=connection-state][data-state=connected]").waitFor({ state: "attached" });
  const [original, duplicate] = [await kept(ann.page), await kept(copy)];
  expect(duplicate).not.toBe(original);
  await copy.close();
  await ann.page.reload();
  await ann.connected();
  expect(await kept(ann.page)).toBe(original);
});

it("an unknown page says so and links to the start page", async () => {
  for (const [place, text] of [
    ["/rooms/nosuch", "There is no such room"],
    ["/nosuch", "There is nothing here"],
  ] as const) {
    await ann.page.goto(server.url + place);
    await ann.page.getByText(text).waitFor();
    await ann.byId("room-link").first().waitFor();
    await ann.accessible(place);
  }
  await ann.page.getByRole("link", { name: "To the start" }).click();
  await ann.message("hello from ann").waitFor();
});

describe("console", () => {
  it("shows live metrics, tables and charts that move", async () => {
    console_ = await Window.open(ann.page.context(), server.url, "console");
    await console_.page.goto(`${server.url}/console`);
    await console_.connected();
    await console_.byId("chart").first().waitFor();
    await console_.page.locator(".plot-box .line").first().waitFor({ state: "attached" });
    await expect
      .poll(() => console_.byId("live-metric-value").allInnerTexts(), { timeout: WAIT_MS })
      .toEqual(expect.arrayContaining([expect.stringMatching(/\d/)]));
    await console_.changes(() => console_.page.locator(".plot-box .line").first().getAttribute("d"));
  });

  it("tabs and selections rerun the page, and tables are live", async () => {
    for (const tab of ["Nodes", "Providers"]) {
      await console_.page.getByRole("tab", { name: tab }).click();
      await console_.page.locator(`[role=tab][aria-selected=true]`, { hasText: tab }).waitFor();
      await console_.byId("live-table").first().locator("tbody tr").first().waitFor();
      await console_.accessible(`console, ${tab}`);
    }
    await console_.page.getByRole("tab", { name: "Overview" }).click();
    await console_.page.getByLabel("Time range", { exact: true }).first().selectOption("300");
    await console_.page.locator(".plot-box .line").first().waitFor({ state: "attached" });
    // A range of five minutes has ticks at full minutes, one of a minute has ticks with seconds.
    const lastTick = (): Promise<string> => console_.byId("chart").first().locator(".plot-box text").last().innerHTML();
    await expect.poll(lastTick, { timeout: WAIT_MS }).toMatch(/^\d\d:\d\d$/);
  });

  it("charts have a crosshair, a legend that toggles lines, a zoom by dragging and a table", async () => {
    const title = await console_
      .byId("chart")
      .filter({ has: console_.page.locator(".plot-box .line") })
      .first()
      .getAttribute("aria-label");
    const chart = console_.page.locator(`[data-testid=chart][aria-label="${title}"]`);
    const plot = chart.locator(".plot-box").first();
    const box = await plot.boundingBox();
    if (!box) throw new Error("the chart is not shown");

    const [y, left, right] = [box.y + box.height / 2, box.x + box.width * 0.4, box.x + box.width * 0.7];
    await console_.page.mouse.move(left, y);
    await chart.locator(".crosshair").waitFor({ state: "attached" });
    await expect.poll(() => chart.locator(".legend-when").innerText()).toMatch(/\d/);

    await console_.page.mouse.down();
    await console_.page.mouse.move(right, y, { steps: 4 });
    await console_.page.mouse.up();
    await chart.getByRole("button", { name: "Whole range" }).click();

    const first = chart.locator(".legend-item").first();
    const lines = await chart.locator(".plot-box .line").count();
    await first.click();
    await expect.poll(() => chart.locator(".plot-box .line").count()).toBe(lines - 1);
    await first.click();

    await chart.getByRole("button", { name: "Show as table" }).click();
    await chart.locator(".plot-table tbody tr").first().waitFor();
    await chart.getByRole("button", { name: "Show as chart" }).click();
    await chart.locator(".plot-box").waitFor();
  });

  it("is accessible and fits a phone, light and dark", async () => {
    await console_.accessible("console");
    await console_.page.emulateMedia({ colorScheme: "dark" });
    await console_.accessible("console, dark");
    await console_.page.setViewportSize(PHONE);
    // Charts resize in the next frame.
    await expect.poll(() => console_.fits(PHONE.width).then(() => true, String)).toBe(true);
    await console_.page.setViewportSize(DESKTOP);
    await console_.page.emulateMedia({ colorScheme: "light" });
  });
});

describe("a server that is killed", () => {
  it("every page reports it, and new messages wait", async () => {
    for (const window of all()) window.serverDown = true;
    await server.kill();
    for (const window of all()) await window.byId("offline").waitFor();
    for (const text of ["written while the server was away", "and this after it"]) {
      await ann.send(text);
      await ann.message(text, "waiting").getByText("Waiting for the connection").waitFor();
    }
    expect(await ann.page.locator(".people .dot.ok").count()).toBe(0);
    await bob.byId("composer").fill("a draft");
  });

  it("after a restart, the pages recover by themselves and lose nothing", async () => {
    const texts = async (): Promise<string[]> => (await bob.messages()).map((message) => message.replace(/^\S+ /, ""));
    const before = await texts();

    await server.start();
    for (const window of all()) {
      await window.connected();
      await window.byId("offline").waitFor({ state: "detached" });
      window.serverDown = false;
    }

    await bob.message("and this after it").waitFor();
    expect(await texts()).toEqual([...before, "written while the server was away", "and this after it"]);
    expect(await bob.byId("composer").inputValue()).toBe("a draft");

    await bob.send("we are back");
    await ann.message("we are back").waitFor();
    await bob.message("we are back").waitFor();
    expect(await ann.messages()).toEqual(await bob.messages());
    await console_.changes(() => console_.page.locator(".plot-box .line").first().getAttribute("d"));
  });

  it("a reload shows the same page and keeps the user signed in", async () => {
    const before = await ann.messages();
    await ann.page.reload();
    await ann.message("we are back").waitFor();
    expect(await ann.messages()).toEqual(before);
  });
});

it("no window recorded an error, a policy violation or a request to another host", () => {
  expect(all().flatMap((window) => window.problems)).toEqual([]);
});

it("signing out in one window signs out that browser's other windows, and no other browser", async () => {
  const second = await Window.open(bob.page.context(), server.url, "bob, second window");
  await second.page.goto(server.url);
  await second.connected();
  await bob.byId("sign-out").click();
  for (const window of [bob, second]) await window.byId("login-name").waitFor();
  await second.page.close();
  await ann.send("still here");
  await ann.message("still here").waitFor();
  await bob.byId("login-name").fill("bob");
  await bob.byId("login-password").fill(PASSWORD);
  await bob.byId("login-submit").click();
  await bob.message("still here").waitFor();
});

it("signing out leads to the sign-in page, and signing in again returns to the room", async () => {
  await bob.byId("sign-out").click();
  await bob.byId("login-name").fill("bob");
  await bob.byId("login-password").fill(PASSWORD);
  await bob.byId("login-submit").click();
  await bob.message("we are back").waitFor();
});
