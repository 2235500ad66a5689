import { describe, expect, it } from "vitest";
import type { Json } from "../../src/json";
import {
  emptyChat,
  readHistory,
  readMessage,
  reduce,
  type Action,
  type ChatState,
  type Message,
} from "../../src/chat/reducer";

const message = (id: number, more: Partial<Message> = {}): Message => ({
  id,
  nonce: "",
  user: "ann",
  name: "Ann",
  text: `m${id}`,
  at: id * 1_000,
  state: "done",
  replyTo: 0,
  asker: "",
  error: "",
  attempt: 0,
  seq: null,
  ...more,
});
const streaming = (id: number, more: Partial<Message> = {}): Message =>
  message(id, { user: "bot", text: "", state: "streaming", seq: 0, ...more });
const said = (...messages: Message[]): Action[] => messages.map((one) => ({ type: "message", message: one }));
/** `asked`: after how many changes by the channel it was asked for; by default after all of them. */
const history = (messages: Message[], more = false, older = false, asked = Infinity): Action => ({
  type: "history",
  messages,
  more,
  older,
  asked,
});
const delta = (id: number, seq: number, text: string, attempt = 1): Action => ({
  type: "delta",
  id,
  seq,
  attempt,
  text,
});
const sent = (nonce: string, text = nonce): Action => ({
  type: "send",
  message: message(0, { nonce, text, state: "sending" }),
});

const run = (...actions: Action[]): ChatState => actions.reduce(reduce, emptyChat);
/** Each message as `id:text`, with `+` before unsent, `!` after failed and `…` after streaming ones. */
const shown = ({ messages }: ChatState): string[] =>
  messages.map(
    (m) =>
      `${m.id === 0 ? "+" : `${m.id}:`}${m.text}${m.state === "failed" ? "!" : m.state === "streaming" ? "…" : ""}`,
  );

describe("order", () => {
  it("is by id, regardless of arrival, with each message once", () => {
    expect(shown(run(...said(message(2), message(5), message(3), message(1), message(3))))).toEqual([
      "1:m1",
      "2:m2",
      "3:m3",
      "5:m5",
    ]);
  });

  it("a repeated message replaces the earlier one", () => {
    expect(shown(run(...said(message(1), message(2), message(1, { text: "edited" }))))).toEqual(["1:edited", "2:m2"]);
  });

  it("unsent messages stay last", () => {
    expect(shown(run(sent("a"), ...said(message(1)), sent("b"), ...said(message(2))))).toEqual([
      "1:m1",
      "2:m2",
      "+a",
      "+b",
    ]);
  });
});

describe("sending", () => {
  it("the echo replaces the unsent message, whether the event or the reply comes first", () => {
    const echo = message(7, { nonce: "a", text: "a" });
    const state = run(sent("a"), sent("b"), ...said(echo, echo));
    expect(shown(state)).toEqual(["7:a", "+b"]);
  });

  it("the same text sent from another window is a separate message", () => {
    expect(shown(run(sent("a"), ...said(message(7, { nonce: "other", text: "a" }))))).toEqual(["7:a", "+a"]);
  });

  it("a failed message can be sent again", () => {
    const failed = run(sent("a"), { type: "outgoing", nonce: "a", state: "failed", error: "no answer in time" });
    expect(failed.messages[0]).toMatchObject({ state: "failed", error: "no answer in time" });
    const again = reduce(failed, sent("a"));
    expect(again.messages).toMatchObject([{ state: "sending", error: "" }]);
    expect(shown(reduce(again, { type: "message", message: message(3, { nonce: "a", text: "a" }) }))).toEqual(["3:a"]);
  });

  it("a failure after the echo changes nothing", () => {
    expect(
      shown(
        run(sent("a"), ...said(message(3, { nonce: "a" })), {
          type: "outgoing",
          nonce: "a",
          state: "failed",
          error: "late",
        }),
      ),
    ).toEqual(["3:m3"]);
  });

  it("discard removes only unsent messages", () => {
    expect(
      shown(
        run(
          ...said(message(1, { nonce: "a" })),
          sent("b"),
          { type: "discard", nonce: "a" },
          { type: "discard", nonce: "b" },
        ),
      ),
    ).toEqual(["1:m1"]);
  });
});

