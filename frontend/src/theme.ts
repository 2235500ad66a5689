// Light, dark or as the system says; charts draw with the same tokens.
import { signal } from "@preact/signals";

export type Theme = "auto" | "light" | "dark";
const KEY = "beamline.theme";
const ORDER: Theme[] = ["auto", "light", "dark"];

const kept = localStorage.getItem(KEY);
export const theme = signal<Theme>(kept === "light" || kept === "dark" ? kept : "auto");
/** +1 whenever colours changed. */
export const painted = signal(0);

export function startTheme(): void {
  const paint = (): void => {
    document.documentElement.dataset["theme"] = theme.peek();
    painted.value++;
  };
  theme.subscribe((value) => {
    localStorage.setItem(KEY, value);
    paint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
}

export function nextTheme(): void {
  theme.value = ORDER[(ORDER.indexOf(theme.peek()) + 1) % ORDER.length] ?? "auto";
}

/** A token as a colour a canvas takes. */
export function colour(token: string): string {
  const probe = document.createElement("span");
  probe.style.color = `var(${token})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

export const SERIES = 8;
export const seriesToken = (index: number): string => `--series-${index % SERIES}`;
