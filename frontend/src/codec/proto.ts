// Builds encoders and decoders of protobuf messages from tables of field names and numbers. Unknown fields are skipped,
// so that an older page understands a newer server.
import { PbfReader, PbfWriter } from "pbf";

export interface Field<T> {
  tag: number;
  empty(): T;
  read(reader: PbfReader, previous: T): T;
  write(writer: PbfWriter, value: T): void;
}

export type Partially<T> = T extends Uint8Array
  ? T
  : T extends (infer U)[]
    ? Partially<U>[]
    : T extends object
      ? { [K in keyof T]?: Partially<T[K]> }
      : T;

export interface Message<T> {
  empty(): T;
  readFrom(reader: PbfReader, end: number): T;
  writeTo(writer: PbfWriter, value: Partially<T>): void;
  decode(bytes: Uint8Array): T;
  encode(value: Partially<T>): Uint8Array;
}

export type Shape = Record<string, Field<unknown>>;
export type Fields<S extends Shape> = { [K in keyof S]: S[K] extends Field<infer T> ? T : never };
export type Infer<M> = M extends Message<infer T> ? T : never;

export function message<S extends Shape>(shape: S): Message<Fields<S>> {
  const names = Object.keys(shape);
  const byTag = new Map(names.map((name) => [shape[name]?.tag ?? 0, name]));
  const empty = (): Record<string, unknown> => Object.fromEntries(names.map((name) => [name, shape[name]?.empty()]));
  const readFrom = (reader: PbfReader, end: number): Record<string, unknown> => {
    // Check the end here, because the reader does not stop at the end of its bytes.
    if (end > reader.length) throw new Error("a nested message is longer than its frame");

    const read = reader.readFields<Record<string, unknown>>(
      (tag, result) => {
        const name = byTag.get(tag);
        const field = name === undefined ? undefined : shape[name];
        if (name !== undefined && field) result[name] = field.read(reader, result[name]);
      },
      empty(),
      end,
    );

    if (reader.pos !== end) throw new Error("a field extends beyond its message");
    return read;
  };
  const writeTo = (writer: PbfWriter, value: Record<string, unknown>): void => {
    for (const name of names) {
      const given = value[name];
      if (given !== undefined) shape[name]?.write(writer, given);
    }
  };

  const built: Message<Record<string, unknown>> = {
    empty,
    readFrom,
    writeTo,
    decode: (bytes) => readFrom(new PbfReader(bytes), bytes.length),
    encode: (value) => {
      const writer = new PbfWriter();
      writeTo(writer, value);
      return writer.finish();
    },
  };
  return built as unknown as Message<Fields<S>>;
}

function scalar<T>(
  empty: () => T,
  isEmpty: (value: T) => boolean,
  read: (reader: PbfReader) => T,
  write: (writer: PbfWriter, tag: number, value: T) => void,
): (tag: number) => Field<T> {
  return (tag) => ({
    tag,
    empty,
    read: (reader) => read(reader),
    write: (writer, value) => {
      if (!isEmpty(value)) write(writer, tag, value);
    },
  });
}

// JavaScript numbers are exact up to 2^53. Ids, offsets and times on this wire stay far below.
export const uint = scalar(
  () => 0,
  (v) => v === 0,
  (r) => r.readVarint(),
  (w, tag, v) => w.writeVarintField(tag, v),
);
export const int = scalar(
  () => 0,
  (v) => v === 0,
  (r) => r.readVarint(true),
  (w, tag, v) => w.writeVarintField(tag, v),
);
export const bool = scalar(
  () => false,
  (v) => !v,
  (r) => r.readBoolean(),
  (w, tag, v) => w.writeBooleanField(tag, v),
);
export const string = scalar(
  () => "",
  (v) => v === "",
  (r) => r.readString(),
  (w, tag, v) => w.writeStringField(tag, v),
);
export const bytes = scalar<Uint8Array>(
  () => new Uint8Array(0),
  (v) => v.length === 0,
  (r) => r.readBytes(),
  (w, tag, v) => w.writeBytesField(tag, v),
);

/** A scalar field of a oneof, where an empty value differs from an absent one and must be written. */
export function present<T>(
  tag: number,
  read: (reader: PbfReader) => T,
  write: (writer: PbfWriter, tag: number, value: T) => void,
): Field<T | undefined> {
  return {
    tag,
    empty: () => undefined,
    read: (reader) => read(reader),
    write: (writer, value) => {
      if (value !== undefined) write(writer, tag, value);
    },
  };
}

export function optional<T>(tag: number, of: () => Message<T>): Field<T | undefined> {
  return {
    tag,
    empty: () => undefined,
    read: (reader) => of().readFrom(reader, reader.readVarint() + reader.pos),
    write: (writer, value) => {
      if (value === undefined) return;
      writer.writeMessage(tag, (v: T, w) => of().writeTo(w, v as Partially<T>), value);
    },
  };
}

export function repeated<T>(tag: number, of: () => Message<T>): Field<T[]> {
  return {
    tag,
    empty: () => [],
    read: (reader, list) => {
      list.push(of().readFrom(reader, reader.readVarint() + reader.pos));
      return list;
    },
    write: (writer, list) => {
      for (const item of list) writer.writeMessage(tag, (v: T, w) => of().writeTo(w, v as Partially<T>), item);
    },
  };
}

export function strings(tag: number): Field<string[]> {
  return {
    tag,
    empty: () => [],
    read: (reader, list) => {
      list.push(reader.readString());
      return list;
    },
    write: (writer, list) => {
      for (const item of list) writer.writeStringField(tag, item);
    },
  };
}

/** A map<string, message>, encoded as repeated entries with the key in field 1 and the value in field 2. */
export function mapOf<T>(tag: number, of: () => Message<T>): Field<Record<string, T>> {
  const entry = message({ key: string(1), value: optional(2, of) });
  const entries = repeated(tag, () => entry);
  return {
    tag,
    empty: () => ({}),
    read: (reader, map) => {
      for (const { key, value } of entries.read(reader, [])) map[key] = value ?? of().empty();
      return map;
    },
    write: (writer, map) =>
      entries.write(
        writer,
        Object.entries(map).map(([key, value]) => ({ key, value })),
      ),
  };
}

export function stringMap(tag: number): Field<Record<string, string>> {
  const entry = message({ key: string(1), value: string(2) });
  const entries = repeated(tag, () => entry);
  return {
    tag,
    empty: () => ({}),
    read: (reader, map) => {
      for (const { key, value } of entries.read(reader, [])) map[key] = value;
      return map;
    },
    write: (writer, map) =>
      entries.write(
        writer,
        Object.entries(map).map(([key, value]) => ({ key, value })),
      ),
  };
}

/** Joins messages into one frame, each one prefixed with its length as a varint. */
export function joinFrames(messages: Uint8Array[]): Uint8Array {
  const writer = new PbfWriter();
  for (const item of messages) writer.writeBytes(item);
  return writer.finish();
}

export function splitFrames(frame: Uint8Array): Uint8Array[] {
  const reader = new PbfReader(frame);
  const messages: Uint8Array[] = [];
  while (reader.pos < frame.length) {
    const length = reader.readVarint();
    if (reader.pos + length > frame.length) throw new Error("the frame ends inside a message");
    messages.push(frame.subarray(reader.pos, reader.pos + length));
    reader.pos += length;
  }
  return messages;
}
