// What the elements share: their props, and readers of the values in them.
import { list, str, type Json } from "../json";
import type { TreeNode } from "../store";

export interface ElementProps {
  node: TreeNode;
}

const TONES = ["ok", "warn", "bad", "info", "muted"] as const;
export const tone = (value: string, or = "muted"): string =>
  (TONES as readonly string[]).includes(value) ? value : or;

export const labelsOf = (value: Json | undefined): string[] => list(value).map((item) => str(item));

export const yesNo = (value: boolean): string => (value ? "yes" : "no");
