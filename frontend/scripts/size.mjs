// Checks the gzipped size of the whole page, which a phone on a slow connection has to load first.
import { readdirSync, statSync } from "node:fs";
import { join } from "node:path";

const LIMIT = 60 * 1024;
const dist = new URL("../dist/", import.meta.url).pathname;
let total = 0;
for (const name of readdirSync(dist, { recursive: true })) {
  if (!name.endsWith(".gz")) continue;
  const size = statSync(join(dist, name)).size;
  total += size;
  console.log(`${String(size).padStart(7)}  ${name}`);
}
console.log(`${String(total).padStart(7)}  of ${LIMIT}`);
if (total === 0) {
  console.error("dist is empty: run npm run build first");
  process.exit(1);
}
if (total > LIMIT) {
  console.error("the page is too large: drop a dependency, or load part of the code later");
  process.exit(1);
}
