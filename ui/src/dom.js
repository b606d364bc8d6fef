// Elements without templates: text is always text, so nothing that a file or a server says can become markup.

/**
 * Make an element.
 *
 * @param {string} name tag, with classes after dots: `button.primary`
 * @param {object} [props] attributes; `on…` are listeners, `class` is added, null and false leave an attribute out
 * @param {...(Node|string|null|Array)} children
 */
export function el(name, props = {}, ...children) {
  const [tag, ...classes] = name.split('.')
  const node = document.createElement(tag)
  node.classList.add(...classes.filter(Boolean))
  for (const [key, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue
    if (key.startsWith('on')) node.addEventListener(key.slice(2), value)
    else if (key === 'class') node.classList.add(...value.split(' ').filter(Boolean))
    else if (key === 'value' || key === 'checked' || key === 'disabled' || key === 'hidden') node[key] = value
    else node.setAttribute(key, value === true ? '' : value)
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false))
  return node
}

/** Replace an element's children. */
export function fill(node, ...children) {
  node.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined && child !== false))
  return node
}

const PATHS = {
  check: 'M4 12.5l5 5L20 6.5',
  cross: 'M6 6l12 12M18 6L6 18',
  bang: 'M12 5v9M12 18.5v.5',
  dash: 'M6 12h12',
  clock: 'M12 3.5a8.5 8.5 0 1 0 0 17 8.5 8.5 0 0 0 0-17zM12 7.5v5l3 2',
  eye: 'M2.5 12S6 5.5 12 5.5 21.5 12 21.5 12 18 18.5 12 18.5 2.5 12 2.5 12zM12 9.2a2.8 2.8 0 1 0 0 5.6 2.8 2.8 0 0 0 0-5.6z',
  'eye-off': 'M4 4l16 16M9.5 5.9A9.6 9.6 0 0 1 12 5.5c6 0 9.5 6.5 9.5 6.5a17 17 0 0 1-3.2 3.9M6.2 7.3A17 17 0 0 0 2.5 12S6 18.5 12 18.5c1.6 0 3-.4 4.2-1',
  solo: 'M12 3v3.5M12 17.5V21M3 12h3.5M17.5 12H21M12 8.5a3.5 3.5 0 1 0 0 7 3.5 3.5 0 0 0 0-7z',
  upload: 'M12 16V4.5M7 9l5-5 5 5M4 17.5V20h16v-2.5',
  download: 'M12 4v11.5M7 11l5 5 5-5M4 17.5V20h16v-2.5',
  copy: 'M8.5 8.5V4H20v11.5h-4.5M4 8.5h11.5V20H4z',
  trash: 'M4.5 7h15M9.5 7V4.5h5V7M6.5 7l1 12.5h9L17.5 7M10.3 10.500v6M13.7 10.500v6',
  retry: 'M19.5 12a7.5 7.5 0 1 1-2.3-5.400M19.5 3.500v4h-4',
  stop: 'M7 7h10v10H7z',
  sun: 'M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2.500v2M12 19.500v2M2.5 12h2M19.5 12h2M5.3 5.300l1.4 1.400M17.3 17.300l1.4 1.400M18.7 5.300l-1.4 1.400M6.7 17.300l-1.4 1.4',
  help: 'M9 9.200a3 3 0 1 1 4.4 2.700c-1 .5-1.4 1.1-1.4 2.100M12 17.300v.2',
  arrow: 'M5 12h13M13 6.500l5.5 5.5-5.5 5.5',
  target: 'M12 4.500a7.5 7.5 0 1 0 0 15 7.5 7.5 0 0 0 0-15zM12 2v4.500M12 17.500V22M2 12h4.500M17.5 12H22',
  file: 'M6 3h8l4 4v14H6zM14 3v4h4'
}

/** Make an icon: decoration only, the name is said by what holds it. */
export function icon(name) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg')
  svg.setAttribute('viewBox', '0 0 24 24')
  svg.setAttribute('class', 'icon')
  svg.setAttribute('aria-hidden', 'true')
  const path = document.createElementNS('http://www.w3.org/2000/svg', 'path')
  path.setAttribute('d', PATHS[name])
  svg.append(path)
  return svg
}

/** A button with an icon and a name; `label` is read aloud and shown as a tip where there is no text. */
export function button(text, { icon: symbol, label, ...props } = {}) {
  const node = el('button', { type: 'button', ...props }, symbol ? icon(symbol) : null, text ? el('span', {}, text) : null)
  if (label) {
    node.setAttribute('aria-label', label)
    node.title = label
  }
  return node
}

/** Say something to screen readers; twice the same is said twice. */
export function announce(text, urgent = false) {
  const region = document.getElementById(urgent ? 'alert' : 'status')
  region.textContent = ''
  requestAnimationFrame(() => (region.textContent = text))
}

/** Show a message for a while, at the bottom; errors stay until they are closed. */
export function toast(text, kind = 'note') {
  const node = el('div.toast', { class: kind, role: kind === 'error' ? 'alert' : 'status' }, el('span', {}, text))
  node.append(button('', { icon: 'cross', label: 'Close', class: 'ghost', onclick: () => node.remove() }))
  document.getElementById('toasts').append(node)
  if (kind !== 'error') setTimeout(() => node.remove(), 6000)
}

/** Ask before something that cannot be undone; resolves to true or false. */
export function confirmed(question, action) {
  return new Promise((resolve) => {
    const dialog = el('dialog.confirm', { 'aria-label': question })
    const close = (answer) => {
      dialog.close()
      dialog.remove()
      resolve(answer)
    }
    dialog.addEventListener('cancel', () => close(false))
    dialog.append(
      el('p', {}, question),
      el('div.row.end', {}, button('Keep', { onclick: () => close(false) }), button(action, { class: 'danger', onclick: () => close(true) }))
    )
    document.body.append(dialog)
    dialog.showModal()
  })
}

/** Resolve after two frames: what was drawn is then on the screen. */
export function twoFrames() {
  return new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)))
}
