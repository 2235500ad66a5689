import { describe, expect, it } from "vitest";
import { bytesLeft, completions, MAX_BYTES, mentionsWithoutEffect } from "../../src/chat/text";

describe("bytes left", () => {
  it.each([
    ["", null],
    ["a".repeat(7_000), null],
    ["a".repeat(7_680), 512],
    ["a".repeat(MAX_BYTES), 0],
    ["a".repeat(MAX_BYTES + 1), -1],
    ["  " + "a".repeat(MAX_BYTES) + "\n", 0],
    ["é".repeat(4_096), 0],
    ["世".repeat(2_731), -1],
    ["🙂".repeat(2_048), 0],
  ])("of %#", (text, expected) => expect(bytesLeft(text)).toBe(expected));
});

describe("completions", () => {
  const names = ["assistant", "Ann", "annabel", "bob"];
  it.each([
    ["hello @an", "an", ["Ann", "annabel"]],
    ["@AN", "AN", ["Ann", "annabel"]],
    ["@", "", names],
    ["@bob", "bob", []],
    ["mail@an", "", []],
    ["@an there", "", []],
  ])("of %j", (text, partial, matches) => expect(completions(text, names)).toEqual({ partial, matches }));

  it("are six at most", () => {
    const many = Array.from({ length: 9 }, (_, i) => `n${i}`);
    expect(completions("@n", many).matches).toEqual(many.slice(0, 6));
  });
});

describe("the assistant is named without effect", () => {
  it.each([
    ["hi @assistant status", true],
    ["hi (@Assistant)", true],
    ["thanks, @assistant.", true],
    ["well,\n@assistant: help", true],
    ["(@assistant) help", true],
    ["@assistant status", false],
    ["  @Assistant, status for @assistant", false],
    ["@assistant", false],
    ["ask @assistants", false],
    ["ask @assistant-2", false],
    ["ask @assistant.two", false],
    ["mail me@assistant", false],
    ["status", false],
  ])("%j: %s", (text, expected) => expect(mentionsWithoutEffect(text, "assistant")).toBe(expected));
  it("does not apply without an assistant", () => expect(mentionsWithoutEffect("a @ b", "")).toBe(false));
});
