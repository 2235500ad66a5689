// A line plot. The legend shows the values under the crosshair and toggles lines, a drag zooms, and a table shows the
// same data.
import type { RefObject, SVGAttributes } from "preact";
import { useLayoutEffect, useRef, useState } from "preact/hooks";
import { axisTime, moment, withUnit } from "../format";
import { Icon } from "../icons";
import { areaPath, coincide, linePath, nearest, ticks, timeTicks, yRange, type Range } from "../scale";
import { Sideways } from "../sideways";

export interface PlotSeries {
  label: string;
  values: (number | null)[];
}

export interface PlotProps {
  /** Ascending; epoch seconds if `time` is set, else plain numbers. */
  x: number[];
  series: PlotSeries[];
  time: boolean;
  unit: string;
  title: string;
  /** Range of the x axis while not zoomed; by default that of `x`. */
  span?: Range;
}

const HEIGHT = 200;
const [LEFT, RIGHT, TOP, BOTTOM] = [52, 8, 8, 22];
const BOX_HEIGHT = HEIGHT - TOP - BOTTOM;
const SERIES = 8;
/** Length of a dash with its gap, in pixels. */
const DASHES = 16;
const TABLE_ROWS = 30;
/** A drag of fewer pixels counts as a click. */
const DRAG = 6;

/** A series as drawn: the visible part of its values, with its colour class. */
interface Line extends PlotSeries {
  tint: string;
  shown: boolean;
}

/** Maps values to pixels, from the top left corner of the plot box. */
interface Scales {
  boxWidth: number;
  toX: (x: number) => number;
  toY: (y: number) => number;
}

/** The part of the data in view, and where it is drawn. */
interface View {
  xRange: Range;
  yRange: Range;
  x: number[];
  lines: Line[];
  scales: Scales;
  /** Data units per pixel of the x axis. */
  perPixel: number;
}

export default function Plot(props: PlotProps) {
  const { x, series, time, unit } = props;
  const [zoom, setZoom] = useState<Range | null>(null);
  const [hidden, setHidden] = useState<ReadonlySet<string>>(new Set());
  const [asTable, setAsTable] = useState(false);
  const host = useRef<HTMLDivElement>(null);
  const width = useWidth(host, asTable);

  const range = zoom ?? props.span ?? [x[0] ?? 0, x[x.length - 1] ?? 1];
  const view = viewOf(x, series, range, Math.max(60, width - LEFT - RIGHT), hidden);
  const pointer = usePointer(view, setZoom);

  // Follow the pointer, not a sample: samples move below the crosshair as new ones arrive.
  const index = pointer.at === null ? -1 : nearest(view.x, view.xRange[0] + pointer.at * view.perPixel);
  const at = view.x[index];
  const when = at === undefined ? "" : time ? moment(at * 1000) : String(at);

  const toggle = (label: string): void => {
    const next = new Set(hidden);
    if (!next.delete(label)) next.add(label);
    setHidden(next);
  };
  return (
    <div class="plot">
      {asTable ? (
        <PlotTable {...props} />
      ) : (
        <div class="plot-host" ref={host} onDblClick={() => setZoom(null)}>
          {width > 0 && <Drawing {...props} width={width} view={view} pointer={pointer} index={index} />}
        </div>
      )}
      <div class="legend">
        {view.lines.map((line) => (
          <LegendItem
            key={line.label}
            line={line}
            value={line.values[index < 0 ? line.values.length - 1 : index]}
            unit={unit}
            onClick={() => toggle(line.label)}
          />
        ))}
        <span class="legend-when muted tabular">{when}</span>
        {zoom && (
          <button type="button" class="small" onClick={() => setZoom(null)}>
            Whole range
          </button>
        )}
        <TableSwitch asTable={asTable} onClick={() => setAsTable(!asTable)} />
      </div>
    </div>
  );
}

/** The width of the host element in pixels; 0 before the first layout. */
function useWidth(host: RefObject<HTMLDivElement | null>, asTable: boolean): number {
  const [width, setWidth] = useState(0);
  useLayoutEffect(() => {
    const el = host.current;
    if (!el) return;
    const measure = (): void => setWidth(el.clientWidth);
    measure();
    const observer = new ResizeObserver(measure);
    observer.observe(el);
    return () => observer.disconnect();
  }, [asTable]);
  return width;
}

