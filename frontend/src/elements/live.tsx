// Elements bound to a channel of samples. They update without a rerun of the app.
import type { ComponentChildren } from "preact";
import { bytes, duration, number, withUnit } from "../format";
import { at, num, records, str, type Json, type JsonObject } from "../json";
import { breakdown, numbers, useLive, type Sample } from "../live";
import { ChartCard, LazyPlot } from "./charts";
import { yesNo, type ElementProps } from "./element";
import type { PlotSeries } from "./plot";
import { MetricCard } from "./show";
import { columnsOf, DataTable, type Column } from "./table";

/** Samples shown by a spark line. */
const SPARK = 60;
const MOST_SERIES = 8;

export function LiveMetric({ node }: ElementProps) {
  const props = node.props.value;
  const { samples } = useLive(str(props["channel"]));
  const recent = samples.value.slice(-SPARK);
  const values = numbers(recent, str(props["path"]), props["rate"] === true);
  const last = values[values.length - 1] ?? null;

  const unit = str(props["unit"]);
  const digits = typeof props["digits"] === "number" ? num(props["digits"]) : undefined;
  const known = unit === "bytes" || unit === "us" || unit === "percent";
  const text = last === null ? "–" : known ? withUnit(last, unit, digits) : number(last, digits);
  return (
    <MetricCard label={str(props["label"])} value={text} unit={known ? "" : unit} live>
      <Spark values={values} />
    </MetricCard>
  );
}

function Spark({ values }: { values: (number | null)[] }) {
  const known = values.filter((value): value is number => value !== null);
  if (known.length < 2) return <svg class="spark-line" viewBox="0 0 60 16" aria-hidden="true" />;
  const low = Math.min(...known);
  const spread = Math.max(...known) - low || 1;

  const start = SPARK - values.length;
  const points = values.flatMap((value, i) =>
    value === null ? [] : [`${start + i + 1},${(14.5 - ((value - low) / spread) * 13).toFixed(1)}`],
  );
  return (
    <svg class="spark-line" viewBox="0 0 60 16" preserveAspectRatio="none" aria-hidden="true">
      <polyline
        points={points.join(" ")}
        fill="none"
        stroke="currentColor"
        stroke-width="1.2"
        vector-effect="non-scaling-stroke"
      />
    </svg>
  );
}

export function LiveLineChart({ node }: ElementProps) {
  const props = node.props.value;
  const wanted = records(props["series"]);
  return (
    <LivePlot
      node={node}
      series={(samples) =>
        wanted.map((one) => ({
          label: str(one["label"], str(one["path"])),
          values: numbers(samples, str(one["path"]), one["rate"] === true),
        }))
      }
    />
  );
}

export function LiveBreakdown({ node }: ElementProps) {
  const props = node.props.value;
  return (
    <LivePlot
      node={node}
      series={(samples) => breakdown(samples, str(props["path"]), props["rate"] === true, MOST_SERIES)}
    />
  );
}

function LivePlot({ node, series }: ElementProps & { series: (samples: Sample[]) => PlotSeries[] }) {
  const props = node.props.value;
  const { samples, problem } = useLive(str(props["channel"]));
  const range = num(props["window"], 300);
  const all = samples.value;
  const end = all[all.length - 1]?.t ?? Date.now();
  // Include earlier samples than shown, so that a rate starts at the left edge.
  const shown = all.filter((sample) => sample.t >= end - (range + 2) * 1000);
  const title = str(props["title"]);
  const lines = series(shown);
  const emptyText =
    shown.length === 0 ? "Waiting for the first sample…" : "No data yet. Send a request to see it here.";
  return (
    <ChartCard title={title}>
      {problem.value !== "" ? (
        <div class="empty small">
          <p>Cannot read this channel: {problem.value}</p>
        </div>
      ) : shown.length === 0 || lines.length === 0 ? (
        <div class="plot-host empty small">
          <p>{emptyText}</p>
        </div>
      ) : (
        <LazyPlot
          x={shown.map((sample) => sample.t / 1000)}
          time
          unit={str(props["unit"])}
          title={title}
          series={lines}
          span={[end / 1000 - range, end / 1000]}
        />
      )}
    </ChartCard>
  );
}

export function LiveTable({ node }: ElementProps) {
  const props = node.props.value;
  const { samples } = useLive(str(props["channel"]));
  const latest = samples.value[samples.value.length - 1];
  if (!latest) return <div class="skeleton block delayed" data-testid="live-table" />;
  return (
    <DataTable
      testid="live-table"
      columns={columnsOf(props["columns"])}
      rows={records(at(latest.data, str(props["path"])))}
      cell={cell}
      empty={str(props["empty"])}
    />
  );
}

const GOOD = ["ok", "closed", "idle", "ready", "true", "up", "serving", "done", "memory"];
const WARN = ["busy", "half_open", "cooling_down", "draining", "pending", "degraded"];
const BAD = ["open", "failed", "stopped", "down", "error", "gone"];

function stateTone(word: string): string {
  if (GOOD.includes(word)) return "ok";
  if (WARN.includes(word)) return "warn";
  return BAD.includes(word) ? "bad" : "muted";
}

function cell(value: Json | undefined, column: Column, row: JsonObject): ComponentChildren {
  // Without a completed task, a latency of 0 means that it is unknown.
  const none = column.format === "ms" && value === 0 && row["completed_total"] === 0;
  if (value === undefined || value === null || none) return <span class="muted">–</span>;
  if (column.format === "badge") {
    const word = typeof value === "boolean" ? yesNo(value) : str(value);
    return <span class={`badge ${stateTone(word)}`}>{word.replace(/_/g, " ")}</span>;
  }
  if (typeof value === "boolean") return yesNo(value);
  if (typeof value === "number") return formatted(value, column.format);
  if (typeof value === "object") return <code>{JSON.stringify(value)}</code>;
  return str(value);
}

function formatted(value: number, format: string): string {
  switch (format) {
    case "int":
      return new Intl.NumberFormat().format(Math.round(value));
    case "bytes":
      return bytes(value);
    case "percent":
      return `${number(value * 100, 1)} %`; // shares are 0 to 1 on the wire
    case "ms":
      return withUnit(value, "ms");
    case "us":
      return withUnit(value, "us");
    case "duration":
      return duration(value);
    default:
      return number(value);
  }
}
