// A fake server for the connection. It records each command and replies as the test scripts it.
import { joinFrames, splitFrames, type Partially } from "../../src/codec/proto";
import { command, reply, type Command, type Reply } from "../../src/codec/realtime";

type Answer = Partially<Reply> | undefined;

/** The client's end of one WebSocket. */
export class FakeSocket {
  readonly CONNECTING = 0;
  readonly OPEN = 1;
  readonly CLOSED = 3;
  readyState: number = this.CONNECTING;
  binaryType = "blob";
  onopen: (() => void) | null = null;
  onmessage: ((message: { data: unknown }) => void) | null = null;
  onclose: ((close: { code: number; reason: string }) => void) | null = null;
  onerror: (() => void) | null = null;
  /** The commands that the page sent, in order. */
  readonly commands: Command[] = [];
  /** Number of frames that carried them. */
  frames = 0;
  pongs = 0;

  constructor(
    readonly url: string,
    readonly protocol: string,
    private readonly server: FakeServer,
  ) {}

  send(data: Uint8Array): void {
    this.frames++;
    for (const message of splitFrames(data)) {
      if (message.length === 0) {
        this.pongs++;
        continue;
      }
      const sent = command.decode(message);
      this.commands.push(sent);
      const answer = this.server.answer(sent, this);
      if (answer) queueMicrotask(() => this.say({ id: sent.id, ...answer }));
    }
  }

  close(): void {
    this.readyState = this.CLOSED;
  }

  accept(): void {
    this.readyState = this.OPEN;
    this.onopen?.();
  }

  say(...replies: Partially<Reply>[]): void {
    this.raw(joinFrames(replies.map((one) => reply.encode(one))));
  }

  ping(): void {
    this.raw(Uint8Array.of(0));
  }

  raw(data: Uint8Array): void {
    if (this.readyState === this.OPEN) this.onmessage?.({ data: Uint8Array.from(data).buffer });
  }

  /** Closes the socket as the server or the network would. */
  drop(code = 1006, reason = ""): void {
    this.readyState = this.CLOSED;
    this.onclose?.({ code, reason });
  }

  of<K extends keyof Command>(kind: K): NonNullable<Command[K]>[] {
    return this.commands.flatMap((one) => (one[kind] === undefined ? [] : [one[kind] as NonNullable<Command[K]>]));
  }
}

export class FakeServer {
  readonly sockets: FakeSocket[] = [];
  up = true;
  connect: Answer = { connect: { client: "c1", node: "n1", ping: 25, pong: true } };
  subscribe: (channel: string, sent: Command) => Answer = () => ({
    subscribe: { recoverable: true, epoch: "e", offset: 0 },
  });
  rpc: (method: string, data: Uint8Array) => Answer = () => ({ rpc: {} });
  other: (sent: Command) => Answer = (sent) => {
    if (sent.presence) return { presence: {} };
    if (sent.history) return { history: { epoch: "e" } };
    if (sent.refresh) return { refresh: { expires: true, ttl: 900 } };
    return {};
  };

  readonly webSocket = (url: string, protocol: string): WebSocket => {
    const socket = new FakeSocket(url, protocol, this);
    this.sockets.push(socket);
    queueMicrotask(() => (this.up ? socket.accept() : socket.drop()));
    return socket as unknown as WebSocket;
  };

  get socket(): FakeSocket {
    const last = this.sockets[this.sockets.length - 1];
    if (!last) throw new Error("no socket has connected");
    return last;
  }

  answer(sent: Command, _socket: FakeSocket): Answer {
    if (sent.connect) return this.connect;
    if (sent.subscribe) return this.subscribe(sent.subscribe.channel, sent);
    if (sent.rpc) return this.rpc(sent.rpc.method, sent.rpc.data);
    return this.other(sent);
  }

  publish(channel: string, data: Uint8Array, offset = 0): void {
    this.socket.say({ push: { channel, pub: { data, offset } } });
  }
}
