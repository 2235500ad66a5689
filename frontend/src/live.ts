// Samples of a channel: its history, then live ones. All elements on the page that show a channel share its samples.
import { signal, type Signal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import type { Publication } from "./codec/realtime";
import { useSession } from "./context";
import { at, fromBytes, isObject, num, object, type Json, type JsonObject } from "./json";
import type { Session } from "./session";

export interface Sample {
  /** Milliseconds since the epoch. */
  t: number;
  data: JsonObject;
}

/** Samples kept for each channel. */
const KEPT = 900;
/** History limit that asks for all publications. */
const ALL = -1;

class Live {
  readonly samples = signal<Sample[]>([]);
  readonly problem = signal("");
  private users = 0;
  private leave: (() => void) | undefined;

  constructor(
    private readonly session: Session,
    private readonly channel: string,
  ) {}

  use(): () => void {
    if (this.users++ === 0) this.open();
    return () => {
      if (--this.users > 0) return;
      this.leave?.();
      this.leave = undefined;
    };
  }

  private open(): void {
    this.leave = this.session.connection.subscribe(this.channel, {
      subscribed: ({ recovered }) => {
        this.problem.value = "";
        if (!recovered) void this.fill();
      },
      publication: (publication) => this.add([publication]),
      failed: (error) => {
        this.problem.value = error.message;
      },
    });
  }

  private async fill(): Promise<void> {
    try {
      const { publications } = await this.session.connection.history(this.channel, ALL);
      this.add(publications);
    } catch {
      // The channel has no history; live samples fill it.
    }
  }

  private add(publications: Publication[]): void {
    this.samples.value = merge(this.samples.peek(), publications.map(read));
  }
}

function read(publication: Publication): Sample {
  const data = object(fromBytes(publication.data));
  return { t: num(data["t"]) || publication.time || Date.now(), data };
}

/** Merges samples in order of time. Of samples with the same time the last one wins; only the newest are kept. */
export function merge(held: Sample[], fresh: Sample[]): Sample[] {
  const after = held[held.length - 1]?.t ?? -Infinity;
  const all = [...held];
  let sorted = true;
  let newest = after;
  for (const sample of fresh) {
    if (sample.t <= newest) sorted = false;
    else newest = sample.t;
    all.push(sample);
  }

  // Live samples arrive in order, so the sort below is rarely needed.
  if (sorted) return all.slice(-KEPT);
  return [...new Map(all.map((sample) => [sample.t, sample])).values()].sort((a, b) => a.t - b.t).slice(-KEPT);
}

/**
 * The numbers at a path of each sample; null where there is none. With `rate`, the path holds a total and the result is
 * its growth per second; a total that fell (its process restarted) has no rate.
 */
export function numbers(samples: Sample[], path: string, rate: boolean): (number | null)[] {
  const plain = samples.map((sample) => {
    const value: Json | undefined = at(sample.data, path);
    return typeof value === "number" ? value : null;
  });
  return rate ? rates(samples, plain) : plain;
}

function rates(samples: Sample[], totals: (number | null)[]): (number | null)[] {
  return totals.map((total, i) => {
    const before = totals[i - 1];
    const seconds = ((samples[i]?.t ?? 0) - (samples[i - 1]?.t ?? 0)) / 1000;
    if (total === null || before === null || before === undefined || seconds <= 0 || total < before) return null;
    return (total - before) / seconds;
  });
}

/** One series for each name in the object at a path: the first `most` names in alphabetical order. */
export function breakdown(
  samples: Sample[],
  path: string,
  rate: boolean,
  most: number,
): { label: string; values: (number | null)[] }[] {
  const names = new Set<string>();
  for (const sample of samples) {
    const value = at(sample.data, path);
    if (isObject(value)) for (const name of Object.keys(value)) names.add(name);
  }

  return [...names]
    .sort()
    .slice(0, most)
    .map((label) => {
      const totals = samples.map((sample) => {
        const value = object(at(sample.data, path))[label];
        return typeof value === "number" ? value : null;
      });
      return { label, values: rate ? rates(samples, totals) : totals };
    });
}

const channels = new WeakMap<Session, Map<string, Live>>();

export function useLive(channel: string): { samples: Signal<Sample[]>; problem: Signal<string> } {
  const session = useSession();
  let known = channels.get(session);
  if (!known) channels.set(session, (known = new Map()));
  let live = known.get(channel);
  if (!live) known.set(channel, (live = new Live(session, channel)));

  const held = live;
  useEffect(() => held.use(), [held]);
  return held;
}
