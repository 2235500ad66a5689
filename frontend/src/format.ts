// Numbers, times and names as people read them.
const hourMinute = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });
// On an axis there is no room for the half of the day.
const axisMinute = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const axisSecond = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
const fullTime = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const dayMonth = new Intl.DateTimeFormat(undefined, { weekday: "long", day: "numeric", month: "long" });

export const clock = (at: number): string => hourMinute.format(at);
/** With seconds where ticks are closer than a minute. */
export const axisTime = (at: number, step: number): string => (step < 60_000 ? axisSecond : axisMinute).format(at);
export const moment = (at: number): string => fullTime.format(at);

export function day(at: number, now = Date.now()): string {
  const start = (t: number): number => new Date(t).setHours(0, 0, 0, 0);
  const days = Math.round((start(now) - start(at)) / 86_400_000);
  if (days === 0) return "Today";
  if (days === 1) return "Yesterday";
  return dayMonth.format(at);
}

/** Short enough for a card, exact below ten thousand. */
export function number(value: number, digits?: number): string {
  const size = Math.abs(value);
  if (size >= 10_000) {
    for (const [limit, suffix] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]] as const) {
      if (size >= limit) return trim((value / limit).toFixed(size >= limit * 100 ? 0 : 1)) + suffix;
    }
  }
  if (digits !== undefined) return value.toFixed(digits);
  return Number.isInteger(value) ? String(value) : trim(value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2));
}

export function bytes(value: number): string {
  let size = value;
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (Math.abs(size) < 1024 || unit === "GiB") return `${trim(size.toFixed(size < 10 && unit !== "B" ? 1 : 0))} ${unit}`;
    size /= 1024;
  }
  return String(value);
}

/** A length of time in seconds. */
export function duration(seconds: number): string {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${trim(seconds.toFixed(seconds < 10 ? 1 : 0))} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.floor(seconds % 60)} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export function withUnit(value: number, unit: string, digits?: number): string {
  if (unit === "bytes") return bytes(value);
  if (unit === "percent" || unit === "%") return `${number(value, digits ?? (value < 10 ? 1 : 0))} %`;
  if ((unit === "us" || unit === "µs") && Math.abs(value) >= 1000) return `${number(value / 1000)} ms`;
  if (unit === "ms" && value >= 0 && value < 1) return "< 1 ms"; // whole ones are counted
  const text = number(value, digits);
  if (unit === "us") return `${text} µs`;
  return unit === "" ? text : `${text} ${unit}`;
}

/** What the server says in lower case, as a sentence of its own. */
export function sentence(text: string): string {
  const [first = ""] = text;
  return first.toUpperCase() + text.slice(first.length) + (/[.!?…]$/.test(text) || text === "" ? "" : ".");
}

export function initials(name: string): string {
  const words = name.trim().split(/[\s._-]+/).filter((word) => word !== "");
  const letters = words.length > 1 ? [words[0], words[words.length - 1]] : [words[0]];
  return letters.map((word) => [...(word ?? "?")][0] ?? "?").join("").toUpperCase();
}

/** One of `count`, always the same for the same name. */
export function pick(name: string, count: number): number {
  let hash = 2166136261;
  for (let i = 0; i < name.length; i++) hash = Math.imul(hash ^ name.charCodeAt(i), 16777619);
  return (hash >>> 0) % count;
}

const trim = (text: string): string => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
