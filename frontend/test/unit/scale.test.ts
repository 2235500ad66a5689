import { describe, expect, it } from "vitest";
import { areaPath, coincide, linePath, nearest, ticks, timeTicks, yRange } from "../../src/scale";

describe("ranges", () => {
  it("start at zero and leave a margin at the top", () => {
    expect(yRange([1, 10, null])).toEqual([0, 11]);
    expect(yRange([-5, 5])).toEqual([-5, 6]);
  });
  it("are never empty", () => {
    for (const values of [[], [null], [0, 0], [-3, -3]]) {
      const [low, high] = yRange(values);
      expect(high).toBeGreaterThan(low);
    }
  });
});

it("lines coincide when most of their common values are equal", () => {
  expect(coincide([1, 2, 3], [1, 2, 4])).toBe(true);
  expect(coincide([1, 2, 3], [1, 5, 4])).toBe(false);
  expect(coincide([null, 2], [1, 2])).toBe(true);
  expect(coincide([null], [null])).toBe(false);
});

describe("ticks", () => {
  it.each([
    [[0, 11], 4, [0, 5, 10]],
    [[0, 1.1], 4, [0, 0.5, 1]],
    [[0, 0.44], 4, [0, 0.2, 0.4]],
    [[0, 0.3], 3, [0, 0.1, 0.2, 0.3]],
    [[-5, 6], 4, [-5, 0, 5]],
    [[0, 48_400], 4, [0, 20_000, 40_000]],
    [[1, 1], 4, []],
    [[0, Infinity], 4, []],
  ] as const)("of %j are round", (range, most, expected) => expect(ticks(range, most)).toEqual(expected));

  it("are round in units of 1024 for bytes", () => {
    expect(ticks([0, 4_400_000], 4, 1024)).toEqual([0, 2 * 1024 ** 2, 4 * 1024 ** 2]);
    expect(ticks([0, 500], 4, 1024)).toEqual([0, 200, 400]);
  });

  it("are at full minutes and hours for times", () => {
    const start = new Date(2026, 10, 21, 7, 46, 13).getTime() / 1000;
    const shown = (most: number, seconds: number): string[] =>
      timeTicks([start, start + seconds], most).map((t) => new Date(t * 1000).toTimeString().slice(0, 8));
    expect(shown(5, 60)).toEqual(["07:46:15", "07:46:30", "07:46:45", "07:47:00"]);
    expect(shown(5, 300)).toEqual(["07:47:00", "07:48:00", "07:49:00", "07:50:00", "07:51:00"]);
    expect(shown(4, 86_400)).toEqual(["12:00:00", "18:00:00", "00:00:00", "06:00:00"]);
  });
});

it("nearest finds the closest sample", () => {
  expect([0, 4, 5.1, 9, 99].map((at) => nearest([1, 4, 6, 10], at))).toEqual([0, 1, 2, 3, 3]);
  expect(nearest([], 1)).toBe(-1);
});

describe("paths", () => {
  const path = (...values: (number | null)[]): string =>
    linePath(
      values.map((_, i) => i),
      values,
      (x) => x * 10,
      (y) => y,
    );
  it("break where a value is missing, and a lone value is a dot", () => {
    expect(path(1, 2, null, 3, null, 4, 5)).toBe("M0.0 1.0L10.0 2.0M30.0 3.0h0M50.0 4.0L60.0 5.0");
    expect([path(), path(null), path(7)]).toEqual(["", "", "M0.0 7.0h0"]);
  });
  it("an area closes each piece of the line", () => {
    expect(areaPath(path(1, 2, null, 3, null, 4, 5), 9)).toBe(
      "M0.0 1.0L10.0 2.0L10.0 9L0.0 9ZM50.0 4.0L60.0 5.0L60.0 9L50.0 9Z",
    );
  });
});
