// Answers contain untrusted text, which must become elements whatever it says.
import { describe, expect, it } from "vitest";
import renderToString from "preact-render-to-string";
import { safeHref } from "../../src/href";
import { inline, Markdown, parseBlocks } from "../../src/markdown";

const html = (text: string): string => renderToString(<Markdown text={text} />);
const inner = (text: string): string => html(text).replace(/^<div class="markdown">|<\/div>$/g, "");

describe("renders", () => {
  const check = (text: string, expected: string): void => expect(inner(text)).toBe(expected);

  it("paragraphs and line breaks", () => {
    check("a\nb\n\nc", "<p>a<br/>b</p><p>c</p>");
    check("a\r\nb", "<p>a<br/>b</p>");
    check("", "");
  });

  it("bold, italic, strikethrough and code, also nested", () => {
    check("**b** *i* _u_ ~~s~~ `c`", "<p><strong>b</strong> <em>i</em> <em>u</em> <s>s</s> <code>c</code></p>");
    check("**a `b` *c* d**", "<p><strong>a <code>b</code> <em>c</em> d</strong></p>");
    check("`**no**`", "<p><code>**no**</code></p>");
    check("snake_case_name and 2*3*4", "<p>snake_case_name and 2<em>3</em>4</p>");
    check("a ** b", "<p>a ** b</p>");
  });

  it("headings, rules and quotes", () => {
    check("## A # in C#", "<h4>A # in C#</h4>");
    check("# One\n### Three #\n---\n> q\n> r", "<h3>One</h3><h5>Three</h5><hr/><blockquote>q<br/>r</blockquote>");
  });

  it("lists, numbered from their first number and nested by depth", () => {
    check("- a\n  - b\n- c", '<ul><li class="depth-0">a</li><li class="depth-1">b</li><li class="depth-0">c</li></ul>');
    check("3. a\n4. b", '<ol start="3"><li class="depth-0">a</li><li class="depth-0">b</li></ol>');
  });

  it("tables with alignment", () => {
    const [table] = parseBlocks("| a | b |\n|:--|--:|\n| 1 | `2` |\n\nafter");
    expect(table).toMatchObject({
      type: "table",
      align: ["left", "right"],
      rows: [[[{ text: "1" }], [{ type: "code", text: "2" }]]],
    });
    expect(html("| a | b |\n|:--|--:|\n| 1 | 2 |")).toContain('<td class="align-right">2</td>');
  });

  it("code blocks verbatim, also unclosed ones of a streaming answer", () => {
    expect(parseBlocks('```rust\nlet a = "<b>";\n\n# no heading\n```\nafter')).toMatchObject([
      { type: "code", lang: "rust", text: 'let a = "<b>";\n\n# no heading' },
      { type: "paragraph" },
    ]);
    expect(parseBlocks("text\n```\nhalf")).toMatchObject([
      { type: "paragraph" },
      { type: "code", lang: "", text: "half" },
    ]);
  });

  it("named and bare links, without the punctuation after them", () => {
    check(
      "[docs](https://a.test/x) see https://b.test/y.",
      '<p><a href="https://a.test/x" target="_blank" rel="noopener noreferrer">docs</a> see <a href="https://b.test/y" target="_blank" rel="noopener noreferrer">https://b.test/y</a>.</p>',
    );
    check("[here](/console?tab=1)", '<p><a href="/console?tab=1">here</a></p>');
  });
});

describe("never runs anything", () => {
  it.each([
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a <b onclick='x'>b</b>",
    "`<script>`",
    "```html\n<script>alert(1)</script>\n```",
    "# <svg/onload=alert(1)>",
    "| <script> | b |\n|---|---|\n| <iframe src=x> | 2 |",
    "- <script>\n> <script>",
    '[x](https://a.test/"onmouseover="alert(1))',
    "**<script>**",
  ])("%s", (text) => {
    const out = html(text);
    expect(out).not.toMatch(/<(script|img|iframe|svg\/|b )/);
    expect(out).not.toMatch(/<[^>]*\son(error|click|load|mouseover)=/);
  });

  it.each([
    "javascript:alert(1)",
    "JaVaScRiPt:alert(1)",
    "data:text/html,x",
    "vbscript:x",
    "//evil.test/x",
    "file:///etc/passwd",
    " javascript:alert(1)",
    "java\tscript:alert(1)",
  ])("does not link to %s", (href) => {
    expect(safeHref(href)).toBeNull();
    expect(html(`[x](${href})`)).not.toContain("<a");
  });

  it.each(["https://a.test", "http://a.test/b?c=d#e", "mailto:a@b.test", "/rooms/1", "#part"])(
    "a link to %s",
    (href) => {
      expect(safeHref(href)).toBe(href);
    },
  );
});

describe("stays fast on input built to be slow", () => {
  it.each([
    ["stars", "*".repeat(20_000)],
    ["opening stars", "**a ".repeat(4_000)],
    ["underscores", "_a".repeat(8_000)],
    ["brackets", "[".repeat(16_000)],
    ["half links", "[a](".repeat(4_000)],
    ["backticks", "`".repeat(16_000)],
    ["tildes", "~~a".repeat(5_000)],
    ["pipes", `${"|".repeat(8_000)}\n${"|-".repeat(4_000)}`],
    ["a rule that is none", `${"- ".repeat(8_000)}x`],
    ["a table rule that is none", `a|b\n${"-|".repeat(6_000)}x`],
    ["dashes", `a|b\n${"-".repeat(16_000)}x`],
    ["a heading of hashes", `# ${"#".repeat(16_000)}x`],
    ["a heading of spaces", `# a${" ".repeat(16_000)}x`],
    ["one long address", `https://${"a.".repeat(8_000)}`],
    ["nested bold", "**a *b ".repeat(2_000)],
    ["deep nesting", `${"**~~".repeat(4_000)}x${"~~**".repeat(4_000)}`],
    ["deep links", `${"[**".repeat(4_000)}x${"**](/a)".repeat(4_000)}`],
    ["half bold", "**a*".repeat(4_000)],
  ])("%s", (_name, text) => {
    // Measure CPU time instead of wall-clock time, because the machine may be busy.
    const started = process.cpuUsage();
    parseBlocks(text);
    expect(process.cpuUsage(started).user).toBeLessThan(250_000);
  });
});

it("plain text stays one piece", () => {
  expect(inline("just words, 3 < 4 & so on")).toEqual([{ type: "text", text: "just words, 3 < 4 & so on" }]);
});
