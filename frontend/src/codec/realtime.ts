// The messages of the Centrifuge client protocol v2 (package centrifugal.centrifuge.protocol) that this client uses.
import { bool, bytes, int, mapOf, message, optional, repeated, string, stringMap, uint, type Infer } from "./proto";

export const error = message({ code: uint(1), message: string(2), temporary: bool(3) });
export const clientInfo = message({ user: string(1), client: string(2), connInfo: bytes(3), chanInfo: bytes(4) });
export const publication = message({
  data: bytes(4),
  info: optional(5, () => clientInfo),
  offset: uint(6),
  tags: stringMap(7),
  delta: bool(8),
  time: int(9),
  channel: string(10),
});

export const subscribeRequest = message({
  channel: string(1),
  token: string(2),
  recover: bool(3),
  epoch: string(6),
  offset: uint(7),
  data: bytes(8),
  positioned: bool(9),
  recoverable: bool(10),
  joinLeave: bool(11),
  delta: string(12),
});
export const subscribeResult = message({
  expires: bool(1),
  ttl: uint(2),
  recoverable: bool(3),
  epoch: string(6),
  publications: repeated(7, () => publication),
  recovered: bool(8),
  offset: uint(9),
  positioned: bool(10),
  data: bytes(11),
  wasRecovering: bool(12),
  delta: bool(13),
});
export const connectRequest = message({
  token: string(1),
  data: bytes(2),
  subs: mapOf(3, () => subscribeRequest),
  name: string(4),
  version: string(5),
  headers: stringMap(6),
});
export const connectResult = message({
  client: string(1),
  version: string(2),
  expires: bool(3),
  ttl: uint(4),
  data: bytes(5),
  subs: mapOf(6, () => subscribeResult),
  ping: uint(7),
  pong: bool(8),
  session: string(9),
  node: string(10),
  time: int(11),
});
export const channelRequest = message({ channel: string(1) });
export const publishRequest = message({ channel: string(1), data: bytes(2) });
export const presenceResult = message({ presence: mapOf(1, () => clientInfo) });
export const streamPosition = message({ offset: uint(1), epoch: string(2) });
export const historyRequest = message({
  channel: string(1),
  limit: int(7),
  since: optional(8, () => streamPosition),
  reverse: bool(9),
});
export const historyResult = message({
  publications: repeated(1, () => publication),
  epoch: string(2),
  offset: uint(3),
});
export const rpcRequest = message({ data: bytes(1), method: string(2) });
export const rpcResult = message({ data: bytes(1) });
export const refreshRequest = message({ token: string(1) });
export const refreshResult = message({ client: string(1), version: string(2), expires: bool(3), ttl: uint(4) });
export const nothing = message({});

export const command = message({
  id: uint(1),
  connect: optional(4, () => connectRequest),
  subscribe: optional(5, () => subscribeRequest),
  unsubscribe: optional(6, () => channelRequest),
  publish: optional(7, () => publishRequest),
  presence: optional(8, () => channelRequest),
  history: optional(10, () => historyRequest),
  ping: optional(11, () => nothing),
  rpc: optional(13, () => rpcRequest),
  refresh: optional(14, () => refreshRequest),
});

export const join = message({ info: optional(1, () => clientInfo) });
export const unsubscribePush = message({ code: uint(2), reason: string(3) });
export const disconnectPush = message({ code: uint(1), reason: string(2), reconnect: bool(3) });
export const messagePush = message({ data: bytes(1) });

export const push = message({
  id: uint(1),
  channel: string(2),
  pub: optional(4, () => publication),
  join: optional(5, () => join),
  leave: optional(6, () => join),
  unsubscribe: optional(7, () => unsubscribePush),
  message: optional(8, () => messagePush),
  disconnect: optional(11, () => disconnectPush),
});

export const reply = message({
  id: uint(1),
  error: optional(2, () => error),
  push: optional(4, () => push),
  connect: optional(5, () => connectResult),
  subscribe: optional(6, () => subscribeResult),
  unsubscribe: optional(7, () => nothing),
  publish: optional(8, () => nothing),
  presence: optional(9, () => presenceResult),
  history: optional(11, () => historyResult),
  ping: optional(12, () => nothing),
  rpc: optional(13, () => rpcResult),
  refresh: optional(14, () => refreshResult),
});

export type ClientInfo = Infer<typeof clientInfo>;
export type Publication = Infer<typeof publication>;
export type SubscribeResult = Infer<typeof subscribeResult>;
export type ConnectResult = Infer<typeof connectResult>;
export type HistoryResult = Infer<typeof historyResult>;
export type Command = Infer<typeof command>;
export type Push = Infer<typeof push>;
export type Reply = Infer<typeof reply>;
