import { effect } from "@preact/signals";
import { describe, expect, it } from "vitest";
import { delta as codec, type Delta, type Node, type Prop } from "../../src/codec/app";
import type { Partially } from "../../src/codec/proto";
import { OutOfStep, Store, walk, type TreeNode } from "../../src/store";

// Goes through the codec, which fills in the fields that the wire omits.
const delta = (from: Partially<Delta>): Delta => codec.decode(codec.encode(from));
const text = (value: string): Partially<Prop> => ({ name: "text", text: value });
const node = (id: number, kind: string, ...children: Partially<Node>[]): Partially<Node> => ({
  id,
  kind,
  props: [text(`${kind} ${id}`)],
  children,
});

/** The tree as one line: kinds and ids, with children in brackets. */
const shape = (of: TreeNode): string => {
  const children = of.children.value.map(shape);
  return `${of.kind}${of.id}${children.length > 0 ? `[${children.join(" ")}]` : ""}`;
};

function start(): Store {
  const store = new Store();
  store.apply([
    delta({ reset: { title: "Home", children: [node(1, "main", node(2, "text"), node(3, "card", node(4, "text")))] } }),
  ]);
  return store;
}

describe("deltas", () => {
  const check = (what: Partially<Delta>, expected: string): void => {
    const store = start();
    store.apply([delta(what)]);
    expect(shape(store.root)).toBe(expected);
  };

  it("reset replaces the whole tree and the title", () => {
    const store = new Store();
    expect(store.ready.value).toBe(false);
    store.apply([delta({ reset: { title: "Home", children: [node(1, "main", node(2, "text"))] } })]);
    expect([shape(store.root), store.title.value, store.ready.value]).toEqual(["root0[main1[text2]]", "Home", true]);
    store.apply([delta({ reset: {} })]);
    expect([shape(store.root), store.title.value, store.get(2)]).toEqual(["root0", "", undefined]);
  });

  it("insert puts a subtree at its index", () => {
    check({ insert: { parent: 1, node: node(9, "hr") } }, "root0[main1[hr9 text2 card3[text4]]]");
    check(
      { insert: { parent: 1, index: 1, node: node(9, "card", node(10, "text")) } },
      "root0[main1[text2 card9[text10] card3[text4]]]",
    );
    check({ insert: { parent: 1, index: 99, node: node(9, "hr") } }, "root0[main1[text2 card3[text4] hr9]]");
    check({ insert: { node: node(9, "sidebar") } }, "root0[sidebar9 main1[text2 card3[text4]]]");
  });

  it("remove deletes the subtree and frees its ids", () => {
    check({ remove: { id: 3 } }, "root0[main1[text2]]");
    const store = start();
    store.apply([delta({ remove: { id: 3 } }), delta({ insert: { parent: 1, index: 0, node: node(4, "hr") } })]);
    expect(shape(store.root)).toBe("root0[main1[hr4 text2]]");
  });

  it("move keeps the node and its children", () => {
    check({ move: { id: 3, parent: 1, index: 0 } }, "root0[main1[card3[text4] text2]]");
    check({ move: { id: 2, parent: 1, index: 1 } }, "root0[main1[card3[text4] text2]]"); // the index does not count the moved node
    check({ move: { id: 4, parent: 0, index: 1 } }, "root0[main1[text2 card3] text4]");
    const store = start();
    const held = store.get(4);
    store.apply([delta({ move: { id: 4, parent: 1, index: 0 } }), delta({ update: { id: 4, set: [text("moved")] } })]);
    expect(store.get(4)).toBe(held);
    expect(held?.props.value).toEqual({ text: "moved" });
    store.apply([delta({ remove: { id: 4 } })]);
    expect(shape(store.root)).toBe("root0[main1[text2 card3]]");
  });

  it("update sets and unsets props of every kind and leaves the others", () => {
    const store = start();
    store.apply([
      delta({
        update: {
          id: 2,
          set: [
            { name: "n", number: 0 },
            { name: "f", flag: false },
            { name: "j", json: '{"a":[1]}' },
            { name: "bad", json: "{" },
            { name: "none" },
          ],
        },
      }),
    ]);
    expect(store.get(2)?.props.value).toEqual({ text: "text 2", n: 0, f: false, j: { a: [1] }, bad: null, none: null });
    store.apply([delta({ update: { id: 2, unset: ["text", "n", "never"], set: [{ name: "f", flag: true }] } })]);
    expect(store.get(2)?.props.value).toEqual({ f: true, j: { a: [1] }, bad: null, none: null });
  });

  it("append text extends a prop or creates it", () => {
    const store = start();
    store.apply([
      delta({ appendText: { id: 2, prop: "text", text: " more" } }),
      delta({ appendText: { id: 2, prop: "tail", text: "new" } }),
    ]);
    expect(store.get(2)?.props.value).toEqual({ text: "text 2 more", tail: "new" });
  });

  it("ignores an operation of a newer server", () => {
    check({}, "root0[main1[text2 card3[text4]]]");
  });
});

describe("out of step", () => {
  const cases: [string, Partially<Delta>][] = [
    ["insert under an unknown parent", { insert: { parent: 77, node: node(9, "text") } }],
    ["insert of an id that is there", { insert: { parent: 1, node: node(2, "text") } }],
    ["insert without a node", { insert: { parent: 1 } }],
    ["update of an unknown node", { update: { id: 77 } }],
    ["remove of an unknown node", { remove: { id: 77 } }],
    ["remove of the root", { remove: { id: 0 } }],
    ["move of an unknown node", { move: { id: 77, parent: 1 } }],
    ["move under an unknown parent", { move: { id: 2, parent: 77 } }],
    ["move into itself", { move: { id: 3, parent: 3 } }],
    ["move under its own child", { move: { id: 3, parent: 4 } }],
    ["append to an unknown node", { appendText: { id: 77, prop: "text", text: "x" } }],
  ];
  it.each(cases)("%s", (_name, what) => {
    const store = start();
    expect(() => store.apply([delta(what)])).toThrow(OutOfStep);
    store.apply([delta({ reset: { children: [node(1, "main")] } })]);
    expect(shape(store.root)).toBe("root0[main1]");
  });
});

it("the title follows the page element", () => {
  const store = new Store();
  store.apply([
    delta({
      reset: { title: "Home", children: [{ id: 1, kind: "page", props: [{ name: "title", text: "#general" }] }] },
    }),
  ]);
  expect(store.title.value).toBe("#general");
  store.apply([delta({ update: { id: 1, set: [{ name: "title", text: "Console" }] } })]);
  expect(store.title.value).toBe("Console");
  store.apply([delta({ update: { id: 1, unset: ["title"] } })]);
  expect(store.title.value).toBe("Home");
});

it("a change notifies only its own node, and a batch notifies once", () => {
  const store = start();
  const runs = { changed: 0, other: 0 };
  effect(() => {
    if (store.get(2)?.props.value) runs.changed++;
  });
  effect(() => {
    if (store.get(4)?.props.value) runs.other++;
  });
  store.apply([1, 2, 3].map((n) => delta({ update: { id: 2, set: [text(String(n))] } })));
  expect(runs).toEqual({ changed: 2, other: 1 });
  expect([...walk(store.root)].map(({ id }) => id)).toEqual([0, 1, 2, 3, 4]);
});
