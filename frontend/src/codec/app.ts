// The messages of live web apps (package beamline.app) between the server and a page.
import { bool, message, optional, present, repeated, string, strings, uint, type Infer, type Message } from "./proto";

export const prop = message({
  name: string(1),
  text: present<string>(
    2,
    (r) => r.readString(),
    (w, tag, v) => w.writeStringField(tag, v),
  ),
  number: present<number>(
    3,
    (r) => r.readDouble(),
    (w, tag, v) => w.writeDoubleField(tag, v),
  ),
  flag: present<boolean>(
    4,
    (r) => r.readBoolean(),
    (w, tag, v) => w.writeBooleanField(tag, v),
  ),
  json: present<string>(
    5,
    (r) => r.readString(),
    (w, tag, v) => w.writeStringField(tag, v),
  ),
});
export type Prop = Infer<typeof prop>;

export interface Node {
  id: number;
  kind: string;
  key: string;
  props: Prop[];
  children: Node[];
}
export const node: Message<Node> = message({
  id: uint(1),
  kind: string(2),
  key: string(3),
  props: repeated(4, () => prop),
  children: repeated<Node>(5, () => node),
});

export const insert = message({ parent: uint(1), index: uint(2), node: optional(3, () => node) });
export const update = message({ id: uint(1), set: repeated(2, () => prop), unset: strings(3) });
export const remove = message({ id: uint(1) });
export const move = message({ id: uint(1), parent: uint(2), index: uint(3) });
export const appendText = message({ id: uint(1), prop: string(2), text: string(3) });
export const reset = message({ children: repeated(1, () => node), title: string(2) });

export const delta = message({
  insert: optional(1, () => insert),
  update: optional(2, () => update),
  remove: optional(3, () => remove),
  move: optional(4, () => move),
  appendText: optional(5, () => appendText),
  reset: optional(6, () => reset),
});
export type Delta = Infer<typeof delta>;

export const deltas = message({ delta: repeated(1, () => delta) });
export const runFinished = message({ durationUs: uint(1) });
export const failure = message({ message: string(1), traceId: string(2) });
export const navigate = message({ path: string(1), query: string(2) });
export const toast = message({ tone: string(1), text: string(2) });

export const forward = message({
  version: uint(1),
  run: uint(2),
  deltas: optional(3, () => deltas),
  runFinished: optional(4, () => runFinished),
  error: optional(5, () => failure),
  navigate: optional(6, () => navigate),
  toast: optional(7, () => toast),
});
export type Forward = Infer<typeof forward>;
export type Failure = Infer<typeof failure>;

export const event = message({ key: string(1), value: string(2) });
export const rerun = message({ path: string(1), query: string(2), reset: bool(3) });
export const submit = message({ form: string(1), values: repeated(2, () => event) });
export const stop = message({});

export const back = message({
  version: uint(1),
  session: string(2),
  event: optional(3, () => event),
  rerun: optional(4, () => rerun),
  submit: optional(5, () => submit),
  stop: optional(6, () => stop),
});
export type Back = Infer<typeof back>;
