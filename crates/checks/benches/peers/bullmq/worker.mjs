// One worker process: returns each job's data, as Beamline's echo provider does.
//
// node worker.mjs REDIS_PORT CONCURRENCY
import { Worker } from "bullmq";

const [port, concurrency] = process.argv.slice(2).map(Number);
const connection = { host: "127.0.0.1", port, maxRetriesPerRequest: null };

const worker = new Worker("bench", async (job) => job.data, { connection, concurrency });
await worker.waitUntilReady();
console.log("ready");
