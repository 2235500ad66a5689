// Elements that contain other elements.
import { useEffect, useRef, useState } from "preact/hooks";
import { FormContext, useForm, useSession, type FormValues } from "../context";
import { Icon } from "../icons";
import { list, num, str, type Json } from "../json";
import { Children } from "../render";
import { labelsOf, type ElementProps } from "./element";

export function Container({ node }: ElementProps) {
  const props = node.props.value;
  const row = str(props["direction"]) === "row";
  const gap = num(props["gap"], -1);
  return (
    <div
      class={`container ${row ? "row" : ""} ${props["wrap"] === true ? "wrap" : ""}`}
      style={gap >= 0 ? { gap: `${gap}px` } : undefined}
    >
      <Children node={node} />
    </div>
  );
}

export function Plain({ node }: ElementProps) {
  return <Children node={node} />;
}

export function Columns({ node }: ElementProps) {
  const weights = list(node.props.value["weights"]).map((weight) => num(weight, 1));
  const count = node.children.value.length;
  const tracks = Array.from({ length: count }, (_, i) => `minmax(0, ${weights[i] ?? 1}fr)`).join(" ");
  return (
    <div class="columns" data-count={count} style={{ "--tracks": tracks }}>
      <Children node={node} />
    </div>
  );
}

export function ColumnElement({ node }: ElementProps) {
  return (
    <div class="column">
      <Children node={node} />
    </div>
  );
}

export function Card({ node }: ElementProps) {
  const props = node.props.value;
  const title = str(props["title"]);
  const hint = str(props["hint"]);
  return (
    <section class="card" aria-label={title || undefined}>
      {(title !== "" || hint !== "") && (
        <header>
          <h2>{title}</h2>
          {hint !== "" && <span class="muted">{hint}</span>}
        </header>
      )}
      <Children node={node} />
    </section>
  );
}

export function Tabs({ node }: ElementProps) {
  const session = useSession();
  const props = node.props.value;
  const labels = labelsOf(props["labels"]);
  const value = num(props["value"]);
  const children = node.children.value;
  const move = (event: KeyboardEvent): void => {
    const step = event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0;
    if (step === 0) return;
    event.preventDefault();
    const next = (value + step + labels.length) % labels.length;
    session.event(node.key, next);
    (event.currentTarget as HTMLElement).querySelectorAll<HTMLElement>("[role=tab]")[next]?.focus();
  };
  // The server may send only the active tab.
  const active = children.length === labels.length ? children[value] : children[0];
  return (
    <div class="tabs">
      <div role="tablist" class="tablist" onKeyDown={move}>
        {labels.map((label, i) => (
          <button
            key={label}
            type="button"
            role="tab"
            aria-selected={i === value}
            tabIndex={i === value ? 0 : -1}
            onClick={() => session.event(node.key, i)}
          >
            {label}
          </button>
        ))}
      </div>
      <div role="tabpanel" class="stack">
        {active && <Children node={active} />}
      </div>
    </div>
  );
}

export function Expander({ node }: ElementProps) {
  const props = node.props.value;
  const [open, setOpen] = useState(props["open"] === true);
  return (
    <details class="expander" open={open} onToggle={(event) => setOpen(event.currentTarget.open)}>
      <summary>{str(props["label"])}</summary>
      {open && (
        <div class="stack">
          <Children node={node} />
        </div>
      )}
    </details>
  );
}

export function Form({ node }: ElementProps) {
  const session = useSession();
  const outer = useForm();
  const values = useRef(new Map<string, Json>());
  const label = str(node.props.value["submit"], "Save");

  const form: FormValues = {
    set: (key, value) => void values.current.set(key, value),
    submit: () => {
      session.submit(
        node.key || String(node.id),
        [...values.current].map(([key, value]) => ({ key, value })),
      );
      values.current.clear();
    },
  };

  // A form inside another one joins it, since HTML allows no nested forms.
  if (outer) return <Children node={node} />;
  return (
    <FormContext.Provider value={form}>
      <form
        class="form stack"
        onSubmit={(event) => {
          event.preventDefault();
          form.submit();
        }}
      >
        <Children node={node} />
        <div>
          <button type="submit" class="primary">
            {label}
          </button>
        </div>
      </form>
    </FormContext.Provider>
  );
}

export function Dialog({ node }: ElementProps) {
  const session = useSession();
  const props = node.props.value;
  const open = props["open"] === true;
  const element = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    const dialog = element.current;
    if (open && dialog && !dialog.open) dialog.showModal();
    if (!open && dialog?.open) dialog.close();
  }, [open]);
  const close = (): void => session.event(node.key, false);
  return (
    <dialog
      ref={element}
      class="dialog"
      aria-label={str(props["title"])}
      onCancel={(event) => {
        event.preventDefault();
        close();
      }}
    >
      {open && (
        <>
          <header>
            <h2>{str(props["title"])}</h2>
            <button type="button" class="ghost icon-button" aria-label="Close" onClick={close}>
              <Icon name="close" />
            </button>
          </header>
          <div class="stack">
            <Children node={node} />
          </div>
        </>
      )}
    </dialog>
  );
}
