// The colour theme: light, dark or that of the system. The style sheet derives all colours from an attribute.
import { signal } from "@preact/signals";

export type Theme = "auto" | "light" | "dark";
const KEY = "beamline.theme";
const ORDER: Theme[] = ["auto", "light", "dark"];

const kept = localStorage.getItem(KEY);
export const theme = signal<Theme>(kept === "light" || kept === "dark" ? kept : "auto");

export function startTheme(): void {
  theme.subscribe((value) => {
    localStorage.setItem(KEY, value);
    document.documentElement.dataset["theme"] = value;
  });
}

export function nextTheme(): void {
  theme.value = ORDER[(ORDER.indexOf(theme.peek()) + 1) % ORDER.length] ?? "auto";
}
