// Tests the codecs with the golden vectors that the Rust crates use too, and with malformed input.
import { readFileSync } from "node:fs";
import { describe, expect, it } from "vitest";
import { back, forward, type Back, type Forward } from "../../src/codec/app";
import { joinFrames, splitFrames, type Partially } from "../../src/codec/proto";
import { command, publication, reply } from "../../src/codec/realtime";

interface AppVector<T> {
  name: string;
  protobuf: string;
  json: T;
}
interface RealtimeVector {
  json: string;
  protobuf: string;
}

const read = <T>(name: string): T =>
  JSON.parse(readFileSync(new URL(`../../../fixtures/wire/${name}`, import.meta.url), "utf8")) as T;
const app = read<{ forward: AppVector<Partially<Forward>>[]; back: AppVector<Partially<Back>>[] }>("app.json");
const realtime = read<{ commands: RealtimeVector[]; replies: RealtimeVector[] }>("realtime.json");

const bytes = (hex: string): Uint8Array => Uint8Array.from(hex.match(/../g) ?? [], (two) => parseInt(two, 16));
const hex = (data: Uint8Array): string => [...data].map((byte) => byte.toString(16).padStart(2, "0")).join("");

/** Without what was not on the wire; in a `Prop` (a oneof) empty values were. */
function pruned(value: unknown, oneof = false): unknown {
  if (Array.isArray(value)) return value.map((item) => pruned(item));
  if (typeof value !== "object" || value === null) return value;
  const kept = Object.entries(value).filter(([, v]) => {
    if (v === undefined) return false;
    return oneof || !(v === 0 || v === "" || v === false || (Array.isArray(v) && v.length === 0));
  });
  return Object.fromEntries(
    kept.map(([key, v]) => [
      key,
      key === "set" || key === "props" ? (v as unknown[]).map((p) => pruned(p, true)) : pruned(v),
    ]),
  );
}

describe("app messages", () => {
  it.each(app.forward)("forward: $name", ({ protobuf, json }) => {
    expect(pruned(forward.decode(bytes(protobuf)))).toEqual(json);
    expect(hex(forward.encode(json))).toBe(protobuf);
  });

  it.each(app.back)("back: $name", ({ protobuf, json }) => {
    expect(pruned(back.decode(bytes(protobuf)))).toEqual(json);
    expect(hex(back.encode(json))).toBe(protobuf);
  });

  it("skips fields of a newer server, at every level", () => {
    // The unknown field 99 as varint, as bytes and as fixed64, next to known fields.
    const newer = "98063b" + "9a0603414243" + "99060000000000000000";
    const first = app.forward.find(({ name }) => name === "run finished");
    expect(pruned(forward.decode(bytes(newer + (first?.protobuf ?? "") + newer)))).toEqual(first?.json);
    expect(forward.decode(bytes("0801" + "2205" + "0805" + "120141")).runFinished).toEqual({ durationUs: 5 });
  });
});

/** JSON on the real-time wire: snake case, bytes as embedded JSON. */
function jsonName(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}

function asJson(value: unknown): unknown {
  if (value instanceof Uint8Array) return JSON.parse(new TextDecoder().decode(value)) as unknown;
  if (Array.isArray(value)) return value.map(asJson);
  if (typeof value !== "object" || value === null) return value;
  const kept = Object.entries(value).filter(([, v]) => {
    if (v === undefined || v === 0 || v === "" || v === false) return false;
    if (v instanceof Uint8Array || Array.isArray(v)) return v.length > 0;
    return typeof v !== "object" || v === null || Object.keys(v as object).length > 0;
  });
  return Object.fromEntries(kept.map(([key, v]) => [jsonName(key), asJson(v)]));
}

describe("real-time messages", () => {
  const one = (frame: string): Uint8Array => {
    const messages = splitFrames(bytes(frame));
    expect(messages).toHaveLength(1);
    return messages[0] ?? new Uint8Array(0);
  };

  it.each(realtime.commands)("command $json", ({ json, protobuf }) => {
    const decoded = command.decode(one(protobuf));
    expect(asJson(decoded)).toEqual(JSON.parse(json));
    expect(hex(joinFrames([command.encode(decoded)]))).toBe(protobuf);
  });

  it.each(realtime.replies)("reply $json", ({ json, protobuf }) => {
    const decoded = reply.decode(one(protobuf));
    expect(asJson(decoded)).toEqual(JSON.parse(json));
    expect(hex(joinFrames([reply.encode(decoded)]))).toBe(protobuf);
  });

  it("splits and joins several messages of one frame", () => {
    const all = realtime.replies.map(({ protobuf }) => protobuf).join("");
    const messages = splitFrames(bytes(all));
    expect(messages).toHaveLength(realtime.replies.length);
    expect(hex(joinFrames(messages))).toBe(all);
    expect(splitFrames(new Uint8Array(0))).toEqual([]);
  });

  it("keeps bytes that are not JSON", () => {
    const data = Uint8Array.from([0, 255, 1, 254]);
    expect(publication.decode(publication.encode({ data, offset: 3 })).data).toEqual(data);
  });
});

describe("malformed input", () => {
  it("refuses a frame that ends inside a message", () => {
    expect(() => splitFrames(bytes("05080110"))).toThrow();
    expect(() => splitFrames(bytes("ffffffffffffffffff7f00"))).toThrow();
    expect(() => splitFrames(bytes("80"))).toThrow();
  });

  it("refuses a length that exceeds the message", () => {
    expect(() => forward.decode(bytes("1aff01"))).toThrow(); // claims 255 bytes of deltas
    expect(() => forward.decode(bytes("1affffffff7f00"))).toThrow(); // claims 32 GB, which must not hang
    expect(() => reply.decode(bytes("120a0801"))).toThrow();
    expect(() => reply.decode(bytes("2205120a63"))).toThrow(); // a truncated channel name
    expect(() => publication.decode(bytes("220548"))).toThrow(); // truncated data
  });

  it("refuses every truncation of a golden message or reads a shorter one, quickly", () => {
    const started = performance.now();
    for (const { protobuf } of app.forward) {
      const whole = bytes(protobuf);
      for (let end = 0; end < whole.length; end++) {
        try {
          forward.decode(whole.subarray(0, end));
        } catch (error) {
          expect(error).toBeInstanceOf(Error);
        }
      }
    }
    expect(performance.now() - started).toBeLessThan(2_000);
  });

  it("never hangs or crashes on random bytes", () => {
    let state = 20_260_101; // the seed
    const random = (): number => (state = (Math.imul(state, 1_103_515_245) + 12_345) >>> 0) / 2 ** 32;
    for (let round = 0; round < 3_000; round++) {
      const data = Uint8Array.from({ length: Math.floor(random() * 60) }, () => Math.floor(random() * 256));
      for (const decode of [forward.decode, back.decode, reply.decode, command.decode, splitFrames]) {
        try {
          decode(data);
        } catch (error) {
          expect(error).toBeInstanceOf(Error);
        }
      }
    }
    // A hang fails; a machine that is busy with other builds does not.
  }, 60_000);
});