describe("deltas of an answer", () => {
  const start = [history([]), ...said(streaming(4))];

  it("append in order", () => {
    const state = run(...start, delta(4, 1, "Hel"), delta(4, 2, "lo"));
    expect([shown(state), state.gap]).toEqual([["4:Hello…"], false]);
  });

  it("are applied once", () => {
    expect(shown(run(...start, delta(4, 1, "a"), delta(4, 2, "b"), delta(4, 1, "a"), delta(4, 2, "b")))).toEqual([
      "4:ab…",
    ]);
  });

  it("with one missing are a gap, which a reload closes", () => {
    const gap = run(...start, delta(4, 1, "a"), delta(4, 3, "c"));
    expect([shown(gap), gap.gap]).toEqual([["4:a…"], true]);
    const healed = reduce(gap, history([streaming(4, { text: "abc", seq: 3, attempt: 1 })]));
    const more = reduce(reduce(healed, delta(4, 3, "c")), delta(4, 4, "d"));
    expect([shown(more), more.gap]).toEqual([["4:abcd…"], false]);
  });

  it("of an unknown message are a gap once the room is loaded", () => {
    expect(run(history([]), delta(9, 1, "a")).gap).toBe(true);
    expect(run(delta(9, 1, "a")).gap).toBe(false);
  });

  it("of a new attempt start the text over, and those of the old attempt are ignored", () => {
    expect(
      shown(run(...start, delta(4, 1, "first"), delta(4, 1, "sec", 2), delta(4, 2, "late", 1), delta(4, 2, "ond", 2))),
    ).toEqual(["4:second…"]);
    expect(run(...start, delta(4, 1, "first"), delta(4, 2, "x", 2)).gap).toBe(true);
  });

  it("after the end are ignored", () => {
    for (const state of ["done", "failed", "stopped"] as const) {
      expect(
        run(...start, delta(4, 1, "a"), ...said(message(4, { text: "whole", state, attempt: 1 })), delta(4, 2, "b"))
          .messages,
      ).toMatchObject([{ text: "whole", state }]);
    }
  });

  it("of a retried answer stream again", () => {
    const state = run(
      ...start,
      delta(4, 1, "a"),
      ...said(message(4, { text: "a", state: "failed", error: "worker gone" }), streaming(4)),
      delta(4, 1, "b", 2),
    );
    expect(state.messages).toMatchObject([{ text: "b", state: "streaming", error: "" }]);
  });

  it("continue after a history without a sequence number", () => {
    expect(shown(run(history([streaming(4, { text: "ab", seq: null })]), delta(4, 3, "c"), delta(4, 4, "d")))).toEqual([
      "4:abcd…",
    ]);
  });

  it("keep their sequence number when the message is repeated", () => {
    expect(
      shown(
        run(
          ...start,
          delta(4, 1, "a"),
          ...said(streaming(4, { text: "a", seq: null })),
          delta(4, 1, "a"),
          delta(4, 2, "b"),
        ),
      ),
    ).toEqual(["4:ab…"]);
  });
});

