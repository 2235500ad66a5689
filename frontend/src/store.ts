// The element tree of a page, updated by deltas. Props and children of each node are signals, so that a change renders
// only the nodes it touches.
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

/** A delta does not fit the tree, so the page must ask for the whole one. */
export class OutOfStep extends Error {}

export class Store {
  readonly root: TreeNode = blank(0, "root", "");
  private readonly givenTitle = signal("");
  /** The title of the page element, else the one that came with the whole tree. */
  readonly title = computed(() => {
    const page = this.root.children.value.find((node) => node.kind === "page");
    return str(page?.props.value["title"]) || this.givenTitle.value;
  });
  /** Whether the first whole tree has arrived. */
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
      if (!node) throw new OutOfStep("an insert has no node");
      if (this.nodes.has(node.id)) throw new OutOfStep(`node ${node.id} already exists`);
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

/** This node and all nodes below it, depth first. */
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
