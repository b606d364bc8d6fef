// The list of structures: found, grouped, shown, hidden, coloured, and a click leads to the place.

import { announce, button, el, fill, icon } from './dom.js'
import { capital, millilitres, words } from './format.js'
import { GROUPS, groupOf } from './groups.js'

const toHex = (rgb) => `#${rgb.map((value) => Math.round(value).toString(16).padStart(2, '0')).join('')}`

/** What is known of the structures, and what somebody chose; `look` events when anything looks different, `go` with a place. */
export class Structures extends EventTarget {
  #items = new Map() // key -> structure
  #choices = new Map() // key -> {visible, color, opacity}, which outlive a new scene
  #table
  #list
  #search
  #count
  #rows = new Map()
  #current = null
  #closed = new Set()

  /** @param {Map<number, object>} table the label table, by number */
  constructor(table) {
    super()
    this.#table = table
    this.#search = el('input', { type: 'search', id: 'structure-search', placeholder: 'Filter', 'aria-label': 'Filter structures', autocomplete: 'off', oninput: () => this.#filter() })
    this.#count = el('span.quiet.small', { 'aria-live': 'polite' })
    this.#list = el('div.structure-list')
    this.node = el(
      'section.structures',
      { 'aria-labelledby': 'structures-title' },
      el('div.pane-head', {}, el('h2', { id: 'structures-title' }, 'Structures'), this.#count),
      el('div.search-row', {}, this.#search, button('', { icon: 'eye', label: 'Show all', class: 'ghost', onclick: () => this.all(true) }), button('', { icon: 'eye-off', label: 'Hide all', class: 'ghost', onclick: () => this.all(false) })),
      this.#list
    )
    this.#render()
  }

  /** Structures as the viewer wants them. */
  get items() {
    return [...this.#items.values()]
  }

  /**
   * Say what there is: surfaces as the scene lists them, and labels that only the mask has.
   *
   * @param {Array} surfaces of the scene's display copy
   * @param {Map} counted label -> volume and centre, of the mask's display copy
   */
  set(surfaces, counted) {
    const items = new Map()
    const add = (key, label, name, rgb, rest) => {
      const choice = this.#choices.get(key) ?? {}
      const known = this.#table.get(label)
      items.set(key, {
        key,
        label,
        name,
        title: capital(words(name)),
        group: groupOf(name, known?.snomed_code),
        color: choice.color ?? toHex(rgb),
        opacity: choice.opacity ?? 1,
        visible: choice.visible ?? true,
        warnings: [],
        ...rest
      })
    }
    for (const one of surfaces) {
      add(one.key, one.label, one.name, one.rgb, { volume_ml: one.volume_ml, centre_mm: one.centre_mm, warnings: one.warnings ?? [], surface: true })
    }
    for (const [label, { volume_ml, centre_mm }] of counted) {
      if (items.has(String(label))) continue
      const known = this.#table.get(label)
      add(String(label), label, known?.name ?? `label ${label}`, known?.color ?? [150, 150, 150], { volume_ml, centre_mm, surface: false })
    }
    this.#items = items
    this.#render()
  }

  /** Name of a label. */
  named(label) {
    return this.#items.get(String(label))?.title ?? (this.#table.has(label) ? capital(words(this.#table.get(label).name)) : `Label ${label}`)
  }

  /** Mark the structure that the cross is in. */
  point(label) {
    const key = label ? String(label) : null
    if (key === this.#current) return
    this.#rows.get(this.#current)?.classList.remove('current')
    this.#rows.get(key)?.classList.add('current')
    this.#current = key
  }

  /** Show or hide everything that the filter lets through. */
  all(visible) {
    const wanted = this.#matching()
    for (const item of wanted) this.#choose(item, { visible })
    this.#changed()
    announce(visible ? 'All structures are shown' : 'All structures are hidden')
  }

  /** Put the cursor into the filter. */
  focus() {
    this.#search.focus()
    this.#search.select()
  }

  #choose(item, choice) {
    Object.assign(item, choice)
    this.#choices.set(item.key, { visible: item.visible, color: item.color, opacity: item.opacity })
  }

  #changed() {
    for (const item of this.#items.values()) this.#show(item)
    this.#tally()
    this.dispatchEvent(new Event('look'))
  }

  #solo(item) {
    const alone = [...this.#items.values()].every((other) => other.visible === (other === item))
    for (const other of this.#items.values()) this.#choose(other, { visible: alone || other === item })
    this.#changed()
    announce(alone ? 'All structures are shown' : `Only ${item.title} is shown`)
  }

  #matching() {
    const text = this.#search.value.trim().toLowerCase()
    return [...this.#items.values()].filter((item) => !text || item.title.toLowerCase().includes(text) || item.group.toLowerCase().includes(text) || String(item.label) === text)
  }

  #filter() {
    const wanted = new Set(this.#matching().map((item) => item.key))
    for (const [key, row] of this.#rows) row.hidden = !wanted.has(key)
    for (const box of this.#list.querySelectorAll('.group-box')) {
      box.hidden = !box.querySelector('.structure:not([hidden])')
      if (this.#search.value) box.querySelector('details').open = true
    }
    this.#tally(wanted.size)
  }

  #tally(found = null) {
    const items = [...this.#items.values()]
    const shown = items.filter((item) => item.visible).length
    this.#count.textContent = !items.length ? '' : found !== null && this.#search.value ? `${found} found` : shown === items.length ? String(items.length) : `${shown} of ${items.length}`
  }

  #render() {
    this.#rows.clear()
    if (!this.#items.size) {
      fill(this.#list, el('p.empty', {}, 'Structures appear here as soon as a mask or a scene is finished.'))
      this.#tally()
      return
    }
    const groups = GROUPS.map((name) => [name, this.items.filter((item) => item.group === name)]).filter(([, items]) => items.length)
    fill(
      this.#list,
      ...groups.map(([name, items]) => {
        const toggle = button('', { icon: 'eye', label: `Show or hide ${name}`, class: 'ghost tiny', onclick: (event) => this.#toggleGroup(event, items) })
        const details = el('details.group', { open: !this.#closed.has(name), 'data-group': name }, el('summary', {}, el('span', {}, name), el('span.quiet.small', {}, ` ${items.length}`)), el('ul', {}, ...items.map((item) => this.#row(item))))
        details.addEventListener('toggle', () => (details.open ? this.#closed.delete(name) : this.#closed.add(name)))
        return el('div.group-box', {}, details, toggle)
      })
    )
    this.#filter()
    for (const item of this.#items.values()) this.#show(item)
  }

  #toggleGroup(event, items) {
    const visible = !items.some((item) => item.visible)
    for (const item of items) this.#choose(item, { visible })
    this.#changed()
  }

  #row(item) {
    const color = el('input.swatch', { type: 'color', value: item.color, 'aria-label': `Colour of ${item.title}` })
    color.addEventListener('input', () => {
      this.#choose(item, { color: color.value })
      this.#changed()
    })
    const name = el('button.name', { type: 'button', title: 'Go there' }, item.title)
    name.addEventListener('click', () => this.dispatchEvent(new CustomEvent('go', { detail: item })))
    const eye = button('', { icon: 'eye', label: `Show ${item.title}`, class: 'ghost tiny eye', onclick: () => {
      this.#choose(item, { visible: !item.visible })
      this.#changed()
    } })
    const solo = button('', { icon: 'solo', label: `Show only ${item.title}`, class: 'ghost tiny solo', onclick: () => this.#solo(item) })
    const opacity = el('input.opacity', { type: 'range', min: 0.1, max: 1, step: 0.05, value: String(item.opacity), 'aria-label': `Opacity of ${item.title}`, title: 'Opacity' })
    opacity.addEventListener('input', () => {
      this.#choose(item, { opacity: Number(opacity.value) })
      this.#changed()
    })
    const warned = item.warnings.length ? el('span.warned', { title: item.warnings.join('\n'), role: 'img', 'aria-label': `Warning: ${item.warnings.join('; ')}` }, icon('bang')) : null
    const row = el('li.structure', { 'data-label': item.label, 'data-key': item.key }, color, name, warned, el('span.volume', {}, millilitres(item.volume_ml)), el('span.tools', {}, opacity, solo, eye))
    this.#rows.set(item.key, row)
    return row
  }

  #show(item) {
    const row = this.#rows.get(item.key)
    if (!row) return
    row.classList.toggle('hidden-structure', !item.visible)
    const eye = row.querySelector('.eye')
    eye.replaceChildren(icon(item.visible ? 'eye' : 'eye-off'))
    eye.setAttribute('aria-pressed', String(item.visible))
    row.querySelector('.swatch').value = item.color
  }
}
