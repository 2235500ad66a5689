// The geometry of a plot: ranges, round ticks, the nearest sample and the paths of lines.

export type Range = readonly [number, number];

const ROUND = [1, 2, 5, 10];
const TIME_STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1_800, 3_600, 7_200, 14_400, 21_600, 43_200, 86_400];

/** The range of the y axis. It includes zero and leaves a margin at the top, so that no line lies on the frame. */
export function yRange(values: Iterable<number | null>): Range {
  let low = 0;
  let high = -Infinity;
  for (const value of values) {
    if (value === null) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (high <= low) return [low, low + 1];
  return [low, high + (high - low) * 0.1];
}

/** Round numbers within the range, about `most` of them. With `base` 1024 they are round as bytes. */
export function ticks([low, high]: Range, most: number, base = 10): number[] {
  const rough = (high - low) / Math.max(1, most);
  if (!(rough > 0) || !isFinite(rough)) return [];
  const unit = base === 10 ? 1 : base ** Math.max(0, Math.floor(Math.log(rough) / Math.log(base)));
  const power = unit * 10 ** Math.floor(Math.log10(rough / unit));
  const step = power * (ROUND.find((factor) => power * factor >= rough * (1 - 1e-9)) ?? 10);
  return multiples(low, high, step);
}

/** Ticks at full seconds, minutes or hours of the local time zone. The range is in seconds. */
export function timeTicks([low, high]: Range, most: number): number[] {
  const rough = (high - low) / Math.max(1, most);
  const step = TIME_STEPS.find((one) => one >= rough) ?? Math.ceil(rough / 86_400) * 86_400;
  const zone = new Date(low * 1000).getTimezoneOffset() * 60;
  return multiples(low - zone, high - zone, step).map((tick) => tick + zone);
}

function multiples(low: number, high: number, step: number): number[] {
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  // Rounds off floating-point noise such as 0.30000000000000004.
  return Array.from({ length: Math.max(0, last - first + 1) }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/** Whether one line hides the other: most of their common values are equal. */
export function coincide(a: readonly (number | null)[], b: readonly (number | null)[]): boolean {
  let both = 0;
  let same = 0;
  a.forEach((value, i) => {
    const other = b[i];
    if (value === null || other === null || other === undefined) return;
    both++;
    if (value === other) same++;
  });
  return same * 2 > both;
}

/** Index of the value nearest to `at` in an ascending list; -1 if it is empty. */
export function nearest(sorted: readonly number[], at: number): number {
  let low = 0;
  let high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((sorted[middle] ?? 0) < at) low = middle + 1;
    else high = middle;
  }

  const here = sorted[low];
  const before = sorted[low - 1];
  return here !== undefined && before !== undefined && at - before < here - at
    ? low - 1
    : here === undefined
      ? -1
      : low;
}

/**
 * The SVG path of a line. A missing value breaks the line. A value between two missing ones becomes an empty segment,
 * which round line caps draw as a dot.
 */
export function linePath(
  x: readonly number[],
  values: readonly (number | null)[],
  toX: (x: number) => number,
  toY: (y: number) => number,
): string {
  let path = "";
  let open = false;
  x.forEach((at, i) => {
    const value = values[i];
    if (value === null || value === undefined) {
      open = false;
      return;
    }
    path += `${open ? "L" : "M"}${toX(at).toFixed(1)} ${toY(value).toFixed(1)}`;
    if (!open && (values[i + 1] ?? null) === null) path += "h0";
    open = true;
  });
  return path;
}

/** The SVG path of the area between a line and `floor`, one piece for each unbroken part of the line. */
export function areaPath(line: string, floor: number): string {
  return line
    .split("M")
    .slice(1)
    .map((piece) => {
      const points = piece.split(/[Lh]/);
      const [first, last] = [points[0] ?? "", points[points.length - 1] ?? ""];
      return piece.includes("h") ? "" : `M${piece}L${last.split(" ")[0]} ${floor}L${first.split(" ")[0]} ${floor}Z`;
    })
    .join("");
}
