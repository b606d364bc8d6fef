import { defineConfig } from 'vite'

export default defineConfig({
  base: '/bare/',
  resolve: { alias: { zarrita: new URL('../src/no-zarr.js', import.meta.url).pathname } },
  build: { target: 'es2022', modulePreload: { polyfill: false }, chunkSizeWarningLimit: 1200 }
})
