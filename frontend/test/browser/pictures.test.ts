// Takes the screenshots in the documents: SCREENSHOTS=1 npm run test:browser.
import { afterAll, beforeAll, describe, it } from "vitest";
import type { Browser } from "playwright-core";
import { launch, Window } from "./browser";
import { Server } from "./server";

const TRAFFIC_MS = 62_000;
const SIZE = { width: 1280, height: 800 };
const image = (name: string): string => new URL(`../../../docs/img/${name}.png`, import.meta.url).pathname;

describe.runIf(process.env["SCREENSHOTS"] === "1")("pictures", () => {
  let server: Server;
  let browser: Browser;
  beforeAll(async () => {
    server = new Server();
    await server.start();
    browser = await launch();
  });
  afterAll(async () => {
    await browser.close();
    await server.end();
  });

  it("of the chat and the console", async () => {
    const join = async (name: string): Promise<Window> => {
      const window = await Window.open(
        await browser.newContext({ viewport: SIZE, colorScheme: "light" }),
        server.url,
        name,
      );
      await window.page.goto(server.url);
      await window.signUp(name, "correct horse battery staple");
      return window;
    };
    const [ann, ben, mira] = [await join("ann"), await join("ben"), await join("mira")];
    // Run some tasks, so that the assistant's answer and the console show real numbers.
    for (let i = 0; i < 40; i++)
      await Promise.all(["echo", "ops", "echo"].map((type) => server.submit(type, { prompt: "status" })));
    const say = async (who: Window, text: string): Promise<void> => {
      await who.send(text);
      await ann.page
        .locator("[data-testid=message][data-state=sent]")
        .filter({ hasText: text.slice(0, 24).replace(/[*`]/g, "") })
        .first()
        .waitFor();
    };
    const answered = (count: number): Promise<void> =>
      ann.page
        .locator("[data-testid=message].assistant[data-state=sent]")
        .nth(count - 1)
        .waitFor();
    await say(ben, "Morning! The new worker is in, it takes the `echo` tasks now.");
    await say(ann, "Great. Let me look at how it is doing.");
    await say(ann, "@assistant status");
    await answered(1);
    await say(mira, "Quiet so far. Who offers what?");
    await say(mira, "@assistant providers");
    await answered(2);
    await say(ben, "That is the one. I will send a minute of load and watch the console.");
    const console_ = await Window.open(
      await browser.newContext({
        viewport: { width: 1280, height: 900 },
        colorScheme: "dark",
        storageState: await ann.page.context().storageState(),
      }),
      server.url,
      "console",
    );
    await console_.page.goto(`${server.url}/console`);
    await console_.connected();
    await ann.page.locator("main").focus();
    await ann.page.mouse.move(0, 0);
    await ann.picture(image("chat"));

    const until = Date.now() + TRAFFIC_MS;
    const load = async (type: string): Promise<void> => {
      for (let i = 0; Date.now() < until; i++)
        await Promise.all(Array.from({ length: 1 + (i % 4) }, () => server.submit(type, { prompt: "status" })));
    };
    const talk = async (): Promise<void> => {
      for (let i = 0; Date.now() < until; i++) {
        await ben.send(`round ${i}`);
        await mira.message(`round ${i}`).first().waitFor();
        await ben.page.waitForTimeout(400 + 900 * (i % 3));
      }
    };
    await ben.byId("room-link").filter({ hasText: "random" }).click();
    await mira.byId("room-link").filter({ hasText: "random" }).click();
    await Promise.all([load("echo"), load("ops"), talk()]);
    await console_.picture(image("console"));
  });
});
