// The service's HTTP interface. Who asks is in cookies that no script can read; the header shows that it was this page.

const PAGE = { 'X-Scangraph-Page': '1' }

/** An error that the service explained (RFC 9457), or the line that broke (status 0). */
export class Problem extends Error {
  constructor(body, status) {
    super(body.detail || body.title || `The service answered ${status}`)
    this.name = 'Problem'
    this.title = body.title ?? ''
    this.status = status
    this.code = String(body.type ?? '').split(':').pop()
    this.errors = body.errors ?? []
    this.traceId = body.trace_id ?? null
  }
}

/** Make a problem of an answer that is none we wanted. */
export async function problemOf(response) {
  let body = {}
  try {
    body = JSON.parse(await response.text())
  } catch {
    // a proxy's answer, not the service's
  }
  return new Problem(body, response.status)
}

const OFFLINE = { title: 'The service cannot be reached', detail: 'The service cannot be reached. It is tried again; nothing is lost.' }

let refreshing = null
let signedOut = () => {}

/** Have something done when the session has ended. */
export function onSignedOut(listener) {
  signedOut = listener
}

/** Change the session's token for a new one; many who ask at once are answered by one request. */
export function refresh() {
  refreshing ??= fetch('/v1/auth/session/refresh', { method: 'POST', headers: PAGE })
    .then((response) => response.ok)
    .catch(() => null)
    .finally(() => setTimeout(() => (refreshing = null), 0))
  return refreshing
}

/**
 * Ask, and return the response; a `Problem` is thrown for everything but success.
 *
 * @param {string} path
 * @param {object} [options] fetch's, and `json` for a body, `again` for whether a lost session is renewed once
 */
export async function ask(path, { json, again = true, headers = {}, ...options } = {}) {
  const all = { ...PAGE, ...headers }
  if (json !== undefined) {
    all['Content-Type'] = 'application/json'
    options = { method: 'POST', ...options, body: JSON.stringify(json) }
  }
  let response
  try {
    response = await fetch(path, { ...options, headers: all })
  } catch (error) {
    if (error.name === 'AbortError') throw error
    throw new Problem(OFFLINE, 0)
  }
  if (response.status === 401 && again) {
    const renewed = await refresh()
    if (renewed) return ask(path, { json, again: false, headers, ...options })
    if (renewed === null) throw new Problem(OFFLINE, 0)
    signedOut()
  }
  if (!response.ok) throw await problemOf(response)
  return response
}

/** Ask for JSON. */
export async function get(path, options) {
  return (await ask(path, options)).json()
}

/** Ask for all pages of a list. */
export async function getAll(path) {
  const items = []
  let cursor = null
  do {
    const url = new URL(path, location.origin)
    if (cursor) url.searchParams.set('cursor', cursor)
    const page = await get(url.pathname + url.search)
    items.push(...page.items)
    cursor = page.next_cursor ?? null
  } while (cursor)
  return items
}

/** Ask for a file's bytes, inflated where they are gzip; `onProgress(part)` hears 0 to 1. */
export async function getBytes(path, { signal, onProgress } = {}) {
  const response = await ask(path, { signal })
  const whole = Number(response.headers.get('Content-Length')) || 0
  let seen = 0
  const counted = response.body.pipeThrough(
    new TransformStream({
      transform(chunk, out) {
        seen += chunk.byteLength
        if (whole) onProgress?.(Math.min(seen / whole, 1))
        out.enqueue(chunk)
      }
    })
  )
  const bytes = await new Response(counted).arrayBuffer()
  const head = new Uint8Array(bytes, 0, Math.min(2, bytes.byteLength))
  if (head[0] !== 0x1f || head[1] !== 0x8b) return bytes
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'))).arrayBuffer()
}
