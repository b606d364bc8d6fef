// Vite bundles, nothing else: the page has no framework. The gateway serves what comes out of it.
import { createHash } from 'node:crypto'
import { readFileSync, readdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { brotliCompressSync, constants, gzipSync } from 'node:zlib'
import { defineConfig } from 'vite'
import { notices } from './notices.js'

/** Beside each asset its compressed copies, so that the gateway compresses nothing while somebody waits. */
function compressed() {
  return {
    name: 'compressed',
    writeBundle({ dir }) {
      const folder = join(dir, 'assets')
      for (const name of readdirSync(folder).filter((entry) => /\.(js|css|svg|txt)$/.test(entry))) {
        const bytes = readFileSync(join(folder, name))
        writeFileSync(join(folder, `${name}.gz`), gzipSync(bytes, { level: 9 }))
        writeFileSync(join(folder, `${name}.br`), brotliCompressSync(bytes, { params: { [constants.BROTLI_PARAM_QUALITY]: 10 } }))
      }
    }
  }
}

/** The licences of what is in the bundle, as a text that the page links to by its hash. */
function thirdParty() {
  const source = notices(new URL('.', import.meta.url))
  const fileName = `assets/third-party-${createHash('sha256').update(source).digest('hex').slice(0, 8)}.txt`
  return {
    name: 'third-party',
    transformIndexHtml: (html) => html.replace('%THIRD_PARTY%', `/${fileName}`),
    generateBundle() {
      this.emitFile({ type: 'asset', fileName, source })
    }
  }
}

export default defineConfig({
  // Zarr is no format of ours; its codecs are 1.4 MB of WebAssembly that the page's policy would not let run anyway.
  resolve: { alias: { zarrita: new URL('./src/no-zarr.js', import.meta.url).pathname } },
  plugins: [thirdParty(), compressed()],
  build: {
    outDir: '../deployments/gateway/page',
    emptyOutDir: true,
    assetsInlineLimit: 0, // the policy knows no data: scripts, and everything else has an address
    modulePreload: { polyfill: false },
    target: 'es2022',
    chunkSizeWarningLimit: 1200
  }
})
