import { describe, expect, it } from "vitest";
import { bytesLeft, MAX_BYTES, mentionsWithoutEffect } from "../../src/chat/text";

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
