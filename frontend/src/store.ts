// The tree a page shows, kept by deltas: each node's props and children are signals, so a change renders one place.
import { batch, computed, signal, type Signal } from "@preact/signals";
import type { Delta, Node, Prop } from "./codec/app";
import { parse, str, type Json } from "./json";

export type Props = Record<string, Json>;

export interface TreeNode {
  readonly id: number;
  readonly kind: string;
  readonly key: string;
  readonly props: Signal<Props>;
  readonly children: Signal<TreeNode[]>;
}

/** The page and the server no longer agree: ask for the whole tree. */
export class OutOfStep extends Error {}

export class Store {
  readonly root: TreeNode = blank(0, "root", "");
  private readonly givenTitle = signal("");
  /** Of the page element, which moves on with it; else what the whole tree came with. */
  readonly title = computed(() => {
    const page = this.root.children.value.find((node) => node.kind === "page");
    return str(page?.props.value["title"]) || this.givenTitle.value;
  });
  /** True once the first whole tree is here. */
  readonly ready = signal(false);
  private readonly nodes = new Map<number, TreeNode>([[0, this.root]]);
  private readonly parents = new Map<number, TreeNode>();

  apply(deltas: Delta[]): void {
    batch(() => {
      for (const delta of deltas) this.applyOne(delta);
    });
  }

  get(id: number): TreeNode | undefined {
    return this.nodes.get(id);
  }

  private applyOne(delta: Delta): void {
    if (delta.reset) {
      this.nodes.clear();
      this.parents.clear();
      this.nodes.set(0, this.root);
      this.root.children.value = delta.reset.children.map((child) => this.adopt(child, this.root));
      this.givenTitle.value = delta.reset.title;
      this.ready.value = true;
    } else if (delta.insert) {
      const { parent, index, node } = delta.insert;
      if (!node) throw new OutOfStep("insert without a node");
      if (this.nodes.has(node.id)) throw new OutOfStep(`node ${node.id} is already there`);
      const into = this.find(parent);
      this.place(this.adopt(node, into), into, index);
    } else if (delta.update) {
      const { id, set, unset } = delta.update;
      const node = this.find(id);
      const props = { ...node.props.peek() };
      for (const name of unset) delete props[name];
      for (const prop of set) props[prop.name] = value(prop);
      node.props.value = props;
    } else if (delta.remove) {
      const node = this.find(delta.remove.id);
      this.take(node);
      this.forget(node);
    } else if (delta.move) {
      const { id, parent, index } = delta.move;
      const node = this.find(id);
      const into = this.find(parent);
      for (let up: TreeNode | undefined = into; up; up = this.parents.get(up.id)) {
        if (up === node) throw new OutOfStep(`node ${id} cannot move into itself`);
      }
      this.take(node);
      this.parents.set(id, into);
      this.place(node, into, index);
    } else if (delta.appendText) {
      const { id, prop, text } = delta.appendText;
      const node = this.find(id);
      const props = node.props.peek();
      const before = props[prop];
      node.props.value = { ...props, [prop]: (typeof before === "string" ? before : "") + text };
    }
  }

  private find(id: number): TreeNode {
    const node = this.nodes.get(id);
    if (!node) throw new OutOfStep(`node ${id} is unknown`);
    return node;
  }

  private adopt(from: Node, parent: TreeNode): TreeNode {
    const node = blank(from.id, from.kind, from.key);
    node.props.value = Object.fromEntries(from.props.map((prop) => [prop.name, value(prop)]));
    this.nodes.set(node.id, node);
    this.parents.set(node.id, parent);
    node.children.value = from.children.map((child) => this.adopt(child, node));
    return node;
  }

  private place(node: TreeNode, parent: TreeNode, index: number): void {
    const children = [...parent.children.peek()];
    children.splice(Math.min(index, children.length), 0, node);
    parent.children.value = children;
  }

  private take(node: TreeNode): void {
    const parent = this.parents.get(node.id);
    if (!parent) throw new OutOfStep(`node ${node.id} has no parent`);
    parent.children.value = parent.children.peek().filter((child) => child !== node);
  }

  private forget(node: TreeNode): void {
    for (const child of node.children.peek()) this.forget(child);
    this.nodes.delete(node.id);
    this.parents.delete(node.id);
  }
}

/** Every node under (and with) this one, depth first. */
export function* walk(node: TreeNode): Generator<TreeNode> {
  yield node;
  for (const child of node.children.value) yield* walk(child);
}

function blank(id: number, kind: string, key: string): TreeNode {
  return { id, kind, key, props: signal({}), children: signal([]) };
}

function value(prop: Prop): Json {
  if (prop.text !== undefined) return prop.text;
  if (prop.number !== undefined) return prop.number;
  if (prop.flag !== undefined) return prop.flag;
  if (prop.json !== undefined) return parse(prop.json);
  return null;
}
