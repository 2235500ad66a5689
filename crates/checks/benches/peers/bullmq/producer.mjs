// Adds jobs and waits for their results, with a fixed number in flight. Prints one line of JSON.
//
// node producer.mjs REDIS_PORT IN_FLIGHT SECONDS
import { Queue, QueueEvents } from "bullmq";

const [port, inFlight, seconds] = process.argv.slice(2).map(Number);
const connection = { host: "127.0.0.1", port, maxRetriesPerRequest: null };
const data = { text: "x".repeat(256) };

const queue = new Queue("bench", { connection });
const events = new QueueEvents("bench", { connection });
await Promise.all([queue.waitUntilReady(), events.waitUntilReady()]);
events.setMaxListeners(0);

// Finished jobs are kept as long as BullMQ's documentation recommends for production: the newest thousand.
const options = { removeOnComplete: 1000 };

async function lane(end) {
  let done = 0;
  while (performance.now() < end) {
    const job = await queue.add("echo", data, options);
    await job.waitUntilFinished(events);
    done += 1;
  }
  return done;
}

async function round(ms) {
  const began = performance.now();
  const lanes = await Promise.all(Array.from({ length: inFlight }, () => lane(began + ms)));
  const done = lanes.reduce((sum, one) => sum + one, 0);
  return (done * 1000) / (performance.now() - began);
}

await round(500);
console.log(JSON.stringify({ per_second: await round(seconds * 1000) }));
process.exit(0);
