import { defineConfig } from "vite";

export default defineConfig({
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  build: {
    target: "es2022",
    // The page is served under a policy that allows no inline script, style or data: address.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
  },
  server: {
    proxy: {
      "/auth": "http://127.0.0.1:8000",
      "/connection": { target: "ws://127.0.0.1:8000", ws: true },
    },
  },
});
