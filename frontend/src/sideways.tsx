// Makes a wide table scroll sideways. An edge fades while there is more to see beyond it.
import type { ComponentChildren } from "preact";
import { useLayoutEffect, useRef } from "preact/hooks";

export function Sideways({
  label = "Table",
  testid,
  also = "",
  children,
}: {
  label?: string;
  testid?: string | undefined;
  also?: string;
  children: ComponentChildren;
}) {
  const box = useRef<HTMLDivElement>(null);
  const measure = (): void => {
    const el = box.current;
    if (!el) return;
    el.classList.toggle("more-left", el.scrollLeft > 1);
    el.classList.toggle("more-right", el.scrollLeft + el.clientWidth < el.scrollWidth - 1);
  };
  useLayoutEffect(() => {
    const el = box.current;
    if (!el) return;
    // The observer also reports the initial size, which takes the first measurement.
    const observer = new ResizeObserver(measure);
    observer.observe(el);
    if (el.firstElementChild) observer.observe(el.firstElementChild);
    return () => observer.disconnect();
  }, []);
  return (
    <div
      class={`table-scroll ${also}`}
      ref={box}
      onScroll={measure}
      data-testid={testid}
      tabIndex={0}
      role="group"
      aria-label={label}
    >
      {children}
    </div>
  );
}
