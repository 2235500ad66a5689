// The whole page, gzipped, must stay under this: it is the first thing a phone on a slow line waits for.
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
  console.error("nothing built: run npm run build");
  process.exit(1);
}
if (total > LIMIT) {
  console.error("too large: drop a dependency or split it off");
  process.exit(1);
}
