import { defineConfig } from "vitest/config";

export default defineConfig({
  test: {
    include: ["test/browser/**/*.test.ts"],
    environment: "node",
    fileParallelism: false,
    bail: 1,
    testTimeout: 120_000,
    hookTimeout: 60_000,
  },
});
