// `/executions/{id}`: the run on the left, the patient in the middle, the structures on the right. While it runs and after.

import { get, getBytes } from './api.js'
import { announce, button, el, fill, icon, toast } from './dom.js'
import { about, bytes, capital, lasted, moment, seconds, words } from './format.js'
import { merge, TERMINAL } from './live.js'
import { may } from './session.js'
import { curl, program } from './snippets.js'
import { actionsOf, bar } from './start-page.js'
import { Structures } from './structures.js'

const STEP_ICONS = { pending: 'clock', running: 'arrow', completed: 'check', failed: 'bang', cancelled: 'dash', skipped: 'dash' }
const SHOWN_IN_BROWSER = new Set(['image/png', 'image/jpeg', 'image/webp', 'image/gif'])

/** Files of a run by what they are shown as; each has `title`, `url` of the display copy and `id`. */
function sources(view, spec, phases) {
  const found = { image: [], mask: [], scene: [], image2d: [], report: [] }
  for (const [name, input] of Object.entries(spec.inputs)) {
    for (const given of [view.inputs[name] ?? []].flat()) {
      if (given.file_id && found[input.kind]) found[input.kind].push({ id: given.file_id, name, title: capital(words(phases[name] ?? name)), input: true })
    }
  }
  const order = Object.keys(spec.outputs)
  const outputs = view.output_files.filter((file) => file.kind).sort((a, b) => order.indexOf(a.name) - order.indexOf(b.name))
  for (const file of outputs) {
    found[file.kind]?.push({ id: file.file_id, name: file.name, title: capital(words(file.name)), media: file.media_type, filename: file.filename, size: file.size, input: false })
  }
  return found
}

// --- left: the run -----------------------------------------------------------------------------------------------------------

class Run {
  #shell
  #components
  #steps
  #summary
  #warnings
  #opened = new Set()
  view = null

