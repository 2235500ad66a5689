// Charts of static data. The plot code is loaded when the first chart is shown.
import { useEffect, useState } from "preact/hooks";
import type { ComponentType } from "preact";
import { withUnit } from "../format";
import { at, list, num, records, str, type Json } from "../json";
import { labelsOf, type ElementProps } from "./element";
import type { PlotProps } from "./plot";

let loaded: ComponentType<PlotProps> | undefined;

/** Shows a placeholder until the plot code has been loaded. */
export function LazyPlot(props: PlotProps) {
  const [, arrived] = useState(false);
  useEffect(() => {
    if (!loaded) {
      void import("./plot").then((module) => {
        loaded = module.default;
        arrived(true);
      });
    }
  }, []);
  const Plot = loaded;
  return Plot ? <Plot {...props} /> : <div class="plot-host skeleton delayed" />;
}

export function ChartCard(props: { title: string; children: preact.ComponentChildren }) {
  return (
    <section class="card chart" data-testid="chart" aria-label={props.title}>
      <header>
        <h2>{props.title}</h2>
      </header>
      {props.children}
    </section>
  );
}

export function LineChart({ node }: ElementProps) {
  const props = node.props.value;
  const given = records(props["series"]).map((one) => ({
    label: str(one["label"]),
    points: new Map(list(one["points"]).map((point): [number, number] => [num(at(point, "0")), num(at(point, "1"))])),
  }));
  const xs = [...new Set(given.flatMap((one) => [...one.points.keys()]))].sort((a, b) => a - b);
  const time = (xs[0] ?? 0) > 1e11; // values this large are epoch milliseconds
  const title = str(props["title"]);
  return (
    <ChartCard title={title}>
      {xs.length === 0 ? (
        <div class="empty small">
          <p>No data yet.</p>
        </div>
      ) : (
        <LazyPlot
          x={time ? xs.map((x) => x / 1000) : xs}
          time={time}
          unit={str(props["unit"])}
          title={title}
          series={given.map((one) => ({ label: one.label, values: xs.map((x) => one.points.get(x) ?? null) }))}
        />
      )}
    </ChartCard>
  );
}

export function BarChart({ node }: ElementProps) {
  const props = node.props.value;
  const labels = labelsOf(props["labels"]);
  const values = list(props["values"]).map((value: Json) => num(value));
  const most = Math.max(...values, 0) || 1;
  const unit = str(props["unit"]);
  return (
    <ChartCard title={str(props["title"])}>
      <table class="bars">
        <tbody>
          {labels.map((label, i) => (
            <tr key={label}>
              <th scope="row" class="ellipsis">
                {label}
              </th>
              <td class="bar-cell" aria-hidden="true">
                <span class="bar" style={{ width: `${(Math.max(0, values[i] ?? 0) / most) * 100}%` }} />
              </td>
              <td class="align-right tabular">{withUnit(values[i] ?? 0, unit)}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </ChartCard>
  );
}
