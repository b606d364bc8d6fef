// Live progress. One WebSocket for everything that is watched; each execution has the number that was seen last, so a broken
// line, a sleeping laptop or another replica costs nothing: what came meanwhile is told again from there. While there is no
// line, executions are asked for instead.

import { get, refresh } from './api.js'

const FIRST_WAIT = 500
const LONGEST_WAIT = 15000
const POLL = 3000
/** A line that is not there by then hangs somewhere on its way, and another one is tried. */
const HANDSHAKE = 6000
/** A line that says nothing for so long is asked for a sign of life, and after as long again it is taken for dead. */
const SILENCE = 20000

/** The line to the service; `state` events say `live`, `polling` or `offline`. */
export class Live extends EventTarget {
  #watched = new Map() // execution id -> {seq, listeners, ended}
  #socket = null
  #wait = FIRST_WAIT
  #retry = null
  #poll = null
  #heard = 0
  #pulse = null
  state = 'offline'

  /**
   * Hear of an execution: `listener({type: 'snapshot', execution})`, then `progress`, `error`, `cancelled` events as they come.
   *
   * @returns {Function} ends it
   */
  watch(id, listener) {
    const entry = this.#watched.get(id) ?? { seq: null, listeners: new Set() }
    entry.listeners.add(listener)
    this.#watched.set(id, entry)
    if (this.#open()) this.#ask(id, entry)
    else this.#connect()
    return () => {
      entry.listeners.delete(listener)
      if (entry.listeners.size === 0) {
        this.#watched.delete(id)
        if (this.#open()) this.#say({ type: 'unwatch', execution_id: id })
        if (this.#watched.size === 0) this.close()
      }
    }
  }

  /** End the line; it is made anew when something is watched. */
  close() {
    clearTimeout(this.#retry)
    clearInterval(this.#poll)
    clearInterval(this.#pulse)
    this.#retry = this.#poll = this.#pulse = null
    this.#socket?.close()
    this.#socket = null
  }

  #open() {
    return this.#socket?.readyState === WebSocket.OPEN && this.#socket.accepted
  }

  #say(message) {
    this.#socket.send(JSON.stringify(message))
  }

  #ask(id, entry) {
    this.#say({ type: 'watch', execution_id: id, ...(entry.seq === null ? {} : { seq: entry.seq }) })
  }

  #become(state) {
    if (state === this.state) return
    this.state = state
    this.dispatchEvent(new CustomEvent('state', { detail: state }))
  }

  #connect() {
    if (this.#socket || this.#retry) return
    const socket = new WebSocket(`${location.origin.replace(/^http/, 'ws')}/v1/ws`)
    this.#socket = socket
    setTimeout(() => this.#socket === socket && !socket.accepted && this.#drop(socket), HANDSHAKE)
    socket.onopen = () => socket.send(JSON.stringify({ type: 'auth' }))
    socket.onmessage = ({ data }) => {
      if (this.#socket !== socket) return
      this.#heard = Date.now()
      this.#hear(JSON.parse(data), socket)
    }
    socket.onclose = ({ code }) => {
      if (this.#socket === socket) this.#lost(code)
    }
  }

  #hear(message, socket) {
    if (message.type === 'auth_ok') {
      socket.accepted = true
      this.#wait = FIRST_WAIT
      clearInterval(this.#poll)
      this.#poll = null
      this.#become('live')
      for (const [id, entry] of this.#watched) this.#ask(id, entry)
      clearInterval(this.#pulse)
      this.#pulse = setInterval(() => this.#feel(socket), SILENCE)
      return
    }
    const entry = this.#watched.get(message.execution_id)
    if (!entry) return
    if (message.type === 'problem') {
      // The number that we know is not known there (another database): begin anew, once.
      if (entry.seq !== null) {
        entry.seq = null
        this.#ask(message.execution_id, entry)
      }
      return
    }
    if (message.type === 'watching' || message.type === 'unwatched') return
    if (typeof message.seq === 'number') {
      if (message.type !== 'snapshot' && entry.seq !== null && message.seq <= entry.seq) return
      entry.seq = message.seq
    }
    for (const listener of entry.listeners) listener(message)
  }

  #feel(socket) {
    const silent = Date.now() - this.#heard
    if (silent > 2 * SILENCE) this.#drop(socket)
    else if (silent > SILENCE / 2) this.#say({ type: 'ping' })
  }

  /** Take a line for dead; closing it properly would wait for an answer. */
  #drop(socket) {
    socket.onclose = null
    socket.close()
    this.#lost(0)
  }

  async #lost(code) {
    this.#socket = null
    clearInterval(this.#pulse)
    if (this.#watched.size === 0) return
    this.#become('polling')
    this.#poll ??= setInterval(() => this.#look(), POLL)
    if (code === 4401) await refresh()
    const wait = this.#wait * (0.75 + Math.random() / 2)
    this.#wait = Math.min(this.#wait * 2, LONGEST_WAIT)
    this.#retry = setTimeout(() => {
      this.#retry = null
      if (this.#watched.size) this.#connect()
    }, wait)
  }

  /** Ask for what nobody tells. */
  async #look() {
    for (const [id, entry] of [...this.#watched]) {
      if (this.#open()) return
      try {
        const execution = await get(`/v1/executions/${id}`)
        if (this.#open()) return // the line came back meanwhile, and tells more
        this.#become('polling')
        for (const listener of entry.listeners) listener({ type: 'snapshot', execution_id: id, execution, polled: true })
      } catch (problem) {
        if (problem.status === 0 && !this.#open()) this.#become('offline')
      }
    }
  }
}

/** Put an event into what is known of an execution, and return it anew. */
export function merge(view, message) {
  if (message.type === 'snapshot') return message.execution
  const details = message.step_details ?? {}
  return {
    ...view,
    status: message.status,
    current_step: message.current_step,
    progress_percentage: message.progress_percentage,
    started_at: view.started_at ?? (message.status === 'running' ? message.at : null),
    queue_position: message.status === 'pending' ? view.queue_position : null,
    error: message.error ?? view.error,
    output_files: message.output_files ?? view.output_files,
    steps: view.steps.map((step) => ({ ...step, ...(details[step.step_id] ?? {}) }))
  }
}

export const TERMINAL = new Set(['completed', 'failed', 'cancelled'])
