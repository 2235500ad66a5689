import { defineConfig } from "vite";

export default defineConfig({
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  build: {
    target: "es2022",
    // The content security policy forbids inline scripts, inline styles and data: URLs.
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