function viewOf(
  x: number[],
  series: PlotSeries[],
  [from, to]: Range,
  boxWidth: number,
  hidden: ReadonlySet<string>,
): View {
  const xRange: Range = to > from ? [from, to] : [from - 1, from + 1];
  const perPixel = (xRange[1] - xRange[0]) / boxWidth;

  // Include one sample beyond either side, so that lines run to the edge.
  const first = Math.max(0, x.findIndex((at) => at >= xRange[0]) - 1);
  const after = x.findIndex((at) => at > xRange[1]);
  const end = after < 0 ? x.length : after + 1;
  const lines = series.map((one, i): Line => ({
    ...one,
    values: one.values.slice(first, end),
    tint: `series-${i % SERIES}`,
    shown: !hidden.has(one.label),
  }));

  const [low, high] = yRange(lines.filter((line) => line.shown).flatMap((line) => line.values));
  const scales = {
    boxWidth,
    toX: (at: number): number => (at - xRange[0]) / perPixel,
    toY: (value: number): number => BOX_HEIGHT - ((value - low) / (high - low)) * BOX_HEIGHT,
  };
  return { xRange, yRange: [low, high], x: x.slice(first, end), lines, scales, perPixel };
}

/** The mouse or finger over the plot. Positions are pixels from the left edge of the plot box. */
interface Pointer {
  at: number | null;
  /** Where a drag started. */
  pressed: number | null;
  handlers: Pick<SVGAttributes<SVGSVGElement>, "onPointerMove" | "onPointerDown" | "onPointerUp" | "onPointerLeave">;
}

/** Follows the pointer. A drag with the mouse selects a range. */
function usePointer({ xRange, perPixel, scales }: View, select: (range: Range) => void): Pointer {
  const [at, setAt] = useState<number | null>(null);
  const [pressed, setPressed] = useState<number | null>(null);

  const place = (event: PointerEvent): number => {
    const box = (event.currentTarget as Element).getBoundingClientRect();
    return Math.max(0, Math.min(scales.boxWidth, event.clientX - box.left - LEFT));
  };
  const press = (event: PointerEvent): void => {
    // A finger scrolls the page and moves the crosshair, but does not zoom.
    if (event.pointerType !== "mouse" || event.button !== 0) return;
    (event.currentTarget as Element).setPointerCapture(event.pointerId);
    setPressed(place(event));
  };
  const release = (event: PointerEvent): void => {
    if (pressed === null) return;
    const [low, high] = [pressed, place(event)].sort((a, b) => a - b) as [number, number];
    if (high - low >= DRAG) select([xRange[0] + low * perPixel, xRange[0] + high * perPixel]);
    setPressed(null);
  };
  const leave = (): void => {
    setAt(null);
    setPressed(null);
  };

  const handlers = {
    onPointerMove: (event: PointerEvent) => setAt(place(event)),
    onPointerDown: press,
    onPointerUp: release,
    onPointerLeave: leave,
  };
  return { at, pressed, handlers };
}

interface DrawingProps extends PlotProps {
  width: number;
  view: View;
  pointer: Pointer;
  /** Index of the sample under the crosshair; -1 if there is none. */
  index: number;
}

function Drawing({ title, series, time, unit, width, view, pointer, index }: DrawingProps) {
  const { scales, x, lines } = view;
  const visible = lines.filter((line) => line.shown);
  const latest = series.map((one) => `${one.label} ${shown(one.values[one.values.length - 1], unit)}`);
  const at = x[index];
  return (
    <svg
      class="plot-box"
      width={width}
      height={HEIGHT}
      role="img"
      aria-label={`${title}: ${latest.join(", ")}`}
      {...pointer.handlers}
    >
      <Axes xRange={view.xRange} range={view.yRange} scales={scales} time={time} unit={unit} />
      <svg x={LEFT} y={TOP} width={scales.boxWidth} height={BOX_HEIGHT}>
        <Lines x={x} lines={visible} scales={scales} floor={series.length === 1 ? Math.max(0, view.yRange[0]) : null} />
        <Selection pointer={pointer} />
      </svg>
      {at !== undefined && <Crosshair at={at} index={index} lines={visible} scales={scales} />}
    </svg>
  );
}

function Selection({ pointer: { at, pressed } }: { pointer: Pointer }) {
  if (pressed === null || at === null) return null;
  return <rect class="selection" x={Math.min(pressed, at)} y={0} width={Math.abs(at - pressed)} height={BOX_HEIGHT} />;
}

function TableSwitch({ asTable, onClick }: { asTable: boolean; onClick: () => void }) {
  return (
    <button
      type="button"
      class="ghost small icon-button"
      aria-pressed={asTable}
      aria-label={asTable ? "Show as chart" : "Show as table"}
      title={asTable ? "Chart" : "Table"}
      onClick={onClick}
    >
      <Icon name={asTable ? "chart" : "table"} />
    </button>
  );
}

