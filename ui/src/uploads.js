// Resumable uploads (tus 1.0). What the service has is never sent twice: after a broken line the upload goes on from the
// number of bytes that it has, and so it does after a reload, once the same file is given again. Only addresses of unfinished
// uploads are remembered in the browser, never a token: an address alone opens nothing.

import { ask, Problem, refresh } from './api.js'

const PIECE = 64 * 2 ** 20
const FIRST_WAIT = 700
const LONGEST_WAIT = 20000
const KEY = 'scangraph.uploads'

function remembered() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? {}
  } catch {
    return {}
  }
}

function remember(name, value) {
  const all = remembered()
  if (value) all[name] = value
  else delete all[name]
  localStorage.setItem(KEY, JSON.stringify(all))
}

const fingerprint = (file) => `${file.name}|${file.size}|${file.lastModified}`

/** Uploads that a reload or a closed tab interrupted: [{name, size, sent}]. */
export function interrupted() {
  return Object.entries(remembered()).map(([key, { name, size, sent }]) => ({ key, name, size, sent }))
}

/** Forget an interrupted upload, and let the service forget it. */
export async function forget(key) {
  const { url } = remembered()[key] ?? {}
  remember(key, null)
  if (url) await ask(url, { method: 'DELETE', headers: { 'Tus-Resumable': '1.0.0' } }).catch(() => {})
}

const base64 = (text) => btoa(String.fromCharCode(...new TextEncoder().encode(text)))

/** One file on its way; `change` events, `state` is sending, waiting (for the line), done, failed or stopped. */
export class Upload extends EventTarget {
  state = 'sending'
  sent = 0
  fileId = null
  problem = null
  #request = null
  #wake = null

  constructor(file) {
    super()
    this.file = file
    this.key = fingerprint(file)
  }

  /** Send it to its end; never throws, `state` says how it went. */
  async run() {
    let wait = FIRST_WAIT
    while (this.state !== 'stopped') {
      const before = this.sent
      try {
        await this.#once()
        return
      } catch (problem) {
        if (this.state === 'stopped') return
        if (!(problem instanceof Problem)) throw problem
        if (problem.status === 401 && (await refresh())) continue
        if (![0, 401, 408, 409, 423, 429, 500, 502, 503, 504].includes(problem.status)) {
          remember(this.key, null)
          this.#become('failed', problem)
          return
        }
        if (this.sent > before) wait = FIRST_WAIT
        this.#become('waiting', problem)
        await new Promise((resolve) => {
          this.#wake = resolve
          setTimeout(resolve, wait)
          window.addEventListener('online', resolve, { once: true })
        })
        wait = Math.min(wait * 2, LONGEST_WAIT)
      }
    }
  }

  /** Give it up. */
  async stop() {
    this.#become('stopped')
    this.#request?.abort()
    this.#wake?.()
    await forget(this.key)
  }

  #become(state, problem = null) {
    this.state = state
    this.problem = problem
    this.dispatchEvent(new Event('change'))
  }

  async #once() {
    const headers = { 'Tus-Resumable': '1.0.0' }
    let url = remembered()[this.key]?.url
    if (url) {
      try {
        const response = await ask(url, { method: 'HEAD', headers, cache: 'no-store' })
        this.sent = Number(response.headers.get('Upload-Offset'))
        this.fileId = response.headers.get('Scangraph-File')
      } catch (problem) {
        if (![403, 404, 410].includes(problem.status)) throw problem
        url = null
      }
    }
    if (!url) {
      const metadata = `filename ${base64(this.file.name)}`
      const response = await ask('/v1/uploads', {
        method: 'POST',
        headers: { ...headers, 'Upload-Length': String(this.file.size), 'Upload-Metadata': metadata }
      })
      url = response.headers.get('Location')
      this.sent = 0
      this.fileId = response.headers.get('Scangraph-File')
      remember(this.key, { url, name: this.file.name, size: this.file.size, sent: 0 })
    }
    this.#become('sending')
    while (!this.fileId) {
      if (this.state === 'stopped') return
      await this.#send(url)
      remember(this.key, { url, name: this.file.name, size: this.file.size, sent: this.sent })
    }
    remember(this.key, null)
    this.#become('done')
  }

  /** Send a piece. Only XMLHttpRequest tells how much of a body has left. */
  #send(url) {
    return new Promise((resolve, reject) => {
      const start = this.sent
      const piece = this.file.slice(start, start + PIECE)
      const request = new XMLHttpRequest()
      this.#request = request
      request.open('PATCH', url)
      request.setRequestHeader('Tus-Resumable', '1.0.0')
      request.setRequestHeader('X-Scangraph-Page', '1')
      request.setRequestHeader('Upload-Offset', String(start))
      request.setRequestHeader('Content-Type', 'application/offset+octet-stream')
      let last = 0
      request.upload.onprogress = ({ loaded }) => {
        this.sent = start + Math.min(loaded, piece.size)
        if (Date.now() - last > 1000) {
          last = Date.now()
          remember(this.key, { url, name: this.file.name, size: this.file.size, sent: this.sent })
        }
        this.dispatchEvent(new Event('change'))
      }
      request.onload = () => {
        if (request.status < 300) {
          this.sent = Number(request.getResponseHeader('Upload-Offset'))
          this.fileId = request.getResponseHeader('Scangraph-File')
          resolve()
          return
        }
        let body = {}
        try {
          body = JSON.parse(request.responseText)
        } catch {
          // not the service's
        }
        reject(new Problem(body, request.status))
      }
      const broken = () => {
        this.sent = start
        reject(new Problem({ detail: 'The line broke; the upload goes on where it was.' }, 0))
      }
      request.onerror = broken
      request.onabort = broken
      request.send(piece)
    })
  }
}
