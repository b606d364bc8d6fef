// Which page: `/` or `/executions/{id}`. Both are one document, so going from one to the other loads nothing anew.

import { button, el, fill, icon } from './dom.js'
import { Live } from './live.js'
import { me, resume, signIn, signOut, watchSession } from './session.js'

const main = document.getElementById('main')
const live = new Live()
let leave = () => {}

/** Go to another page of this document. */
function go(path) {
  history.pushState(null, '', path)
  show()
}

/** What a page is given. */
const shell = {
  live,
  go,
  title: (...children) => fill(document.getElementById('title'), ...children),
  actions: (...children) => fill(document.getElementById('actions'), ...children),
  keys: new Map()
}

async function show() {
  leave()
  leave = () => {}
  shell.title()
  shell.actions()
  shell.keys = new Map()
  document.documentElement.removeAttribute('data-ready')
  const found = location.pathname.match(/^\/executions\/([\w-]+)$/)
  document.body.dataset.page = found ? 'execution' : 'start'
  try {
    if (found) {
      const { executionPage } = await import('./execution-page.js')
      leave = await executionPage(main, found[1], shell)
    } else {
      const { startPage } = await import('./start-page.js')
      leave = await startPage(main, shell)
    }
  } catch (problem) {
    fill(main, el('div.card.failed', { role: 'alert' }, el('h1', {}, problem.status === 404 ? 'There is nothing here' : 'That did not work'), el('p', {}, problem.message), problem.traceId ? el('p.quiet.small', {}, `trace ${problem.traceId}`) : null, el('p', {}, el('a', { href: '/' }, 'All executions'))))
    if (!('status' in problem)) console.error(problem)
  }
  requestAnimationFrame(() => requestAnimationFrame(() => document.documentElement.setAttribute('data-ready', document.body.dataset.page)))
}

function account() {
  const place = document.getElementById('account')
  if (!me()) return fill(place)
  return fill(place, el('span.quiet', { title: me().role }, me().name), button('Sign out', { class: 'ghost', onclick: signOut }))
}

function themes() {
  const root = document.documentElement
  const toggle = document.getElementById('theme')
  const dark = () => (root.dataset.theme ?? (matchMedia('(prefers-color-scheme: light)').matches ? 'light' : 'dark')) === 'dark'
  const stored = localStorage.getItem('scangraph.theme')
  if (stored === 'dark' || stored === 'light') root.dataset.theme = stored
  fill(toggle, icon('sun'))
  toggle.addEventListener('click', () => {
    root.dataset.theme = dark() ? 'light' : 'dark'
    localStorage.setItem('scangraph.theme', root.dataset.theme)
  })
}

/** One key, one thing; never while somebody writes. */
function shortcuts() {
  const help = () => {
    const rows = [...shell.keys].map(([key, { name }]) => el('tr', {}, el('th', { scope: 'row' }, el('kbd', {}, key)), el('td', {}, name)))
    const dialog = el('dialog.keys', { 'aria-labelledby': 'keys-title' }, el('h2', { id: 'keys-title' }, 'Keyboard'), el('table', {}, el('tbody', {}, ...rows, el('tr', {}, el('th', { scope: 'row' }, el('kbd', {}, '?')), el('td', {}, 'This list')))))
    dialog.append(el('div.row.end', {}, button('Close', { onclick: () => dialog.close() })))
    dialog.addEventListener('close', () => dialog.remove())
    document.body.append(dialog)
    dialog.showModal()
  }
  const opener = document.getElementById('keys')
  fill(opener, icon('help'))
  opener.addEventListener('click', help)
  document.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest('input, textarea, select, dialog[open]')) return
    if (event.key === '?') return void (event.preventDefault(), help())
    const found = shell.keys.get(event.key) ?? shell.keys.get(event.key.toLowerCase())
    if (found) {
      event.preventDefault()
      found.run()
    }
  })
}

function line() {
  const node = document.getElementById('line')
  const words = { live: 'Live', polling: 'Reconnecting', offline: 'Offline' }
  live.addEventListener('state', ({ detail }) => {
    node.hidden = false
    node.dataset.state = detail
    node.textContent = words[detail]
    node.title = detail === 'live' ? 'Progress comes as it happens' : detail === 'polling' ? 'The live line broke; it is asked every few seconds until it is back' : 'The service cannot be reached; it is tried again'
  })
}

/** Links inside of the page load nothing anew. */
function links() {
  document.addEventListener('click', (event) => {
    const link = event.target.closest('a[href]')
    if (!link || event.defaultPrevented || event.button || event.ctrlKey || event.metaKey || event.shiftKey || link.target || link.hasAttribute('download')) return
    const { origin, pathname } = new URL(link.href)
    if (origin !== location.origin || !(pathname === '/' || pathname.startsWith('/executions/')) || link.getAttribute('href').startsWith('#')) return
    event.preventDefault()
    go(pathname)
  })
  addEventListener('popstate', show)
}

async function begin() {
  themes()
  shortcuts()
  line()
  links()
  watchSession()
  document.addEventListener('signed-out', async () => {
    live.close()
    leave()
    leave = () => {}
    account()
    await signIn(main)
    account()
    show()
  })
  let known = null
  try {
    known = await resume()
  } catch (problem) {
    fill(main, el('div.card.failed', { role: 'alert' }, el('h1', {}, 'The service does not answer'), el('p', {}, problem.message), button('Try again', { class: 'primary', onclick: () => location.reload() })))
    return
  }
  if (!known) {
    document.body.dataset.page = 'sign-in'
    document.documentElement.setAttribute('data-ready', 'sign-in')
    await signIn(main)
  }
  account()
  await show()
}

begin()
