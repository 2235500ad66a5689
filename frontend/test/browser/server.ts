// Runs the real binary, which can be killed and restarted on the same port and data.
import { spawn, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { createInterface } from "node:readline";

const READY_MS = 30_000;
const LOG_LINES = 200;

export class Server {
  readonly dir = mkdtempSync(join(tmpdir(), "beamline-browser-"));
  readonly socket = join(this.dir, "gw.sock");
  private readonly binary = resolve(process.env["BEAMLINE"] ?? "../target/debug/beamline");
  private process: ChildProcess | undefined;
  private address = "127.0.0.1:0";
  /** The last lines of its output, for failure messages. */
  readonly log: string[] = [];

  get url(): string {
    return `http://${this.address}`;
  }

  async start(): Promise<void> {
    if (!existsSync(this.binary))
      throw new Error(`${this.binary} does not exist: run cargo build, or set BEAMLINE to the binary`);

    const child = spawn(
      this.binary,
      [
        "up",
        "--data-dir",
        this.dir,
        "--http",
        this.address,
        "--ops",
        "127.0.0.1:0",
        "--grpc",
        "127.0.0.1:0",
        "--socket",
        this.socket,
      ],
      { stdio: ["ignore", "pipe", "pipe"] },
    );
    this.process = child;
    const keep = (line: string): void => {
      this.log.push(line);
      if (this.log.length > LOG_LINES) this.log.shift();
    };
    createInterface({ input: child.stderr }).on("line", keep);

    const ready = await new Promise<string>((found, failed) => {
      const late = setTimeout(
        () => failed(new Error(`the server was not ready in time\n${this.log.join("\n")}`)),
        READY_MS,
      );
      createInterface({ input: child.stdout }).on("line", (line) => {
        keep(line);
        if (!line.startsWith("ready ")) return;
        clearTimeout(late);
        found(line.slice("ready ".length));
      });
      child.once("error", failed);
      child.once("exit", (code, signal) =>
        failed(new Error(`the server exited (${signal ?? code})\n${this.log.join("\n")}`)),
      );
    });
    this.address = String((JSON.parse(ready) as { http: string }).http);
  }

  /** Submits a task with the command line client and waits for its result. */
  async submit(type: string, payload: unknown): Promise<void> {
    const child = spawn(
      this.binary,
      ["submit", "--socket", this.socket, "--type", type, "--wait", "result", JSON.stringify(payload)],
      { stdio: "ignore" },
    );
    await once(child, "exit");
  }

  /** Kills the process as a crash would, without a shutdown. */
  async kill(): Promise<void> {
    const child = this.process;
    if (!child || child.exitCode !== null || child.signalCode !== null) return;
    const ended = once(child, "exit");
    child.kill("SIGKILL");
    await ended;
  }

  async end(): Promise<void> {
    await this.kill();
    rmSync(this.dir, { recursive: true, force: true });
  }
}
