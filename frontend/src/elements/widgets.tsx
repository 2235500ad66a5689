// Input elements. Each sends its value under its key, or hands it to the form around it.
import { useEffect, useId, useRef, useState } from "preact/hooks";
import type { ComponentChildren } from "preact";
import { useForm, useSession } from "../context";
import { num, records, str, type Json } from "../json";
import type { TreeNode } from "../store";
import { labelsOf, type ElementProps } from "./element";

/**
 * The value of a widget: the user's while editing, until the server sends a new one. Returns the value, a setter for
 * drafts, and one that also sends the value to the server or the form.
 */
function useWidget<T extends Json>(
  node: TreeNode,
  read: (value: Json | undefined) => T,
): [T, (value: T) => void, (value: T) => void] {
  const session = useSession();
  const form = useForm();
  const said = read(node.props.value["value"]);
  const [value, setValue] = useState(said);
  const sent = useRef(said);
  useEffect(() => {
    setValue(said);
    sent.current = said;
  }, [said]);

  const commit = (next: T): void => {
    setValue(next);
    if (form) form.set(node.key, next);
    else if (next !== sent.current) {
      sent.current = next;
      session.event(node.key, next);
    }
  };

  // A draft only goes to the form, so that submitting with Enter includes the text being typed.
  const draft = (next: T): void => {
    setValue(next);
    form?.set(node.key, next);
  };
  return [value, draft, commit];
}

export function Button({ node }: ElementProps) {
  const session = useSession();
  const props = node.props.value;
  const kind = str(props["tone"], "plain");
  return (
    <button
      type="button"
      class={`button ${kind}`}
      disabled={props["disabled"] === true}
      onClick={() => session.event(node.key, null)}
    >
      {str(props["label"])}
    </button>
  );
}

function Field({ label, id, children }: { label: string; id: string; children: ComponentChildren }) {
  return (
    <div class="field">
      {label !== "" && (
        <label class="field-label" for={id}>
          {label}
        </label>
      )}
      {children}
    </div>
  );
}

export function TextInput({ node }: ElementProps) {
  const id = useId();
  const form = useForm();
  const props = node.props.value;
  const [value, draft, commit] = useWidget(node, (v) => str(v));
  return (
    <Field label={str(props["label"])} id={id}>
      <input
        id={id}
        type="text"
        value={value}
        placeholder={str(props["placeholder"])}
        aria-label={str(props["label"]) || str(props["placeholder"])}
        onInput={(event) => draft(event.currentTarget.value)}
        onBlur={() => commit(value)}
        onKeyDown={(event) => {
          if (event.key === "Enter" && !form) commit(event.currentTarget.value);
        }}
      />
    </Field>
  );
}

export function TextArea({ node }: ElementProps) {
  const id = useId();
  const props = node.props.value;
  const [value, draft, commit] = useWidget(node, (v) => str(v));
  return (
    <Field label={str(props["label"])} id={id}>
      <textarea
        id={id}
        value={value}
        rows={num(props["rows"], 4)}
        placeholder={str(props["placeholder"])}
        onInput={(event) => draft(event.currentTarget.value)}
        onBlur={() => commit(value)}
      />
    </Field>
  );
}

export function NumberInput({ node }: ElementProps) {
  const id = useId();
  const props = node.props.value;
  const [value, , commit] = useWidget(node, (v) => num(v));
  const bound = (name: string): number | undefined => (typeof props[name] === "number" ? num(props[name]) : undefined);
  return (
    <Field label={str(props["label"])} id={id}>
      <input
        id={id}
        type="number"
        class="tabular"
        value={value}
        min={bound("min")}
        max={bound("max")}
        step={bound("step") ?? "any"}
        onChange={(event) => {
          if (!Number.isNaN(event.currentTarget.valueAsNumber)) commit(event.currentTarget.valueAsNumber);
        }}
      />
    </Field>
  );
}

export function Checkbox({ node }: ElementProps) {
  const [value, , commit] = useWidget(node, (v) => v === true);
  return (
    <label class="check">
      <input type="checkbox" checked={value} onChange={(event) => commit(event.currentTarget.checked)} />
      <span>{str(node.props.value["label"])}</span>
    </label>
  );
}

export function Toggle({ node }: ElementProps) {
  const [value, , commit] = useWidget(node, (v) => v === true);
  return (
    <label class="check toggle">
      <input type="checkbox" role="switch" checked={value} onChange={(event) => commit(event.currentTarget.checked)} />
      <span>{str(node.props.value["label"])}</span>
    </label>
  );
}

export function Radio({ node }: ElementProps) {
  const name = useId();
  const props = node.props.value;
  const [value, , commit] = useWidget(node, (v) => str(v));
  return (
    <fieldset class="field">
      <legend class="field-label">{str(props["label"])}</legend>
      {labelsOf(props["options"]).map((option) => (
        <label class="check" key={option}>
          <input type="radio" name={name} checked={option === value} onChange={() => commit(option)} />
          <span>{option}</span>
        </label>
      ))}
    </fieldset>
  );
}

export function SelectBox({ node }: ElementProps) {
  const id = useId();
  const props = node.props.value;
  const [value, , commit] = useWidget(node, (v) => str(v));
  return (
    <Field label={str(props["label"])} id={id}>
      <select id={id} value={value} onChange={(event) => commit(event.currentTarget.value)}>
        {records(props["options"]).map((option) => (
          <option key={str(option["value"])} value={str(option["value"])}>
            {str(option["label"])}
          </option>
        ))}
      </select>
    </Field>
  );
}

export function Slider({ node }: ElementProps) {
  const id = useId();
  const props = node.props.value;
  const [value, draft, commit] = useWidget(node, (v) => num(v));
  return (
    <Field label={str(props["label"])} id={id}>
      <div class="slider">
        <input
          id={id}
          type="range"
          value={value}
          min={num(props["min"], 0)}
          max={num(props["max"], 100)}
          step={num(props["step"]) || "any"}
          onInput={(event) => draft(event.currentTarget.valueAsNumber)}
          onChange={(event) => commit(event.currentTarget.valueAsNumber)}
        />
        <output class="tabular" for={id}>
          {Number(value.toFixed(4))}
        </output>
      </div>
    </Field>
  );
}
