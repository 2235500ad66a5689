import { describe, expect, it } from "vitest";
import { at, fromBytes, parse, type JsonObject } from "../../src/json";
import { breakdown, merge, numbers, type Sample } from "../../src/live";

const samples = (...of: [number, JsonObject][]): Sample[] => of.map(([t, data]) => ({ t, data }));
const times = (of: Sample[]): number[] => of.map(({ t }) => t);
const many = (count: number, from = 0): Sample[] =>
  Array.from({ length: count }, (_, i) => ({ t: from + i, data: {} }));

describe("merge", () => {
  it("sorts by time and keeps the last of several samples with the same time", () => {
    expect(times(merge(samples([3, {}], [5, {}]), samples([1, {}], [4, {}])))).toEqual([1, 3, 4, 5]);
    expect(merge(samples([1, { a: 1 }], [2, {}]), samples([1, { a: 2 }]))).toEqual(samples([1, { a: 2 }], [2, {}]));
    expect(times(merge([], samples([2, {}], [1, {}], [2, {}])))).toEqual([1, 2]);
    expect(merge([], [])).toEqual([]);
  });

  it("puts history before live samples that arrived first", () => {
    expect(times(merge(many(3, 10), many(13)))).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
  });

  it("keeps the newest 900", () => {
    expect(times(merge(many(900), many(10, 900)))).toEqual(times(many(900, 10)));
    expect(merge(many(900, 50), many(100))).toHaveLength(900);
    expect(merge(many(10), [])).toHaveLength(10);
  });
});

describe("numbers", () => {
  const totals = samples([1_000, { a: { n: 10 } }], [2_000, { a: { n: 30 } }], [4_000, { a: { n: 40 } }]);

  it("reads a path, with null for anything but a number", () => {
    expect(numbers(totals, "a.n", false)).toEqual([10, 30, 40]);
    expect(numbers(samples([1, { a: "x" }], [2, {}], [3, { a: 0 }]), "a", false)).toEqual([null, null, 0]);
  });

  it("computes rates per second between two samples", () => {
    expect(numbers(totals, "a.n", true)).toEqual([null, 20, 5]);
  });

  it("gives no rate where a restarted total fell", () => {
    const restarted = samples([1_000, { n: 500 }], [2_000, { n: 600 }], [3_000, { n: 4 }], [4_000, { n: 10 }]);
    expect(numbers(restarted, "n", true)).toEqual([null, 100, null, 6]);
  });

  it("gives no rate next to a missing sample, nor an infinite one", () => {
    expect(numbers(samples([1_000, { n: 1 }], [2_000, {}], [3_000, { n: 9 }]), "n", true)).toEqual([null, null, null]);
    expect(numbers(samples([1_000, { n: 1 }], [1_000, { n: 9 }]), "n", true)).toEqual([null, null]);
  });
});

describe("breakdown", () => {
  const by = samples([1_000, { by: { b: 1, a: 5 } }], [2_000, { by: { a: 7, c: 1 } }]);

  it("gives one series for each name, in alphabetical order so that colours stay", () => {
    expect(breakdown(by, "by", false, 8)).toEqual([
      { label: "a", values: [5, 7] },
      { label: "b", values: [1, null] },
      { label: "c", values: [null, 1] },
    ]);
    expect(breakdown(by, "by", true, 8)[0]).toEqual({ label: "a", values: [null, 2] });
  });

  it("gives no more series than asked for, and none for values that are not objects", () => {
    expect(breakdown(by, "by", false, 2)).toHaveLength(2);
    expect(breakdown(samples([1, { by: [1, 2] }], [2, { by: 3 }]), "by", false, 8)).toEqual([]);
  });
});

describe("json", () => {
  it("follows dotted paths", () => {
    const value = { a: [{ b: 1 }], c: null };
    expect([at(value, ""), at(value, "a.0.b"), at(value, "a.1.b"), at(value, "c.d"), at(value, "a.b")]).toEqual([
      value,
      1,
      undefined,
      undefined,
      undefined,
    ]);
  });

  it("gives null for bytes that are not JSON", () => {
    expect([parse("{"), fromBytes(Uint8Array.of(0xff)), fromBytes(new Uint8Array(0))]).toEqual([null, null, null]);
  });
});