  constructor(shell, components) {
    this.#shell = shell
    this.#components = components
    this.#summary = el('div.summary')
    this.#steps = el('ol.steps', { 'aria-label': 'Steps' })
    this.#warnings = el('div')
    this.node = el('section.run-pane', { 'aria-labelledby': 'run-title' }, el('h2.unseen', { id: 'run-title' }, 'Run'), this.#summary, this.#steps, this.#warnings)
  }

  /** Show how it stands. */
  show(view) {
    this.view = view
    const { status } = view
    const took = lasted(view.started_at, view.completed_at)
    const left = view.estimated_completion ? (Date.parse(view.estimated_completion) - Date.now()) / 1000 : null
    const lines = {
      pending: view.queue_position ? `Place ${view.queue_position} in the queue` : 'Waiting',
      running: left === null ? 'No estimate yet: this has not run often enough' : left > 0 ? `${capital(about(left))} left` : 'Longer than earlier runs took',
      completed: took === null ? '' : `Took ${seconds(took)}`,
      failed: took === null ? '' : `Failed after ${seconds(took)}`,
      cancelled: 'Cancelled'
    }
    const held = this.#summary.contains(document.activeElement) ? document.activeElement.dataset.act : null
    const buttons = may('operator') ? actionsOf(view, { go: this.#shell.go, gone: () => this.#shell.go('/') }) : []
    fill(
      this.#summary,
      el('div.row.spread', {}, el('span.badge', { class: status, 'data-status': status }, icon(STEP_ICONS[status]), capital(view.cancel_requested_at && status === 'running' ? 'stopping' : status)), el('span.quiet.small.num', {}, TERMINAL.has(status) ? '' : `${Math.round(view.progress_percentage)} %`)),
      TERMINAL.has(status) ? null : bar(view),
      el('p.quiet.small', {}, lines[status], view.retry_of ? [' · ', el('a', { href: `/executions/${view.retry_of}` }, 'earlier attempt')] : ''),
      el('div.row.wrap', {}, ...buttons)
    )
    if (held) this.#summary.querySelector(`[data-act="${held}"]`)?.focus()
    fill(this.#steps, ...view.steps.map((step) => this.#step(step)))
    const error = view.error
    const own = new Set(view.steps.flatMap((step) => step.warnings ?? []))
    const others = (view.warnings ?? []).filter((warning) => !own.has(warning))
    fill(
      this.#warnings,
      error ? el('div.problem', { role: 'alert' }, el('strong', {}, `${error.title ?? 'It failed'}. `), error.detail ?? '', error.trace_id ? el('span.quiet.small', {}, ` trace ${error.trace_id}`) : null) : null,
      ...others.map((warning) => el('p.warning.small', {}, icon('bang'), el('span', {}, warning)))
    )
  }

  /** Let the clocks go on. */
  tick() {
    if (this.view && !TERMINAL.has(this.view.status)) this.show(this.view)
  }

  #step(step) {
    const component = this.#components.get(step.component)
    const { done, total, message } = step.progress ?? {}
    const running = step.status === 'running'
    const time = step.cached ? 'known' : (running ? lasted(step.started_at) : (lasted(step.started_at, step.completed_at) ?? step.seconds))
    const facts = [
      step.cached && 'Known from an earlier run with the same inputs and parameters',
      running && message,
      running && total > 0 && `${done} of ${total}`,
      running && step.resource_usage?.rss_mb && `${Math.round(step.resource_usage.cpu_percent ?? 0)} % CPU, ${Math.round(step.resource_usage.rss_mb)} MB`,
      !running && step.peak_mb > 0 && `peak ${Math.round(step.peak_mb)} MB`,
      step.attempts > 1 && `${step.attempts} attempts`,
      step.facts?.model && `${step.facts.model.id} ${step.facts.model.version}${step.facts.model.demo ? ' (demonstration)' : ''}`
    ].filter(Boolean)
    const warnings = step.warnings ?? []
    const id = `step-${step.step_id}`
    const details = el(
      'details.step-details',
      { open: this.#opened.has(id) },
      el('summary', {}, warnings.length ? el('span.warned', {}, icon('bang'), ` ${warnings.length} warning${warnings.length > 1 ? 's' : ''}`) : 'Details'),
      ...warnings.map((warning) => el('p.warning.small', {}, el('span', {}, warning))),
      el('p.quiet.small', {}, [step.component, ...facts].join(' · '))
    )
    details.addEventListener('toggle', () => (details.open ? this.#opened.add(id) : this.#opened.delete(id)))
    const progress = running ? el('progress', { max: 100, 'aria-label': `Progress of ${component?.title ?? step.step_id}` }) : null
    if (progress && total > 0) progress.value = step.progress_percentage
    return el(
      'li.step',
      { class: step.status, 'data-step': step.step_id },
      el('span.state', { class: step.status }, icon(STEP_ICONS[step.status]), el('span.unseen', {}, step.status)),
      el('div.step-body', {}, el('div.row.spread', {}, el('span.step-title', {}, component?.title ?? capital(words(step.step_id))), el('span.quiet.small.num', {}, time === 'known' ? time : time === null || time === undefined ? '' : seconds(time))), running && total > 0 ? el('span.quiet.small.num', {}, `${done} of ${total}${message ? ` ${message}` : ''}`) : null, progress, step.error ? el('p.problem.small', {}, step.error.detail ?? step.error.title) : null, step.status === 'pending' ? null : details)
    )
  }
}

/** Text that can be copied. */
function copyable(title, text) {
  const copy = button('Copy', {
    icon: 'copy',
    class: 'ghost small',
    onclick: async () => {
      try {
        await navigator.clipboard.writeText(text)
        announce('Copied')
        copy.querySelector('span').textContent = 'Copied'
        setTimeout(() => (copy.querySelector('span').textContent = 'Copy'), 1500)
      } catch {
        getSelection().selectAllChildren(code)
        toast('Selected: copy it with the keyboard')
      }
    }
  })
  const code = el('pre', { tabindex: '0', 'aria-label': title }, text)
  return el('div.snippet', {}, el('div.row.spread', {}, el('h4', {}, title), copy), code)
}

/** Unit and frame of a result, in words. */
function frameOf(file, manifests) {
  const known = manifests.get(file.name)
  const listed = known?.files.find(({ name }) => name === file.filename)
  if (known && listed) return listed.unit ? `${listed.unit} · ${listed.kind === 'glb' && known.glb_coordinates ? 'glTF axes (Y up), scanner’s inside' : known.frame}` : 'no coordinates'
  if (/manifest\.json$/.test(file.filename)) return 'JSON · describes the others'
  if (file.kind === 'mask' || file.kind === 'image') return 'mm · scanner’s frame, on the input’s grid (NIfTI: RAS)'
  if (file.kind === 'image2d') return 'pixels'
  if (file.kind === 'report') return 'JSON · units in its field names'
  if (/\.(obj|stl|ply|zip)$/.test(file.filename)) return 'mm · see the manifest'
  return ''
}

/** Downloads, provenance, and the same run again. */
class Papers {
  #downloads = el('div')
  #provenance = el('div')
  #again = el('div')
  #manifests = new Map()

  constructor() {
    const section = (title, body, open) => el('details.papers', { open }, el('summary', {}, title), body)
    this.node = el('div', {}, section('Downloads', this.#downloads, true), section('Provenance', this.#provenance, false), section('The same run again', this.#again, false))
  }

  async show(view, lineage) {
    fill(this.#again, copyable('curl', curl(view)), copyable('Python', program(view)))
    if (lineage) this.#showLineage(lineage)
    for (const file of view.output_files) {
      if (/\.manifest\.json$/.test(file.filename) && !this.#manifests.has(file.name)) {
        const manifest = await get(file.download_url).catch(() => null)
        if (manifest) this.#manifests.set(file.name, manifest)
      }
    }
    const files = view.output_files
    fill(
      this.#downloads,
      files.length
        ? [
            el('ul.downloads', {}, ...files.map((file) => el('li', {}, el('a', { href: file.download_url, download: file.filename, class: 'download' }, icon('download'), el('span', {}, el('span.file-name', {}, file.filename), el('span.quiet.small', {}, [bytes(file.size), frameOf(file, this.#manifests)].filter(Boolean).join(' · '))))))),
            TERMINAL.has(view.status) ? el('a.button', { href: `/v1/executions/${view.execution_id}/files.zip`, download: `${view.pipeline}.zip` }, icon('download'), 'All as a zip') : null
          ]
        : el('p.quiet.small', {}, TERMINAL.has(view.status) ? 'It made no files.' : 'Each result appears here when it is finished.')
    )
  }

  #showLineage(lineage) {
    const rows = lineage.steps.map((step) =>
      el(
        'li',
        {},
        el('strong', {}, `${step.step_id}: ${step.component} ${step.version ?? ''}`),
        step.model ? el('div.small', {}, `model ${step.model.id} ${step.model.version}`, el('code.hash', { title: step.model.sha256 }, step.model.sha256?.slice(0, 12))) : null,
        Object.keys(step.parameters ?? {}).length ? el('div.small', {}, Object.entries(step.parameters).map(([name, value]) => `${name} = ${JSON.stringify(value)}`).join(', ')) : el('div.small.quiet', {}, 'default parameters'),
        step.result_key ? el('div.small.quiet', {}, 'result ', el('code.hash', { title: step.result_key }, step.result_key.slice(0, 12))) : null
      )
    )
    const hashes = [
      ...Object.entries(lineage.inputs).flatMap(([name, given]) => [given].flat().map((input) => [`${name} (in)`, input.sha256])),
      ...(lineage.outputs ?? []).map((output) => [output.filename, output.sha256])
    ].filter(([, hash]) => hash)
    fill(
      this.#provenance,
      el('p.small', {}, `${lineage.pipeline.name}, revision ${lineage.pipeline.revision} · scangraph ${lineage.scangraph}`),
      el('ul.lineage', {}, ...rows),
      el('details', {}, el('summary', {}, `SHA-256 of ${hashes.length} files`), el('ul.lineage', {}, ...hashes.map(([name, hash]) => el('li.small', {}, `${name} `, el('code.long', {}, hash)))))
    )
  }
}

/** A centreline, as the list of structures wants it: in the middle of its points, without a volume. */
function asStructure(line) {
  const centre = [0, 1, 2].map((axis) => line.points_mm.reduce((sum, point) => sum + point[axis], 0) / line.points_mm.length)
  return { ...line, volume_ml: null, centre_mm: centre, warnings: [] }
}

// --- middle: the patient -----------------------------------------------------------------------------------------------------

class Patient extends EventTarget {
  #viewer = null
  #making = null
  #loaded = { image: null, mask: null, scene: null }
  #sources = { image: [], mask: [], scene: [], image2d: [], report: [] }
  #chosen = {}
  #structures
  #surfaces = []
  #failed = new Set()
  #asked = new Map()
  #window = 'soft'
  #closed = false
  #queue = Promise.resolve()

  constructor(structures, shell) {
    super()
    this.#structures = structures
    this.#build(shell)
    structures.addEventListener('look', () => this.#viewer?.setStructures(structures.items))
    structures.addEventListener('go', ({ detail: item }) => item.centre_mm && this.centre(item.centre_mm))
  }

  #build(shell) {
    this.slices = el('canvas', { tabindex: '0', role: 'img', 'aria-label': 'Slices: axial, coronal and sagittal. Arrow keys move the cross.' })
    this.scene = el('canvas', { tabindex: '0', role: 'img', 'aria-label': 'Surfaces in 3-D. Arrow keys turn them.' })
    this.slicesNote = el('div.canvas-note', {}, 'The scan appears here.')
    this.sceneNote = el('div.canvas-note', {}, 'Surfaces appear here as soon as they are finished.')
    this.readout = el('div.readout', { 'aria-live': 'off' })
    const pressed = (buttons, name) => {
      for (const [key, one] of buttons) one.setAttribute('aria-pressed', String(key === name))
    }
    this.windows = el('div.segmented', { role: 'group', 'aria-label': 'Window' })
    this.layouts = new Map(['all', 'axial', 'coronal', 'sagittal'].map((name) => [name, button(name === 'all' ? 'Three' : capital(name), { onclick: () => (this.#viewer?.layout(name), pressed(this.layouts, name)) })]))
    pressed(this.layouts, 'all')
    this.sides = el('button', { type: 'button', 'aria-pressed': 'true', class: 'convention', title: 'Radiological: the patient’s right is on the left', 'aria-label': 'R | L, radiological convention' }, 'R | L')
    this.sides.addEventListener('click', () => {
      const on = this.sides.getAttribute('aria-pressed') !== 'true'
      this.sides.setAttribute('aria-pressed', String(on))
      this.sides.textContent = on ? 'R | L' : 'L | R'
      this.sides.setAttribute('aria-label', `${this.sides.textContent}, radiological convention`)
      this.#viewer?.radiological(on)
      announce(on ? 'Radiological: the patient’s right is on the left' : 'Neurological: the patient’s right is on the right')
    })
    this.opacity = el('input', { type: 'range', min: '0', max: '1', step: '0.05', value: '0.5', 'aria-label': 'Opacity of the mask' })
    this.opacity.addEventListener('input', () => this.#viewer?.overlayOpacity(Number(this.opacity.value)))
    this.images = el('select', { 'aria-label': 'Image' })
    this.masks = el('select', { 'aria-label': 'Mask' })
    this.images.addEventListener('change', () => this.#choose('image', this.images.value))
    this.masks.addEventListener('change', () => this.#choose('mask', this.masks.value))
    const views = ['front', 'back', 'left', 'right', 'above', 'below'].map((name) => button(capital(name), { title: `Look from ${name === 'above' || name === 'below' ? name : `the ${name}`}`, 'data-view': name, onclick: () => this.#viewer?.view(name) }))
    this.cutSide = el('select', { 'aria-label': 'Cut away from' }, el('option', { value: '' }, 'No cut'), ...['front', 'back', 'left', 'right', 'above', 'below'].map((side) => el('option', { value: side }, `Cut from ${side === 'above' || side === 'below' ? side : `the ${side}`}`)))
    this.cutDepth = el('input', { type: 'range', min: '0.02', max: '0.98', step: '0.01', value: '0.5', 'aria-label': 'Depth of the cut', hidden: true })
    const cut = () => {
      this.cutDepth.hidden = !this.cutSide.value
      this.#viewer?.cut(this.cutSide.value || null, Number(this.cutDepth.value))
    }
    this.cutSide.addEventListener('change', cut)
    this.cutDepth.addEventListener('input', cut)
    this.pictures = el('div.pictures', { hidden: true })
    this.canvases = el(
      'div.canvases',
      {},
      el('div.canvas-box.slices-box', {}, el('div.tools', {}, this.windows, el('label.inline', {}, 'Mask ', this.opacity), el('div.segmented', { role: 'group', 'aria-label': 'Planes' }, ...this.layouts.values()), this.sides, this.images, this.masks), el('div.canvas', {}, this.slices, this.slicesNote, this.readout)),
      el('div.canvas-box.scene-box', {}, el('div.tools', {}, el('div.segmented', { role: 'group', 'aria-label': 'Views' }, ...views), this.cutSide, this.cutDepth), el('div.canvas', {}, this.scene, this.sceneNote))
    )
    this.node = el('section.patient', { 'aria-label': 'Slices and surfaces' }, this.canvases, this.pictures)
    this.#keys(shell)
  }

  #keys(shell) {
    const names = { 1: 'soft', 2: 'lung', 3: 'bone', 4: 'vessel', 5: 'full' }
    for (const [key, name] of Object.entries(names)) shell.keys.set(key, { name: `Window: ${name}`, run: () => this.#setWindow(name) })
    const views = { f: 'front', b: 'back', l: 'left', r: 'right', a: 'above', v: 'below' }
    for (const [key, name] of Object.entries(views)) shell.keys.set(key, { name: `Look from: ${name}`, run: () => this.#viewer?.view(name) })
    shell.keys.set('/', { name: 'Filter structures', run: () => this.#structures.focus() })
    shell.keys.set('h', { name: 'Hide all structures', run: () => this.#structures.all(false) })
    shell.keys.set('s', { name: 'Show all structures', run: () => this.#structures.all(true) })
    const step = { ArrowLeft: [-1, 0, 0], ArrowRight: [1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0], PageUp: [0, 0, 1], PageDown: [0, 0, -1] }
    this.slices.addEventListener('keydown', (event) => {
      const found = step[event.key]
      if (!found) return
      event.preventDefault()
      event.stopPropagation()
      // NiiVue's x grows to the patient's right; on a radiological picture that is the left.
      const flip = this.sides.getAttribute('aria-pressed') === 'true' ? -1 : 1
      this.#viewer?.step(found[0] * flip, found[1], found[2])
    }, true)
    const turn = { ArrowLeft: [-10, 0], ArrowRight: [10, 0], ArrowUp: [0, 10], ArrowDown: [0, -10] }
    this.scene.addEventListener('keydown', (event) => {
      if (event.key === '+' || event.key === '-') this.#viewer?.zoom(event.key === '+' ? 1.15 : 1 / 1.15)
      else if (turn[event.key]) this.#viewer?.turn(...turn[event.key])
      else return
      event.preventDefault()
      event.stopPropagation()
    }, true)
  }

  /** Put the cross somewhere. */
  centre(mm) {
    this.#viewer?.centre(mm)
  }

  /** Show what there is now; what is shown already is not loaded again. */
  show(found) {
    this.#sources = found
    const volumes = found.image.length + found.mask.length + found.scene.length > 0
    this.canvases.hidden = !volumes && found.image2d.length > 0
    this.node.classList.toggle('only-pictures', this.canvases.hidden)
    this.#showPictures(found.image2d)
    if (this.canvases.hidden) return Promise.resolve()
    this.#fetchAhead()
    this.#queue = this.#queue.then(() => this.#load()).catch((problem) => this.#complain(problem))
    return this.#queue
  }

  /** Ask for what will be shown while the canvases are being made; NiiVue takes a while to compile its shaders. */
  #fetchAhead() {
    const image = this.#pick('image', this.#sources.image)
    const mask = this.#pick('mask', this.#sources.mask)
    const scene = this.#sources.scene.at(-1)
    for (const [one, part] of [[image, 'image'], [mask, 'mask'], [scene, 'scene']]) {
      if (one && one.id !== this.#loaded[part]) this.#bytes(one.id, part).catch(() => {}) // told when it is wanted
    }
  }

  /** What a part is drawn from, asked for once. */
  #bytes(id, part) {
    if (!this.#asked.has(id)) {
      const copy = `/v1/files/${id}/display`
      const said = (progress) => part === 'image' && (this.slicesNote.textContent = `Loading the scan · ${Math.round(100 * progress)} %`)
      const asking = {
        image: () => Promise.all([get(`/v1/files/${id}/metadata`), getBytes(`${copy}?as=image`, { onProgress: said })]),
        mask: () => getBytes(`${copy}?as=mask`),
        scene: async () => {
          const listed = await get(copy)
          return [listed, await Promise.all(listed.structures.map(({ url }) => getBytes(url)))]
        }
      }
      this.#asked.set(id, asking[part]())
    }
    return this.#asked.get(id)
  }

  #complain(problem) {
    if (this.#closed || problem.name === 'AbortError') return
    if (!('status' in problem)) console.error(problem)
    toast(`It cannot be shown: ${problem.message}`, 'error')
  }

  async #ready() {
    this.#making ??= import('./viewer.js').then(async ({ Viewer, WINDOWS }) => {
      this.presets = WINDOWS
      const viewer = await Viewer.make({ slices: this.slices, scene: this.scene })
      viewer.addEventListener('place', ({ detail }) => this.#showPlace(detail))
      this.#viewer = viewer
      return viewer
    })
    return this.#making
  }

  #showPlace({ mm, value, label }) {
    const [x, y, z] = mm
    const side = (n, plus, minus) => `${n >= 0 ? plus : minus} ${Math.abs(n).toFixed(0)}`
    fill(this.readout, el('span.num', {}, `${side(x, 'R', 'L')}  ${side(y, 'A', 'P')}  ${side(z, 'S', 'I')} mm`), value === null ? null : el('span.num', {}, `${Math.round(value)}${this.ct ? ' HU' : ''}`), label ? el('strong', {}, this.#structures.named(label)) : null)
    this.#structures.point(label)
  }

  async #choose(kind, id) {
    this.#chosen[kind] = id
    await this.show(this.#sources)
  }

  #pick(kind, list) {
    const select = kind === 'image' ? this.images : this.masks
    const chosen = list.find(({ id }) => id === this.#chosen[kind]) ?? (kind === 'image' ? list[0] : list.at(-1))
    fill(select, ...list.map(({ id, title }) => el('option', { value: id }, title)))
    select.hidden = list.length < 2
    if (chosen) select.value = chosen.id
    return chosen ?? null
  }

  async #load() {
    if (this.#closed) return
    const found = this.#sources
    const viewer = await this.#ready().catch((problem) => {
      this.slicesNote.textContent = 'This browser cannot draw it: it has no WebGL 2.'
      throw problem
    })
    if (this.#closed) return viewer.close()
    const image = this.#pick('image', found.image)
    const mask = this.#pick('mask', found.mask)
    const scene = found.scene.at(-1) ?? null
    await this.#attempt('image', image, () => this.#loadImage(image), this.slicesNote)
    await this.#attempt('mask', mask, () => this.#loadMask(mask, !image), this.slicesNote)
    await this.#attempt('scene', scene, () => this.#loadScene(scene), this.sceneNote)
    if (this.#closed) return
    if (!image && !mask) this.slicesNote.textContent = 'There is no scan to slice: it lies in the server’s storage, or the run has none.'
    await viewer.settled()
    this.node.dataset.image = this.#loaded.image ?? ''
    this.node.dataset.mask = this.#loaded.mask ?? ''
    this.node.dataset.scene = this.#loaded.scene ?? ''
  }

  /** Load one of the parts, once; the others do not wait for one that cannot be shown. */
  async #attempt(part, wanted, load, note) {
    if (!wanted || this.#closed || wanted.id === this.#loaded[part] || this.#failed.has(wanted.id)) return
    try {
      await load()
    } catch (problem) {
      this.#failed.add(wanted.id)
      if (note.hidden) return this.#complain(problem) // something is drawn there already
      note.textContent = `It cannot be shown: ${problem.message}`
      if (!('status' in problem)) console.error(problem)
    }
  }

  async #loadImage(image) {
    this.slicesNote.textContent = 'Loading the scan'
    const [about, buffer] = await this.#bytes(image.id, 'image')
    this.#asked.delete(image.id) // NiiVue has its own copy from here on
    if (this.#closed) return
    const intensity = about.metadata.intensity
    this.ct = !intensity || intensity.min < -200
    this.full = intensity ? { name: 'Full', low: intensity.p01, high: intensity.p99 } : { name: 'Full', low: -1024, high: 1500 }
    if (this.full.high <= this.full.low) this.full.high = this.full.low + 1
    this.#showWindows()
    if (!this.ct) this.#window = 'full'
    await this.#viewer.setImage(buffer, this.#windowOf(this.#window))
    this.#markWindow()
    this.slicesNote.hidden = true
    this.#loaded.image = image.id
    announce('The scan is shown')
  }

  #windowOf(name) {
    return name === 'full' ? this.full : (this.presets[name] ?? this.full)
  }

  #showWindows() {
    const names = this.ct ? [...Object.keys(this.presets), 'full'] : ['full']
    fill(this.windows, ...names.map((name) => button(this.#windowOf(name).name, { 'data-window': name, title: `${Math.round(this.#windowOf(name).low)} to ${Math.round(this.#windowOf(name).high)}${this.ct ? ' HU' : ''}`, onclick: () => this.#setWindow(name) })))
  }

  #markWindow() {
    for (const one of this.windows.children) one.setAttribute('aria-pressed', String(one.dataset.window === this.#window))
  }

  #setWindow(name) {
    if (!this.full || (!this.ct && name !== 'full')) return
    this.#window = name
    this.#viewer?.window(this.#windowOf(name))
    this.#markWindow()
  }

  async #loadMask(mask, alone) {
    const buffer = await this.#bytes(mask.id, 'mask')
    this.#asked.delete(mask.id)
    if (this.#closed) return
    await this.#viewer.setOverlay(buffer)
    if (alone) {
      this.slicesNote.hidden = true
      this.opacity.value = '1'
      this.#viewer.overlayOpacity(1)
    }
    this.#loaded.mask = mask.id
    this.#counted = new Map([...this.#viewer.countLabels()].sort(([a], [b]) => a - b))
    this.#restructure()
    announce('The mask is shown')
  }

  #counted = new Map()

  #restructure() {
    this.#structures.set(this.#surfaces, this.#counted)
    this.#viewer.setStructures(this.#structures.items)
  }

  async #loadScene(scene) {
    this.sceneNote.textContent = 'Loading the surfaces'
    const [copy, buffers] = await this.#bytes(scene.id, 'scene')
    this.#asked.delete(scene.id)
    if (this.#closed) return
    const known = new Set(copy.structures.map(({ label }) => label))
    const alone = (copy.lines ?? []).filter(({ label, segments }) => !known.has(label) && segments.length)
    const used = new Set()
    this.#surfaces = [...copy.structures.map((one, n) => ({ ...one, buffer: buffers[n] })), ...alone.map(asStructure)].map((one, n) => {
      const key = used.has(one.label) ? `${one.label}-${n}` : String(one.label)
      used.add(one.label)
      return { ...one, key }
    })
    this.#structures.set(this.#surfaces, this.#counted)
    const items = new Map(this.#structures.items.map((item) => [item.key, item]))
    this.#viewer.setSurfaces(this.#surfaces.map((one) => ({ ...items.get(one.key), buffer: one.buffer, points_mm: one.points_mm, segments: one.segments })))
    this.#surfaces = this.#surfaces.map(({ buffer, points_mm, segments, ...rest }) => rest) // they are on the GPU now
    this.#viewer.setStructures(this.#structures.items)
    this.sceneNote.hidden = true
    this.#loaded.scene = scene.id
    announce(`${this.#surfaces.length} structures are shown`)
    this.dispatchEvent(new Event('scene'))
  }

  #showPictures(list) {
    const key = list.map(({ id }) => id).join()
    if (this.pictures.dataset.key === key) return
    this.pictures.dataset.key = key
    this.pictures.hidden = !list.length
    fill(
      this.pictures,
      ...list.map(({ id, title, media, input, filename }) => {
        const direct = !input && SHOWN_IN_BROWSER.has(media)
        const picture = el('img', { src: direct ? `/v1/files/${id}` : `/v1/files/${id}/thumbnail`, alt: `${title}${input ? ', as it came' : ''}` })
        if (direct) {
          // Where files lie in S3 the service answers with a link to there, which the page's policy does not let in.
          picture.addEventListener('error', () => (picture.src = `/v1/files/${id}/thumbnail`), { once: true })
        } else {
          // What came in may be a format that browsers show, or not (TIFF): then the thumbnail stays.
          const whole = new Image()
          whole.onload = () => (picture.src = whole.src)
          whole.src = `/v1/files/${id}`
        }
        return el('figure', { class: input ? 'input' : 'output' }, el('a', { href: `/v1/files/${id}`, target: '_blank', rel: 'noopener' }, picture), el('figcaption', {}, `${title}${input ? ' (input)' : ''}`, filename ? el('span.quiet.small', {}, ` ${filename}`) : null))
      })
    )
  }

  /** Let everything go. */
  close() {
    this.#closed = true
    this.#viewer?.close()
  }
}

// --- right: bridges and reports under the structures -------------------------------------------------------------------------

/** LPS millimetres, as the stages report, to RAS, as the viewer wants. */
const toRas = ([x, y, z]) => [-x, -y, z]

/** What the steps repaired: each bridge leads to its place. */
function bridgeList(view, patient, named) {
  const found = view.steps.flatMap((step) => (Array.isArray(step.facts?.bridges) ? step.facts.bridges : []))
  if (!found.length) return null
  const rows = found.map((bridge, n) => {
    const from = toRas(bridge.from_mm)
    const to = toRas(bridge.to_mm)
    const middle = from.map((value, axis) => (value + to[axis]) / 2)
    const facts = [
      bridge.gap_mm !== undefined && `gap ${bridge.gap_mm} mm`,
      bridge.confidence !== undefined && `confidence ${Math.round(100 * bridge.confidence)} %`,
      bridge.ct_evidence !== null && bridge.ct_evidence !== undefined && `CT ${Math.round(100 * bridge.ct_evidence)} %`
    ].filter(Boolean)
    return el('li', {}, el('button.name', { type: 'button', onclick: () => patient.centre(middle) }, `${(bridge.labels ?? []).map(named).join(', ') || 'Bridge'} ${n + 1}`), el('span.quiet.small.num', {}, facts.join(' · ')))
  })
  return el('details.bridges', { open: true }, el('summary', {}, el('span', {}, 'Repaired gaps'), el('span.quiet.small', {}, ` ${found.length}`)), el('ul', {}, ...rows))
}

/** A report's JSON: a list of objects as a table, everything else as text. */
async function reportView(report) {
  const body = await get(`/v1/files/${report.id}`).catch(() => null)
  if (body === null) return null
  const [name, list] = Object.entries(body).find(([, value]) => Array.isArray(value) && value.length && typeof value[0] === 'object') ?? []
  if (!list || report.size > 2e6) {
    const text = JSON.stringify(body, null, 1)
    return el('details.papers', {}, el('summary', {}, report.title), el('pre', { tabindex: '0' }, text.length > 4000 ? `${text.slice(0, 4000)} …` : text))
  }
  const columns = [...new Set(list.flatMap((row) => Object.keys(row)))].slice(0, 6)
  const cell = (value) => (typeof value === 'number' ? String(Number(value.toFixed(3))) : Array.isArray(value) ? value.slice(0, 4).map(cell).join(', ') : typeof value === 'object' && value ? JSON.stringify(value).slice(0, 60) : String(value ?? ''))
  return el(
    'details.papers',
    { open: true },
    el('summary', {}, `${report.title}: ${list.length} ${words(name)}`),
    el('div.table-box', { tabindex: '0' }, el('table', {}, el('thead', {}, el('tr', {}, ...columns.map((column) => el('th', { scope: 'col' }, words(column))))), el('tbody', {}, ...list.slice(0, 100).map((row) => el('tr', {}, ...columns.map((column) => el('td', {}, cell(row[column]))))))))
  )
}

// --- the page ----------------------------------------------------------------------------------------------------------------

/** Show an execution; returns what ends it. */
export async function executionPage(main, id, shell) {
  const path = `/v1/executions/${encodeURIComponent(id)}`
  import('./viewer.js').catch(() => {}) // it is large: it comes while the service is asked what there is
  const [first, lineage, components, labels] = await Promise.all([get(path), get(`${path}/provenance`), get('/v1/components'), get('/v1/labels')])
  let view = first
  const { spec } = lineage.pipeline
  const title = spec.title || capital(words(spec.name))
  const phases = Object.fromEntries(Object.entries(spec.inputs).map(([name, { phase }]) => [name, phase === 'any' ? name : phase]))
  const table = new Map(labels.items.map((label) => [label.number, label]))
  const structures = new Structures(table)
  const run = new Run(shell, new Map(components.items.map((component) => [component.id, component])))
  const papers = new Papers()
  const patient = new Patient(structures, shell)
  const extras = el('div.extras')
  const left = el('div.left', {}, run.node, papers.node)
  const right = el('div.right', {}, structures.node, extras)
  document.title = `${title} · scangraph`
  shell.title(el('span.page-title', {}, title), el('span.quiet', {}, ` ${moment(view.created_at)}`))
  shell.actions(el('a.button', { href: '/' }, 'New execution'))
  fill(main, el('h1.unseen', {}, `${title}, ${view.status}`), el('div.workbench', {}, left, patient.node, right))

  let closed = false
  const reports = new Map()
  let drawn = ''
  async function refreshPapers() {
    const known = await get(`${path}/provenance`).catch(() => lineage)
    await papers.show(view, known)
  }
  async function showExtras() {
    for (const report of sources(view, spec, phases).report) {
      if (!report.input && !reports.has(report.id)) reports.set(report.id, await reportView(report))
    }
    if (!closed) fill(extras, bridgeList(view, patient, (label) => structures.named(label)), ...[...reports.values()].filter(Boolean))
  }
  async function update() {
    run.show(view)
    const found = sources(view, spec, phases)
    const key = view.output_files.map((file) => file.file_id).join() + view.status
    if (key === drawn) return
    drawn = key
    right.hidden = found.image.length + found.mask.length + found.scene.length === 0 && found.report.length === 0
    await Promise.all([patient.show(found), papers.show(view, lineage), showExtras()])
    if (!closed) main.dataset.shown = view.status
  }

  let spoken = ''
  const speak = () => {
    const step = view.steps.find((one) => one.status === 'running')
    const quarter = Math.floor(view.progress_percentage / 25) * 25
    const text = TERMINAL.has(view.status) ? `The execution is ${view.status}` : view.status === 'running' ? `${step ? words(step.step_id) : 'Running'}, ${quarter} percent` : 'Waiting'
    if (text !== spoken) announce(text)
    spoken = text
  }
  const unwatch = TERMINAL.has(view.status)
    ? () => {}
    : shell.live.watch(id, async (message) => {
        const before = view
        view = merge(view, message)
        // Warnings, facts, files and the queue's estimate are in no event: they are asked for when a step or the run has ended, and
        // when an event names new outputs, which may be written a while after their step.
        const ended = (one) => one.steps.filter((step) => TERMINAL.has(step.status)).length
        if (message.type !== 'snapshot' && (before.status !== view.status || ended(before) !== ended(view) || message.new_outputs)) {
          view = await get(path).catch(() => view)
          if (TERMINAL.has(view.status)) refreshPapers()
        }
        if (closed) return
        speak()
        update()
      })
  const clock = setInterval(() => run.tick(), 1000)
  update()
  return () => {
    closed = true
    clearInterval(clock)
    unwatch()
    patient.close()
  }
}
