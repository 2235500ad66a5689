import { Component, createElement, type ComponentType, type ComponentChild } from "preact";

/** Renders again only when a prop is another value; saves carrying preact/compat. */
export function memo<P extends object>(of: ComponentType<P>): ComponentType<P> {
  return class extends Component<P> {
    override shouldComponentUpdate(next: Readonly<P>): boolean {
      const names = Object.keys(next) as (keyof P)[];
      return names.some((name) => next[name] !== (this.props as P)[name]);
    }
    override render(): ComponentChild {
      return createElement(of, this.props as P);
    }
  };
}
