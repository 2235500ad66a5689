// A parser for the Markdown that answers use. It creates elements and never HTML text, so answers cannot inject markup.
import type { ComponentChildren, VNode } from "preact";
import { useState } from "preact/hooks";
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

  for (let i = 0; i < lines.length; i++) {
    const line = lines[i] ?? "";
    const fence = FENCE.exec(line);
    if (fence) {
      flush();
      const mark = fence[1] ?? "```";
      const code: string[] = [];
      // In an answer that is still streaming, an unclosed fence runs to the end.
      while (++i < lines.length && !(lines[i] ?? "").trim().startsWith(mark)) code.push(lines[i] ?? "");
      blocks.push({ type: "code", lang: fence[2] ?? "", text: code.join("\n") });
      continue;
    }

    if (line.trim() === "") {
      flush();
      continue;
    }

    const heading = HEADING.exec(line);
    if (heading) {
      flush();
      blocks.push({ type: "heading", level: (heading[1] ?? "#").length, children: inline(withoutEnd(heading[2] ?? "")) });
      continue;
    }

    if (RULE.test(line)) {
      flush();
      blocks.push({ type: "rule" });
      continue;
    }

    if (line.includes("|") && TABLE_RULE.test(lines[i + 1] ?? "") && (lines[i + 1] ?? "").includes("-")) {
      flush();
      const head = cells(line).map((cell) => inline(cell));
      const align = cells(lines[i + 1] ?? "").map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
      const rows: Inline[][][] = [];
      i += 2;
      for (; i < lines.length && (lines[i] ?? "").includes("|"); i++) rows.push(cells(lines[i] ?? "").map((cell) => inline(cell)));
      i--;
      blocks.push({ type: "table", head, align, rows });
      continue;
    }

    const item = ITEM.exec(line);
    if (item) {
      flush();
      const ordered = item[2] !== undefined;
      const items: { depth: number; children: Inline[] }[] = [];
      for (; i < lines.length; i++) {
        const next = ITEM.exec(lines[i] ?? "");
        if (!next || (next[2] !== undefined) !== ordered) break;
        items.push({ depth: Math.min(4, Math.floor((next[1] ?? "").length / 2)), children: inline(next[3] ?? "") });
      }
      i--;
      blocks.push({ type: "list", ordered, start: Number(item[2] ?? 1), items });
      continue;
    }

    if (line.startsWith(">")) {
      flush();
      const quoted: string[] = [];
      for (; i < lines.length && (lines[i] ?? "").startsWith(">"); i++) quoted.push((lines[i] ?? "").replace(/^>\s?/, ""));
      i--;
      blocks.push({ type: "quote", children: inlineLines(quoted) });
      continue;
    }

    paragraph.push(line);
  }
  flush();
  return blocks;
}

/** Strips the hashes that may close a heading. A regular expression would backtrack over long lines. */
function withoutEnd(heading: string): string {
  let end = heading.trimEnd().length;
  while (heading[end - 1] === "#") end--;
  return end === 0 || heading[end - 1] === " " ? heading.slice(0, end).trimEnd() : heading.trimEnd();
}

function cells(line: string): string[] {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

function inlineLines(lines: string[]): Inline[] {
  return lines.flatMap((line, i) => (i === 0 ? inline(line) : [{ type: "break" } as const, ...inline(line)]));
}

// In order: code, link, bare URL, bold, strikethrough, italic. All lengths are bounded, so that a text full of opening
// marks without closing ones does not take quadratic time.
const INLINE =
  /`([^`]{1,4000})`|\[([^[\]]{1,500})\]\(([^()\s]{1,2000})\)|(https?:\/\/[^\s<>)]+[^\s<>).,;:!?'"])|\*\*([^*](?:.{0,4000}?[^*])?)\*\*|~~(.{1,4000}?)~~|\*([^*\s](?:[^*]{0,4000}[^*\s])?)\*|(?<![\w])_([^_\s](?:[^_]{0,4000}[^_\s])?)_(?![\w])/;
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

/** Returns the address if it cannot run code (http, https, mailto, a path or a fragment), else null. */
export function safeHref(href: string): string | null {
  return /^(https?:\/\/|mailto:|\/(?!\/)|#)/i.test(href) ? href : null;
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
      return <p>{inlines(block.children)}{tail}</p>;
    case "quote":
      return <blockquote>{inlines(block.children)}{tail}</blockquote>;
    case "heading": {
      const Tag = `h${Math.min(6, block.level + 2)}` as "h3" | "h4" | "h5" | "h6";
      return <Tag>{inlines(block.children)}{tail}</Tag>;
    }
    case "code":
      return <><CodeBlock lang={block.lang} text={block.text} />{tail}</>;
    case "rule":
      return <hr />;
    case "list": {
      const Tag = block.ordered ? "ol" : "ul";
      return (
        <Tag {...(block.ordered ? { start: block.start } : {})}>
          {block.items.map((item, i) => (
            <li key={i} class={`depth-${item.depth}`}>{inlines(item.children)}{i === block.items.length - 1 && tail}</li>
          ))}
        </Tag>
      );
    }
    case "table":
      return (
        <>
          <Sideways>
            <table>
              <thead><tr>{block.head.map((cell, i) => <th key={i} class={`align-${block.align[i] ?? "left"}`}>{inlines(cell)}</th>)}</tr></thead>
              <tbody>
                {block.rows.map((row, i) => (
                  <tr key={i}>{row.map((cell, j) => <td key={j} class={`align-${block.align[j] ?? "left"}`}>{inlines(cell)}</td>)}</tr>
                ))}
              </tbody>
            </table>
          </Sideways>
          {tail}
        </>
      );
  }
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
          <a key={i} href={part.href} {...(part.href.startsWith("/") ? {} : { target: "_blank", rel: "noopener noreferrer" })}>
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
      <pre tabIndex={0}><code>{text}</code></pre>
    </div>
  );
}
