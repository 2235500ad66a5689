// A parser for the Markdown that answers use. It creates elements and never HTML text, so answers cannot inject markup.
import type { ComponentChildren, VNode } from "preact";
import { useState } from "preact/hooks";
import { safeHref } from "./href";
import { Icon } from "./icons";
import { Sideways } from "./sideways";

export type Inline =
  | { type: "text" | "bold" | "italic" | "code" | "strike"; text: string; children?: Inline[] }
  | { type: "link"; href: string; children: Inline[] }
  | { type: "break" };

export type Block =
  | { type: "paragraph" | "quote"; children: Inline[] }
  | { type: "heading"; level: number; children: Inline[] }
  | { type: "code"; lang: string; text: string }
  | { type: "list"; ordered: boolean; start: number; items: { depth: number; children: Inline[] }[] }
  | { type: "table"; head: Inline[][]; align: string[]; rows: Inline[][][] }
  | { type: "rule" };

const FENCE = /^\s*(`{3,}|~{3,})\s*([\w+-]*)\s*$/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const RULE = /^\s*([-*_])(\s*\1){2,}\s*$/;

export function parseBlocks(source: string): Block[] {
  const lines = source.replace(/\r\n?/g, "\n").split("\n");
  const blocks: Block[] = [];
  let paragraph: string[] = [];
  const flush = (): void => {
    if (paragraph.length > 0) blocks.push({ type: "paragraph", children: inlineLines(paragraph) });
    paragraph = [];
  };

  for (let at = 0; at < lines.length;) {
    const parsed = blockAt(lines, at);
    const line = lines[at] ?? "";
    if (parsed || line.trim() === "") flush();
    else paragraph.push(line);
    if (parsed) blocks.push(parsed.block);
    at = parsed?.next ?? at + 1;
  }
  flush();
  return blocks;
}

/** A block and the index of the line after it. */
interface Parsed {
  block: Block;
  next: number;
}

/** Returns the block that starts at a line, or null if that line is blank or belongs to a paragraph. */
function blockAt(lines: string[], at: number): Parsed | null {
  for (const parse of [fenced, heading, rule, table, list, quote]) {
    const parsed = parse(lines, at);
    if (parsed) return parsed;
  }
  return null;
}

function fenced(lines: string[], at: number): Parsed | null {
  const fence = FENCE.exec(lines[at] ?? "");
  if (!fence) return null;
  const mark = fence[1] ?? "```";
  // In an answer that is still streaming, an unclosed fence runs to the end.
  const end = endOf(lines, at + 1, (line) => !line.trim().startsWith(mark));
  return { block: { type: "code", lang: fence[2] ?? "", text: lines.slice(at + 1, end).join("\n") }, next: end + 1 };
}

function heading(lines: string[], at: number): Parsed | null {
  const found = HEADING.exec(lines[at] ?? "");
  if (!found) return null;
  const level = (found[1] ?? "#").length;
  return { block: { type: "heading", level, children: inline(withoutEnd(found[2] ?? "")) }, next: at + 1 };
}

function rule(lines: string[], at: number): Parsed | null {
  return RULE.test(lines[at] ?? "") ? { block: { type: "rule" }, next: at + 1 } : null;
}

function table(lines: string[], at: number): Parsed | null {
  const [top = "", under = ""] = [lines[at], lines[at + 1]];
  if (!top.includes("|") || !TABLE_RULE.test(under) || !under.includes("-")) return null;
  const row = (line: string): Inline[][] => cells(line).map((cell) => inline(cell));
  const align = cells(under).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
  const next = endOf(lines, at + 2, (line) => line.includes("|"));
  return { block: { type: "table", head: row(top), align, rows: lines.slice(at + 2, next).map(row) }, next };
}

function list(lines: string[], at: number): Parsed | null {
  const first = ITEM.exec(lines[at] ?? "");
  if (!first) return null;
  const ordered = first[2] !== undefined;
  const items: { depth: number; children: Inline[] }[] = [];
  const next = endOf(lines, at, (line) => {
    const item = ITEM.exec(line);
    if (!item || (item[2] !== undefined) !== ordered) return false;
    items.push({ depth: Math.min(4, Math.floor((item[1] ?? "").length / 2)), children: inline(item[3] ?? "") });
    return true;
  });
  return { block: { type: "list", ordered, start: Number(first[2] ?? 1), items }, next };
}

function quote(lines: string[], at: number): Parsed | null {
  const next = endOf(lines, at, (line) => line.startsWith(">"));
  if (next === at) return null;
  const quoted = lines.slice(at, next).map((line) => line.replace(/^>\s?/, ""));
  return { block: { type: "quote", children: inlineLines(quoted) }, next };
}

/** The index of the first line from `at` on that does not belong, or the number of lines. */
function endOf(lines: string[], at: number, belongs: (line: string) => boolean): number {
  let end = at;
  while (end < lines.length && belongs(lines[end] ?? "")) end++;
  return end;
}

/** Strips the hashes that may close a heading. A regular expression would backtrack over long lines. */
function withoutEnd(heading: string): string {
  let end = heading.trimEnd().length;
  while (heading[end - 1] === "#") end--;
  return end === 0 || heading[end - 1] === " " ? heading.slice(0, end).trimEnd() : heading.trimEnd();
}

function cells(line: string): string[] {
  return line
    .trim()
    .replace(/^\||\|$/g, "")
    .split("|")
    .map((cell) => cell.trim());
}

function inlineLines(lines: string[]): Inline[] {
  return lines.flatMap((line, i) => (i === 0 ? inline(line) : [{ type: "break" } as const, ...inline(line)]));
}

