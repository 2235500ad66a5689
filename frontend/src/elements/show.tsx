// Elements that only display: text, tables, numbers and states.
import type { ComponentChildren } from "preact";
import { useSession } from "../context";
import { internalHref, safeHref } from "../href";
import { Icon, type IconName } from "../icons";
import { num, str } from "../json";
import { CodeBlock, Markdown } from "../markdown";
import { tone, type ElementProps } from "./element";

export function Heading({ node }: ElementProps) {
  const props = node.props.value;
  const level = Math.max(1, Math.min(4, num(props["level"], 2)));
  const Tag = `h${level}` as "h1" | "h2" | "h3" | "h4";
  return <Tag class="heading">{str(props["text"])}</Tag>;
}

export function Text({ node }: ElementProps) {
  const props = node.props.value;
  return <p class={`text ${str(props["tone"]) === "muted" ? "muted" : ""}`}>{str(props["text"])}</p>;
}

export function MarkdownElement({ node }: ElementProps) {
  return <Markdown text={str(node.props.value["text"])} />;
}

export function Code({ node }: ElementProps) {
  const props = node.props.value;
  return <CodeBlock text={str(props["text"])} lang={str(props["lang"])} />;
}

export function JsonView({ node }: ElementProps) {
  return <CodeBlock text={JSON.stringify(node.props.value["value"] ?? null, null, 2)} lang="json" />;
}

export function Badge({ node }: ElementProps) {
  const props = node.props.value;
  return <span class={`badge ${tone(str(props["tone"]))}`}>{str(props["text"])}</span>;
}

export function Alert({ node }: ElementProps) {
  const props = node.props.value;
  const kind = tone(str(props["tone"]), "info");
  return (
    <div class={`alert ${kind}`} role={kind === "bad" ? "alert" : "status"}>
      <div>
        {props["title"] !== undefined && <strong>{str(props["title"])}</strong>}
        <span>{str(props["text"])}</span>
      </div>
    </div>
  );
}

export function Empty({ node }: ElementProps) {
  const props = node.props.value;
  return (
    <div class="empty">
      <strong>{str(props["title"])}</strong>
      <p>{str(props["hint"])}</p>
    </div>
  );
}

export function Divider() {
  return <hr />;
}

export function Progress({ node }: ElementProps) {
  const props = node.props.value;
  const value = Math.max(0, Math.min(1, num(props["value"])));
  return (
    <label class="field">
      <span class="field-label">
        {str(props["label"])} <span class="muted tabular">{Math.round(value * 100)} %</span>
      </span>
      <progress value={value} max={1} />
    </label>
  );
}

/** Recognizes links to the shell's own pages, for their icons and for browser tests. */
function place(href: string): { testid: string; icon: IconName } {
  const path = href.split("?")[0] ?? "";
  if (/^\/console\b/.test(path)) return { testid: "nav-console", icon: "gauge" };
  if ((path === "/" || path === "/chat" || path === "/chat/") && !href.includes("?"))
    return { testid: "nav-chat", icon: "chat" };
  return /room|chat|^\/r\//.test(href) ? { testid: "room-link", icon: "hash" } : { testid: "link", icon: "link" };
}

export function Link({ node }: ElementProps) {
  const session = useSession();
  const props = node.props.value;
  const given = str(props["href"]);
  const href = safeHref(given);
  const active = props["active"] === true;
  const { testid, icon } = place(given);
  const label = str(props["label"]);
  if (href === null) return <span class="link">{label}</span>;
  if (!internalHref(href))
    return (
      <a class="link" href={href} target="_blank" rel="noopener noreferrer">
        <Icon name="link" />
        <span class="ellipsis">{label}</span>
      </a>
    );
  const follow = (event: MouseEvent): void => {
    if (
      event.defaultPrevented ||
      event.button !== 0 ||
      event.metaKey ||
      event.ctrlKey ||
      event.shiftKey ||
      event.altKey
    )
      return;
    event.preventDefault();
    session.go(href);
  };
  return (
    <a
      class={`link ${active ? "active" : ""}`}
      href={href}
      aria-current={active ? "page" : undefined}
      data-testid={testid}
      onClick={follow}
    >
      <Icon name={icon} />
      <span class="ellipsis">{icon === "hash" ? label.replace(/^#\s*/, "") : label}</span>
      {props["hint"] !== undefined && str(props["hint"]) !== "" && (
        <span class="count tabular">{str(props["hint"])}</span>
      )}
    </a>
  );
}

export function NewRoom() {
  const session = useSession();
  return (
    <button
      type="button"
      class="ghost icon-button small new-room"
      aria-label="New room"
      title="New room"
      data-testid="new-room"
      onClick={() => {
        session.dialog.value = "room";
      }}
    >
      <Icon name="plus" />
    </button>
  );
}

export function Metric({ node }: ElementProps) {
  const props = node.props.value;
  const delta = str(props["delta"]);
  return (
    <MetricCard label={str(props["label"])} value={str(props["value"])} unit={str(props["unit"])}>
      {delta !== "" && (
        <span class={`delta ${delta.startsWith("-") || delta.startsWith("−") ? "down" : "up"} tabular`}>{delta}</span>
      )}
    </MetricCard>
  );
}

export function MetricCard(props: {
  label: string;
  value: string;
  unit: string;
  live?: boolean;
  children?: ComponentChildren;
}) {
  return (
    <div class="metric" {...(props.live ? { "data-testid": "live-metric", "data-label": props.label } : {})}>
      <span class="metric-label">{props.label}</span>
      <span class="metric-value tabular" data-testid={props.live ? "live-metric-value" : undefined}>
        {props.value}
        {props.unit !== "" && <small> {props.unit}</small>}
      </span>
      {props.children}
    </div>
  );
}
