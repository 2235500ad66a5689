// A line plot: uPlot draws, our legend shows the values under the crosshair and toggles lines. Drag to zoom.
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import uPlot from "uplot";
import { clock, moment, withUnit } from "../format";
import { Icon } from "../icons";
import { colour, painted, seriesToken } from "../theme";

export interface PlotSeries {
  label: string;
  values: (number | null)[];
}

export interface PlotProps {
  /** Seconds when `time`, else plain numbers. */
  x: number[];
  series: PlotSeries[];
  time: boolean;
  unit: string;
  title: string;
  /** What the x axis spans when not zoomed. */
  span?: [number, number];
}

const HEIGHT = 200;
const TABLE_ROWS = 30;

export default function Plot(props: PlotProps) {
  const { x, series, time, unit, span } = props;
  const host = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | undefined>(undefined);
  const zoomed = useRef(false);
  const spanNow = useRef(span);
  const [cursor, setCursor] = useState<number | null>(null);
  const [hidden, setHidden] = useState<ReadonlySet<string>>(new Set());
  const [asTable, setAsTable] = useState(false);
  const names = series.map((one) => one.label).join("\n");
  const paint = painted.value;
  spanNow.current = span;
  const data = [x, ...series.map((one) => one.values)] as uPlot.AlignedData;

  useLayoutEffect(() => {
    const el = host.current;
    if (!el || asTable) return;
    const axis: Partial<uPlot.Axis> = {
      stroke: colour("--text-2"),
      font: "11px system-ui, sans-serif",
      grid: { stroke: colour("--line"), width: 1 },
      ticks: { show: false },
    };
    const options: uPlot.Options = {
      width: Math.max(120, el.clientWidth),
      height: HEIGHT,
      legend: { show: false },
      padding: [8, 8, 0, 0],
      cursor: { y: false, points: { size: 6 }, drag: { x: true, y: false, setScale: true } },
      scales: {
        x: { time, range: (_u, min, max) => (!zoomed.current && spanNow.current ? spanNow.current : [min, max]) },
        y: { range: (_u, min, max) => yRange(min, max) },
      },
      axes: [
        { ...axis, ...(time ? { space: 70, values: (_u: uPlot, ticks: number[]) => ticks.map((tick) => timeTick(tick, ticks)) } : {}) },
        { ...axis, size: 52, values: (_u: uPlot, ticks: number[]) => ticks.map((tick) => withUnit(tick, unit === "bytes" || unit === "us" ? unit : "")) },
      ],
      series: [
        {},
        ...series.map((one, i) => ({
          label: one.label,
          stroke: colour(seriesToken(i)),
          width: 1.5,
          show: !hidden.has(one.label),
          points: { show: one.values.filter((v) => v !== null).length < 3 },
          ...(series.length === 1 ? { fill: colour("--series-fill") } : {}),
        })),
      ],
      hooks: {
        setCursor: [(u) => setCursor(u.cursor.idx ?? null)],
        setSelect: [(u) => { if (u.select.width > 0) zoomed.current = true; }],
      },
    };
    const made = new uPlot(options, data, el);
    plot.current = made;
    const unzoom = (): void => {
      zoomed.current = false;
      made.setData(made.data, true);
    };
    made.over.addEventListener("dblclick", unzoom);
    const observer = new ResizeObserver(() => made.setSize({ width: Math.max(120, el.clientWidth), height: HEIGHT }));
    observer.observe(el);
    return () => {
      observer.disconnect();
      made.destroy();
      plot.current = undefined;
    };
  }, [names, paint, unit, time, asTable]);

  useEffect(() => {
    const made = plot.current;
    if (made && made.data[0] !== x) {
      made.setData(data, !zoomed.current);
      if (zoomed.current) made.redraw();
    }
  });

  const toggle = (label: string, index: number): void => {
    const next = new Set(hidden);
    if (!next.delete(label)) next.add(label);
    setHidden(next);
    plot.current?.setSeries(index + 1, { show: !next.has(label) });
  };

  const index = cursor ?? x.length - 1;
  const when = cursor !== null && x[cursor] !== undefined ? (time ? moment(x[cursor] * 1000) : String(x[cursor])) : "";
  return (
    <div class="plot">
      {asTable ? <PlotTable {...props} /> : <div class="plot-host" ref={host} role="img" aria-label={`${props.title}: ${series.map((one) => `${one.label} ${shown(last(one.values), unit)}`).join(", ")}`} />}
      <div class="legend">
        {series.map((one, i) => (
          <button key={one.label} type="button" class="legend-item" aria-pressed={!hidden.has(one.label)} onClick={() => toggle(one.label, i)}>
            <i class={`swatch series-${i % 8}`} />
            <span class="ellipsis">{one.label}</span>
            <b class="tabular">{shown(one.values[index] ?? null, unit)}</b>
          </button>
        ))}
        <span class="legend-when muted tabular">{when}</span>
        <button type="button" class="ghost small icon-button" aria-pressed={asTable} aria-label={asTable ? "Show as chart" : "Show as table"} title={asTable ? "Chart" : "Table"} onClick={() => setAsTable(!asTable)}>
          <Icon name={asTable ? "gauge" : "table"} />
        </button>
      </div>
    </div>
  );
}

function PlotTable({ x, series, time, unit, title }: PlotProps) {
  const rows = x.map((_, i) => i).slice(-TABLE_ROWS).reverse();
  return (
    <div class="table-scroll plot-table" tabIndex={0} role="group" aria-label={title}>
      <table>
        <thead><tr><th scope="col">{time ? "Time" : "x"}</th>{series.map((one) => <th key={one.label} scope="col" class="align-right">{one.label}</th>)}</tr></thead>
        <tbody>
          {rows.map((i) => (
            <tr key={i}>
              <td class="tabular">{time ? timeTick(x[i] ?? 0, [0, 1]) : x[i]}</td>
              {series.map((one) => <td key={one.label} class="align-right tabular">{shown(one.values[i] ?? null, unit)}</td>)}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

const last = (values: (number | null)[]): number | null => values[values.length - 1] ?? null;
const shown = (value: number | null, unit: string): string => (value === null ? "–" : withUnit(value, unit));

/** From zero, with some air above; a flat line is not drawn on the frame. */
function yRange(min: number | null, max: number | null): [number, number] {
  const low = Math.min(0, min ?? 0);
  const high = max ?? 1;
  return [low, high <= low ? low + 1 : high + (high - low) * 0.1];
}

function timeTick(seconds: number, ticks: number[]): string {
  const close = (ticks[1] ?? 0) - (ticks[0] ?? 0) < 60;
  const text = clock(seconds * 1000);
  return close ? `${text}:${String(Math.floor(seconds % 60)).padStart(2, "0")}` : text;
}