describe("history", () => {
  it("fills an empty room", () => {
    const state = run(history([message(8), message(9)], true));
    expect([shown(state), state.more, state.loaded]).toEqual([["8:m8", "9:m9"], true, true]);
  });

  it("keeps messages that arrived during the request, and unsent ones", () => {
    expect(shown(run(sent("a"), ...said(message(3)), history([message(1), message(2)])))).toEqual([
      "1:m1",
      "2:m2",
      "3:m3",
      "+a",
    ]);
  });

  it("replaces an unsent message with its echo", () => {
    expect(shown(run(sent("a"), history([message(1), message(2, { nonce: "a", text: "a" })])))).toEqual([
      "1:m1",
      "2:a",
    ]);
  });

  it("puts older messages first, without duplicates", () => {
    const state = run(
      history([message(5), message(6)], true),
      history([message(3), message(4), message(5)], false, true),
    );
    expect([shown(state), state.more]).toEqual([["3:m3", "4:m4", "5:m5", "6:m6"], false]);
  });

  it("keeps older messages if a reload overlaps with the known ones", () => {
    const state = run(history([message(1), message(2), message(3)], true), history([message(3), message(4)], true));
    expect([shown(state), state.more]).toEqual([["1:m1", "2:m2", "3:m3", "4:m4"], true]);
  });

  it("drops older messages if a reload leaves a gap, and can load them again", () => {
    const state = run(history([message(1), message(2)], false), history([message(60), message(61)], true));
    expect([shown(state), state.more]).toEqual([["60:m60", "61:m61"], true]);
  });

  it("removes messages that are gone from the server", () => {
    expect(shown(run(history([message(1), message(2), message(3)]), history([message(1), message(3)])))).toEqual([
      "1:m1",
      "3:m3",
    ]);
  });

  describe("that comes late", () => {
    const half = streaming(4, { text: "ab", seq: 2, attempt: 1 });
    const asked = [history([half])]; // the next history is asked for here
    const late = (fresh: Message): Action => history([fresh], false, false, 0);
    const ended = (state: Message["state"], text: string): Message =>
      message(4, { user: "bot", text, state, attempt: 1 });
    const rows: [string, Action[], Message, string[]][] = [
      ["does not undo the end of an answer", said(ended("done", "abcd")), half, ["4:abcd"]],
      ["does not undo a failure", said(ended("failed", "ab")), half, ["4:ab!"]],
      ["does not undo a stop", said(ended("stopped", "ab")), half, ["4:ab"]],
      ["does not take pieces away", [delta(4, 3, "c"), delta(4, 4, "d")], half, ["4:abcd…"]],
      [
        "brings pieces that are further on",
        [delta(4, 3, "c")],
        streaming(4, { text: "abcd", seq: 4, attempt: 1 }),
        ["4:abcd…"],
      ],
      ["brings a later attempt", [delta(4, 3, "c")], streaming(4, { text: "A", seq: 1, attempt: 2 }), ["4:A…"]],
      ["brings the end", [delta(4, 3, "c")], ended("done", "whole"), ["4:whole"]],
      [
        "brings a retry that the channel did not tell",
        [],
        streaming(4, { text: "again", seq: 1, attempt: 1 }),
        ["4:again…"],
      ],
      ["keeps what is new", said(message(5)), half, ["4:ab…", "5:m5"]],
    ];
    it.each(rows)("%s", (_name, meanwhile, fresh, expected) => {
      expect(shown(run(...asked, ...meanwhile, late(fresh)))).toEqual(expected);
    });

    it("a retry after it streams, and the next history counts again", () => {
      const state = run(...asked, ...said(ended("failed", "ab")), late(half), ...said(streaming(4)), delta(4, 1, "x"));
      expect(shown(state)).toEqual(["4:x…"]);
      expect(shown(reduce(state, history([ended("done", "xyz")])))).toEqual(["4:xyz"]);
    });
  });

  it("empties a room that was emptied on the server", () => {
    expect(shown(run(history([]), history([])))).toEqual([]);
  });
});

describe("reading", () => {
  it("accepts the messages of the server", () => {
    expect(
      readMessage({
        id: 3,
        room: "r",
        user: "u1",
        name: "Ann",
        text: "hi",
        at: 5,
        nonce: "n",
        state: "done",
        reply_to: 2,
        asker: "bob",
      }),
    ).toEqual(message(3, { user: "u1", text: "hi", at: 5, nonce: "n", replyTo: 2, asker: "bob" }));
    expect(readMessage({ id: 3, user: "bot", text: "", state: "streaming" })).toMatchObject({ seq: 0, name: "bot" });
    expect(readMessage({ id: 3, user: "bot", text: "ab", state: "streaming" })).toMatchObject({ seq: null });
    expect(readMessage({ id: 3, user: "bot", text: "ab", state: "streaming", seq: 2, attempt: 1 })).toMatchObject({
      seq: 2,
      attempt: 1,
    });
  });

  it("rejects anything else", () => {
    const none: (Json | undefined)[] = [undefined, null, 1, "x", [], {}, { id: 0 }, { id: "7" }, { id: -1 }];
    for (const bad of none) expect(readMessage(bad)).toBeNull();
    expect(readMessage({ id: 1, state: "dancing", text: 5, user: null, at: "now" })).toMatchObject({
      state: "done",
      text: "5",
      user: "",
      at: 0,
    });
    const empty: Json[] = [null, [], { messages: {} }, { messages: [null, 1, { id: 0 }] }];
    for (const bad of empty) expect(readHistory(bad)).toEqual({ messages: [], more: false });
  });
});
