import { describe, expect, it } from "vitest";
import { bytes, day, duration, initials, number, pick, sentence, withUnit } from "../../src/format";

describe("format", () => {
  it.each([
    [0, undefined, "0"],
    [1, undefined, "1"],
    [9999, undefined, "9999"],
    [0.5, undefined, "0.5"],
    [1.005, undefined, "1"],
    [12.34, undefined, "12.3"],
    [123.4, undefined, "123"],
    [10_000, undefined, "10k"],
    [12_345, undefined, "12.3k"],
    [999_999, undefined, "1000k"],
    [1_234_567, undefined, "1.2M"],
    [2e9, undefined, "2G"],
    [-12_345, undefined, "-12.3k"],
    [1.5, 2, "1.50"],
    [3, 0, "3"],
  ])("number %d (%s digits) is %s", (value, digits, expected) => expect(number(value, digits)).toBe(expected));

  it.each([
    [0, "0 B"],
    [1023, "1023 B"],
    [1024, "1 KiB"],
    [1536, "1.5 KiB"],
    [10 * 1024 ** 2, "10 MiB"],
    [3 * 1024 ** 4, "3072 GiB"],
  ])("%d bytes are %s", (value, expected) => expect(bytes(value)).toBe(expected));

  it.each([
    [0.25, "250 ms"],
    [1.5, "1.5 s"],
    [59, "59 s"],
    [61, "1 min 1 s"],
    [3_700, "1 h 1 min"],
    [200_000, "2 d 7 h"],
  ])("%d seconds are %s", (value, expected) => expect(duration(value)).toBe(expected));

  it.each([
    [512, "bytes", "512 B"],
    [5, "percent", "5.0 %"],
    [0.25, "percent", "0.3 %"],
    [900, "us", "900 µs"],
    [1_500, "us", "1.5 ms"],
    [0, "ms", "< 1 ms"],
    [3, "ms", "3 ms"],
    [7, "/s", "7 /s"],
    [7, "", "7"],
  ])("%d with unit %s is %s", (value, unit, expected) => expect(withUnit(value, unit)).toBe(expected));

  it.each([
    ["", ""],
    ["a password has 8 bytes", "A password has 8 bytes."],
    ["Again!", "Again!"],
    ["éa; b", "Éa; b."],
  ])("%j as a sentence is %j", (text, expected) => expect(sentence(text)).toBe(expected));

  it.each([
    ["Ann", "A"],
    ["ann lee", "AL"],
    ["a.b-c", "AC"],
    ["", "?"],
    ["  ", "?"],
    ["🙂 smile", "🙂S"],
    ["élan", "É"],
  ])("initials of %j are %s", (name, expected) => expect(initials(name)).toBe(expected));

  it("pick returns the same index for the same name and uses all of them", () => {
    expect(pick("ann", 8)).toBe(pick("ann", 8));
    expect(new Set(Array.from({ length: 200 }, (_, i) => pick(`user-${i}`, 8))).size).toBe(8);
  });

  it("today and yesterday are named", () => {
    const noon = new Date(2026, 2, 29, 12).getTime(); // a day with a change of the clock in Europe
    expect(day(noon, noon)).toBe("Today");
    expect(day(new Date(2026, 2, 29, 0, 1).getTime(), noon)).toBe("Today");
    expect(day(new Date(2026, 2, 28, 23, 59).getTime(), noon)).toBe("Yesterday");
    expect(day(new Date(2026, 2, 20).getTime(), noon)).toContain("20");
  });
});
