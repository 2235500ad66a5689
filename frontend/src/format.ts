// Formats numbers, times and names for display.
const hourMinute = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });
// Axis labels use the 24-hour clock: they have no room for AM and PM.
const axisMinute = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const axisSecond = new Intl.DateTimeFormat(undefined, {
  hour: "2-digit",
  minute: "2-digit",
  second: "2-digit",
  hourCycle: "h23",
});
const fullTime = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const dayMonth = new Intl.DateTimeFormat(undefined, { weekday: "long", day: "numeric", month: "long" });

export const clock = (at: number): string => hourMinute.format(at);
/** A time label for an axis, with seconds if the ticks are less than a minute apart. `step` is in milliseconds. */
export const axisTime = (at: number, step: number): string => (step < 60_000 ? axisSecond : axisMinute).format(at);
export const moment = (at: number): string => fullTime.format(at);

export function day(at: number, now = Date.now()): string {
  const start = (t: number): number => new Date(t).setHours(0, 0, 0, 0);
  const days = Math.round((start(now) - start(at)) / 86_400_000);
  if (days === 0) return "Today";
  if (days === 1) return "Yesterday";
  return dayMonth.format(at);
}

/** Abbreviates numbers from ten thousand on (12.3k, 4.5M); smaller integers stay exact. */
export function number(value: number, digits?: number): string {
  const size = Math.abs(value);
  if (size >= 10_000) {
    for (const [limit, suffix] of [
      [1e9, "G"],
      [1e6, "M"],
      [1e3, "k"],
    ] as const) {
      if (size >= limit) return trim((value / limit).toFixed(size >= limit * 100 ? 0 : 1)) + suffix;
    }
  }

  if (digits !== undefined) return value.toFixed(digits);
  return Number.isInteger(value) ? String(value) : trim(value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2));
}

export function bytes(value: number): string {
  let size = value;
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (Math.abs(size) < 1024 || unit === "GiB")
      return `${trim(size.toFixed(size < 10 && unit !== "B" ? 1 : 0))} ${unit}`;
    size /= 1024;
  }
  return String(value);
}

/** Formats a length of time given in seconds. */
export function duration(seconds: number): string {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${trim(seconds.toFixed(seconds < 10 ? 1 : 0))} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.floor(seconds % 60)} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** Formats a value with its unit. Bytes, percentages and times are scaled to a readable unit. */
export function withUnit(value: number, unit: string, digits?: number): string {
  if (unit === "bytes") return bytes(value);
  if (unit === "percent" || unit === "%") return `${number(value, digits ?? (value < 10 ? 1 : 0))} %`;
  if ((unit === "us" || unit === "µs") && Math.abs(value) >= 1000) return `${number(value / 1000)} ms`;
  if (unit === "ms" && value >= 0 && value < 1) return "< 1 ms"; // the server reports whole milliseconds
  const text = number(value, digits);
  if (unit === "us") return `${text} µs`;
  return unit === "" ? text : `${text} ${unit}`;
}

/** Turns a lower-case message of the server into a sentence: "not found" becomes "Not found.". */
export function sentence(text: string): string {
  const [first = ""] = text;
  return first.toUpperCase() + text.slice(first.length) + (/[.!?…]$/.test(text) || text === "" ? "" : ".");
}

export function initials(name: string): string {
  const words = name
    .trim()
    .split(/[\s._-]+/)
    .filter((word) => word !== "");
  const letters = words.length > 1 ? [words[0], words[words.length - 1]] : [words[0]];
  return letters
    .map((word) => [...(word ?? "?")][0] ?? "?")
    .join("")
    .toUpperCase();
}

/** Hashes a name to an index below `count`. */
export function pick(name: string, count: number): number {
  let hash = 2166136261;
  for (let i = 0; i < name.length; i++) hash = Math.imul(hash ^ name.charCodeAt(i), 16777619);
  return (hash >>> 0) % count;
}

const trim = (text: string): string => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