function Axes({
  xRange,
  range,
  scales,
  time,
  unit,
}: {
  xRange: Range;
  range: Range;
  scales: Scales;
  time: boolean;
  unit: string;
}) {
  const { boxWidth, toX, toY } = scales;
  const yTicks = ticks(range, 5, unit === "bytes" ? 1024 : 10);
  const xTicks = time ? timeTicks(xRange, boxWidth / 80) : ticks(xRange, boxWidth / 80);
  const step = ((xTicks[1] ?? 0) - (xTicks[0] ?? 0)) * 1000;
  return (
    <>
      {yTicks.map((tick) => (
        <g key={tick} transform={`translate(0 ${TOP + toY(tick)})`}>
          <path class="grid" d={`M${LEFT} 0h${boxWidth}`} />
          <text x={LEFT - 8} dy="0.32em" text-anchor="end">
            {withUnit(tick, unit === "bytes" || unit === "us" ? unit : "")}
          </text>
        </g>
      ))}
      {xTicks.map((tick) => (
        <g key={tick} transform={`translate(${LEFT + toX(tick)} 0)`}>
          <path class="grid" d={`M0 ${TOP}v${BOX_HEIGHT}`} />
          <text y={HEIGHT - 6} text-anchor={anchor(toX(tick), boxWidth)}>
            {time ? axisTime(tick * 1000, step) : withUnit(tick, "")}
          </text>
        </g>
      ))}
    </>
  );
}

/** The lines, and the area between a line and `floor` unless that is null. */
function Lines({ x, lines, scales, floor }: { x: number[]; lines: Line[]; scales: Scales; floor: number | null }) {
  const { toX, toY } = scales;
  return (
    <>
      {lines.map((line, i) => {
        const path = linePath(x, line.values, toX, toY);
        const below = lines.slice(0, i).filter((other) => coincide(other.values, line.values));
        return (
          <g key={line.label} class={line.tint}>
            {floor !== null && <path class="area" d={areaPath(path, toY(floor))} />}
            <path class="line" d={path} stroke-dasharray={dashes(below.length)} />
          </g>
        );
      })}
    </>
  );
}

function Crosshair({ at, index, lines, scales }: { at: number; index: number; lines: Line[]; scales: Scales }) {
  return (
    <g transform={`translate(${LEFT + scales.toX(at)} ${TOP})`}>
      <path class="crosshair" d={`M0 0v${BOX_HEIGHT}`} />
      {lines.map((line) => {
        const value = line.values[index] ?? null;
        return (
          value !== null && <circle key={line.label} class={`point ${line.tint}`} cy={scales.toY(value)} r={3.5} />
        );
      })}
    </g>
  );
}

function LegendItem({
  line,
  value,
  unit,
  onClick,
}: {
  line: Line;
  value: number | null | undefined;
  unit: string;
  onClick: () => void;
}) {
  return (
    <button type="button" class="legend-item" aria-pressed={line.shown} onClick={onClick}>
      <i class={`swatch ${line.tint}`} />
      <span class="ellipsis">{line.label}</span>
      <b class="tabular">{shown(value, unit)}</b>
    </button>
  );
}

function PlotTable({ x, series, time, unit, title }: PlotProps) {
  const rows = x
    .map((_, i) => i)
    .slice(-TABLE_ROWS)
    .reverse();
  return (
    <Sideways also="plot-table" label={title}>
      <table>
        <thead>
          <tr>
            <th scope="col">{time ? "Time" : "x"}</th>
            {series.map((one) => (
              <th key={one.label} scope="col" class="align-right">
                {one.label}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map((i) => (
            <tr key={i}>
              <td class="tabular">{time ? axisTime((x[i] ?? 0) * 1000, 0) : x[i]}</td>
              {series.map((one) => (
                <td key={one.label} class="align-right tabular">
                  {shown(one.values[i], unit)}
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </Sideways>
  );
}

const shown = (value: number | null | undefined, unit: string): string =>
  value === null || value === undefined ? "–" : withUnit(value, unit);

/** Dashes a line that covers `below` others, so that its gaps show them. */
function dashes(below: number): string | undefined {
  const dash = DASHES / 2 ** below;
  return below === 0 ? undefined : `${dash} ${DASHES - dash}`;
}

/** Aligns the labels at the edges inwards, so that they stay inside the plot. */
const anchor = (x: number, width: number): string => (x < 16 ? "start" : x > width - 24 ? "end" : "middle");
