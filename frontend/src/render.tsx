// Renders the tree with one component for each kind of node. An unknown kind shows a placeholder.
import type { ComponentType } from "preact";
import { Chat } from "./chat/chat";
import { BarChart, LineChart } from "./elements/charts";
import { Card, ColumnElement, Columns, Container, Dialog, Expander, Form, Plain, Tabs } from "./elements/layout";
import { LiveBreakdown, LiveLineChart, LiveMetric, LiveTable } from "./elements/live";
import type { ElementProps } from "./elements/element";
import * as show from "./elements/show";
import { Table } from "./elements/table";
import * as widgets from "./elements/widgets";
import { memo } from "./memo";
import type { TreeNode } from "./store";

const KINDS = new Map<string, ComponentType<ElementProps>>([
  ["page", Plain],
  ["sidebar", Plain],
  ["main", Plain],
  ["container", Container],
  ["columns", Columns],
  ["column", ColumnElement],
  ["card", Card],
  ["tabs", Tabs],
  ["tab", Plain],
  ["expander", Expander],
  ["form", Form],
  ["dialog", Dialog],
  ["heading", show.Heading],
  ["text", show.Text],
  ["markdown", show.MarkdownElement],
  ["code", show.Code],
  ["table", Table],
  ["metric", show.Metric],
  ["badge", show.Badge],
  ["alert", show.Alert],
  ["empty", show.Empty],
  ["divider", show.Divider],
  ["link", show.Link],
  ["progress", show.Progress],
  ["json", show.JsonView],
  ["button", widgets.Button],
  ["text_input", widgets.TextInput],
  ["text_area", widgets.TextArea],
  ["number_input", widgets.NumberInput],
  ["checkbox", widgets.Checkbox],
  ["toggle", widgets.Toggle],
  ["radio", widgets.Radio],
  ["selectbox", widgets.SelectBox],
  ["slider", widgets.Slider],
  ["line_chart", LineChart],
  ["bar_chart", BarChart],
  ["new_room", show.NewRoom],
  ["live_line_chart", LiveLineChart],
  ["live_breakdown", LiveBreakdown],
  ["live_metric", LiveMetric],
  ["live_table", LiveTable],
  ["chat", Chat],
]);

export const Element = memo(function Element({ node }: { node: TreeNode }) {
  const Kind = KINDS.get(node.kind);
  return Kind ? <Kind node={node} /> : <Unknown node={node} />;
});

export function Children({ node }: { node: TreeNode }) {
  return (
    <>
      {node.children.value.map((child) => (
        <Element key={child.id} node={child} />
      ))}
    </>
  );
}

function Unknown({ node }: { node: TreeNode }) {
  return (
    <div class="unknown">
      <span>This page is too old to show “{node.kind}”. Reload it to update.</span>
      <Children node={node} />
    </div>
  );
}