// All lengths are bounded, so that a text full of opening marks without closing ones does not take quadratic time.
const CODE = /`([^`]{1,4000})`/;
const LINK = /\[([^[\]]{1,500})\]\(([^()\s]{1,2000})\)/;
const BARE_URL = /(https?:\/\/[^\s<>)]+[^\s<>).,;:!?'"])/;
const BOLD = /\*\*([^*](?:.{0,4000}?[^*])?)\*\*/;
const STRIKE = /~~(.{1,4000}?)~~/;
const ITALIC = /\*([^*\s](?:[^*]{0,4000}[^*\s])?)\*|(?<![\w])_([^_\s](?:[^_]{0,4000}[^_\s])?)_(?![\w])/;
const INLINE = new RegExp([CODE, LINK, BARE_URL, BOLD, STRIKE, ITALIC].map((mark) => mark.source).join("|"));
const DEEPEST = 6;

export function inline(text: string, depth = 0): Inline[] {
  if (depth > DEEPEST) return [{ type: "text", text }];
  const out: Inline[] = [];
  let rest = text;
  while (rest !== "") {
    const found = INLINE.exec(rest);
    if (!found) break;
    if (found.index > 0) out.push({ type: "text", text: rest.slice(0, found.index) });

    const [all, code, label, href, bare, bold, strike, star, under] = found;
    if (code !== undefined) out.push({ type: "code", text: code });
    else if (label !== undefined && href !== undefined) {
      const to = safeHref(href);
      if (to) out.push({ type: "link", href: to, children: inline(label, depth + 1) });
      else out.push({ type: "text", text: all });
    } else if (bare !== undefined) out.push({ type: "link", href: bare, children: [{ type: "text", text: bare }] });
    else if (bold !== undefined) out.push({ type: "bold", text: bold, children: inline(bold, depth + 1) });
    else if (strike !== undefined) out.push({ type: "strike", text: strike, children: inline(strike, depth + 1) });
    else out.push({ type: "italic", text: star ?? under ?? "", children: inline(star ?? under ?? "", depth + 1) });

    rest = rest.slice(found.index + all.length);
  }
  if (rest !== "") out.push({ type: "text", text: rest });
  return out;
}

export function Markdown({ text, tail }: { text: string; tail?: ComponentChildren }) {
  const blocks = parseBlocks(text);
  return (
    <div class="markdown">
      {blocks.map((block, i) => (
        <BlockView key={i} block={block} tail={i === blocks.length - 1 ? tail : undefined} />
      ))}
      {blocks.length === 0 && tail}
    </div>
  );
}

function BlockView({ block, tail }: { block: Block; tail?: ComponentChildren }): VNode {
  switch (block.type) {
    case "paragraph":
      return (
        <p>
          {inlines(block.children)}
          {tail}
        </p>
      );
    case "quote":
      return (
        <blockquote>
          {inlines(block.children)}
          {tail}
        </blockquote>
      );
    case "heading": {
      const Tag = `h${Math.min(6, block.level + 2)}` as "h3" | "h4" | "h5" | "h6";
      return (
        <Tag>
          {inlines(block.children)}
          {tail}
        </Tag>
      );
    }
    case "code":
      return (
        <>
          <CodeBlock lang={block.lang} text={block.text} />
          {tail}
        </>
      );
    case "rule":
      return <hr />;
    case "list": {
      const Tag = block.ordered ? "ol" : "ul";
      return (
        <Tag {...(block.ordered ? { start: block.start } : {})}>
          {block.items.map((item, i) => (
            <li key={i} class={`depth-${item.depth}`}>
              {inlines(item.children)}
              {i === block.items.length - 1 && tail}
            </li>
          ))}
        </Tag>
      );
    }
    case "table":
      return (
        <>
          <TableView table={block} />
          {tail}
        </>
      );
  }
}

function TableView({ table: { head, align, rows } }: { table: Extract<Block, { type: "table" }> }) {
  const side = (column: number): string => `align-${align[column] ?? "left"}`;
  return (
    <Sideways>
      <table>
        <thead>
          <tr>
            {head.map((cell, i) => (
              <th key={i} class={side(i)}>
                {inlines(cell)}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map((row, i) => (
            <tr key={i}>
              {row.map((cell, j) => (
                <td key={j} class={side(j)}>
                  {inlines(cell)}
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </Sideways>
  );
}

function inlines(parts: Inline[]): ComponentChildren {
  return parts.map((part, i) => {
    switch (part.type) {
      case "text":
        return part.text;
      case "break":
        return <br key={i} />;
      case "code":
        return <code key={i}>{part.text}</code>;
      case "bold":
        return <strong key={i}>{inlines(part.children ?? [])}</strong>;
      case "italic":
        return <em key={i}>{inlines(part.children ?? [])}</em>;
      case "strike":
        return <s key={i}>{inlines(part.children ?? [])}</s>;
      case "link":
        return (
          <a
            key={i}
            href={part.href}
            {...(part.href.startsWith("/") ? {} : { target: "_blank", rel: "noopener noreferrer" })}
          >
            {inlines(part.children)}
          </a>
        );
    }
  });
}

export function CodeBlock({ text, lang }: { text: string; lang: string }) {
  const [copied, setCopied] = useState(false);
  const copy = (): void => {
    void navigator.clipboard?.writeText(text).then(() => {
      setCopied(true);
      setTimeout(() => setCopied(false), 1500);
    });
  };
  return (
    <div class="code-block">
      <div class="code-head">
        <span>{lang || "text"}</span>
        <button type="button" class="ghost small" onClick={copy} aria-label="Copy code">
          <Icon name="copy" /> {copied ? "Copied" : "Copy"}
        </button>
      </div>
      <pre tabIndex={0}>
        <code>{text}</code>
      </pre>
    </div>
  );
}
