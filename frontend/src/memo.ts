import { Component, createElement, type ComponentType, type ComponentChild } from "preact";

/** Skips rendering while all props are identical. It stands in for the `memo` of preact/compat, which is larger. */
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
