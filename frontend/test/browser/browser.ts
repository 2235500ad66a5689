// A browser window that also records errors, policy violations and requests to other hosts.
import { mkdirSync } from "node:fs";
import axe from "axe-core";
import { chromium, type Browser, type BrowserContext, type Locator, type Page } from "playwright-core";
import { expect } from "vitest";

export const WAIT_MS = 20_000;

export const launch = (): Promise<Browser> =>
  chromium.launch({
    executablePath: process.env["CHROMIUM"] ?? "/usr/bin/chromium",
    args: ["--no-sandbox", "--disable-dev-shm-usage"],
  });

export class Window {
  /** Unexpected console errors, exceptions, policy violations and requests to other hosts. */
  readonly problems: string[] = [];
  /** While set, failures to reach the server are expected. */
  serverDown = false;
  private refused: RegExp | undefined;

  private constructor(
    readonly page: Page,
    origin: string,
    private readonly name: string,
  ) {
    page.setDefaultTimeout(WAIT_MS);
    const problem = (what: string): void => void this.problems.push(`${name}: ${what}`);
    page.on("pageerror", (error) => problem(`exception: ${error.stack ?? error.message}`));
    page.on("console", (message) => {
      if (message.type() !== "error" && message.type() !== "warning") return;
      const [text, { url }] = [message.text(), message.location()];
      // The browser logs the expected 401 of a visitor who is not signed in.
      if (/401/.test(text) && url.endsWith("/auth/token")) return;
      if (this.refused?.test(text) && url.includes("/auth/")) return;
      if (this.serverDown && /ERR_CONNECTION|ERR_EMPTY_RESPONSE|WebSocket connection to/.test(text)) return;
      problem(`console: ${text} (${url})`);
    });
    page.on("request", (request) => {
      const url = new URL(request.url());
      if (!/^(data|blob|about):$/.test(url.protocol) && url.host !== new URL(origin).host)
        problem(`request to ${url.href}`);
    });
  }

  static async open(context: BrowserContext, origin: string, name: string): Promise<Window> {
    const window = new Window(await context.newPage(), origin, name);
    await window.page.addInitScript(() => {
      document.addEventListener("securitypolicyviolation", (event) =>
        console.error(`policy: ${event.violatedDirective} ${event.blockedURI} ${event.sample}`),
      );
    });
    return window;
  }

  /** Expects refusals of sign-in requests with this status; the browser logs each one. */
  serverSays(status: RegExp): void {
    this.refused = status;
  }

  byId(id: string): Locator {
    return this.page.getByTestId(id);
  }

  message(text: string, state = "sent"): Locator {
    return this.page.locator(`[data-testid=message][data-state=${state}]`).filter({ hasText: text });
  }

  /** Ids and texts of the displayed messages. */
  messages(): Promise<string[]> {
    return this.byId("message").evaluateAll((all) =>
      all.map(
        (one) => `${one.getAttribute("data-id")} ${one.querySelector("[data-testid=message-text]")?.textContent ?? ""}`,
      ),
    );
  }

  async signUp(name: string, password: string): Promise<void> {
    await this.byId("login-mode").click();
    await this.byId("login-name").fill(name);
    await this.byId("login-password").fill(password);
    await this.byId("login-submit").click();
    await this.connected();
  }

  async connected(): Promise<void> {
    await this.page.locator("[data-testid=connection-state][data-state=connected]").waitFor({ state: "attached" });
  }

  async send(text: string): Promise<void> {
    await this.byId("composer").fill(text);
    await this.byId("composer").press("Enter");
  }

  /** Resolves once `read` returns a different value than now. */
  async changes(read: () => Promise<unknown>): Promise<void> {
    const before = await read();
    await expect.poll(read, { timeout: WAIT_MS, interval: 100 }).not.toEqual(before);
  }

  async accessible(where: string): Promise<void> {
    await this.page.evaluate(axe.source);
    const found = await this.page.evaluate(async () => {
      const run = (window as unknown as { axe: typeof axe }).axe.run(document, { resultTypes: ["violations"] });
      return (await run).violations.map(
        ({ id, help, nodes }) =>
          `${id}: ${help}\n${nodes.map((node) => `    ${node.html}\n    ${node.failureSummary ?? ""}`).join("\n")}`,
      );
    });
    expect(found, `${where} (${this.name})`).toEqual([]);
  }

  /** Checks that nothing is wider than the window. */
  async fits(width: number): Promise<void> {
    const wide = await this.page.evaluate(() => {
      const scrolls = (element: Element): boolean =>
        /auto|scroll/.test(getComputedStyle(element).overflowX) && !element.matches(".main, main, html, body");
      return [...document.querySelectorAll("body *")]
        .filter((element) => {
          const box = element.getBoundingClientRect();
          if (box.width === 0 || box.right <= innerWidth + 0.5 || getComputedStyle(element).visibility === "hidden")
            return false;
          for (let up = element.parentElement; up; up = up.parentElement)
            if (scrolls(up) || (getComputedStyle(up).overflowX === "hidden" && up !== document.body)) return false;
          return true;
        })
        .map(
          (element) =>
            `${element.tagName}.${element.getAttribute("class") ?? ""} ends at ${Math.round(element.getBoundingClientRect().right)}`,
        );
    });
    const scroll = await this.page.evaluate(() => [
      document.documentElement.scrollWidth,
      ...[...document.querySelectorAll("main")].map((main) => main.scrollWidth),
    ]);
    expect({ wide, over: scroll.filter((one) => one > width) }).toEqual({ wide: [], over: [] });
  }

  async picture(path: string): Promise<void> {
    mkdirSync(path.replace(/[^/]*$/, ""), { recursive: true });
    await this.page.screenshot({ path, animations: "disabled" });
  }
}
