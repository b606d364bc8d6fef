// `/`: what goes in, what is done with it, and everything that was done.

import { ask, get, getAll } from './api.js'
import { announce, button, confirmed, el, fill, icon, toast } from './dom.js'
import { about, bytes, capital, lasted, moment, seconds, words } from './format.js'
import { merge, TERMINAL } from './live.js'
import { schemaForm } from './schema-form.js'
import { may } from './session.js'
import { forget, interrupted, Upload } from './uploads.js'

const STATES = ['pending', 'running', 'completed', 'failed', 'cancelled']
const PHASES = {
  arterial: /arter|(^|[^a-z])(art|ap|a)([^a-z]|$)/i,
  portal: /port|venous|(^|[^a-z])(ven|pv|pvp|p)([^a-z]|$)/i,
  delayed: /delay|excret|late|urogr|(^|[^a-z])(del|d)([^a-z]|$)/i,
  native: /nativ|non.?contrast|unenhanced|plain|(^|[^a-z])(nc|n)([^a-z]|$)/i
}
const KINDS = { image: 'CT', mask: 'Mask', image2d: 'Picture', dicom: 'DICOM', zip: 'Zip' }

/** What a file may be used as. */
function kindsOf(file) {
  return file.metadata?.readable_as ?? (file.kind === 'image2d' ? ['image2d'] : file.kind === 'nifti' ? ['image'] : [])
}

// --- files -------------------------------------------------------------------------------------------------------------------

/** Files that are here, on their way, and known from before. */
class Files extends EventTarget {
  ready = [] // metadata of files that can be used, the newest last
  #cards
  #uploads = new Set()

  constructor() {
    super()
    const pick = el('input.unseen', { type: 'file', id: 'pick', multiple: true, accept: '.nii,.gz,.nii.gz,.zip,.jpg,.jpeg,.png,.tif,.tiff,.webp' })
    pick.addEventListener('change', () => {
      this.add([...pick.files])
      pick.value = ''
    })
    const zone = el('label.drop', { for: 'pick' }, icon('upload'), el('span.drop-title', {}, 'Drop scans here'), el('span.quiet.small', {}, 'NIfTI, a file for each phase · or pictures · or choose files'))
    this.#cards = el('ul.files', { 'aria-label': 'Files' })
    this.node = el('div', {}, pick, zone, this.#cards)
    this.#catchDrops(zone)
    this.#showInterrupted()
  }

  #catchDrops(zone) {
    let depth = 0
    const over = (event) => event.dataTransfer?.types.includes('Files')
    this.listeners = {
      dragenter: (event) => over(event) && (depth++, zone.classList.add('over')),
      dragleave: (event) => over(event) && (--depth || zone.classList.remove('over')),
      dragover: (event) => over(event) && event.preventDefault(),
      drop: (event) => {
        if (!over(event)) return
        event.preventDefault()
        depth = 0
        zone.classList.remove('over')
        this.add([...event.dataTransfer.files])
      }
    }
    for (const [name, listener] of Object.entries(this.listeners)) document.addEventListener(name, listener)
  }

  /** Listen no more. */
  close() {
    for (const [name, listener] of Object.entries(this.listeners)) document.removeEventListener(name, listener)
  }

  #showInterrupted() {
    for (const { key, name, size, sent } of interrupted()) {
      const card = el('li.file.waiting', {}, el('div.file-body', {}, el('strong', {}, name), el('span.quiet.small', {}, `Interrupted at ${bytes(sent)} of ${bytes(size)}. Drop the file again and it goes on from there.`)))
      card.dataset.key = key
      card.append(button('', { icon: 'cross', label: `Forget ${name}`, class: 'ghost', onclick: () => (forget(key), card.remove()) }))
      this.#cards.append(card)
    }
  }

  /** Take files: each is sent, checked and shown. */
  add(files) {
    for (const file of files) this.#take(file)
  }

  async #take(file) {
    for (const card of this.#cards.querySelectorAll('.waiting')) if (card.dataset.key === new Upload(file).key) card.remove()
    const upload = new Upload(file)
    this.#uploads.add(upload)
    const bar = el('progress', { max: 100, 'aria-label': `Upload of ${file.name}` })
    bar.value = 0
    const note = el('span.quiet.small', {}, bytes(file.size))
    const body = el('div.file-body', {}, el('strong', {}, file.name), note, bar)
    const stop = button('', { icon: 'cross', label: `Stop the upload of ${file.name}`, class: 'ghost', onclick: () => (upload.stop(), card.remove()) })
    const card = el('li.file', {}, el('div.thumb', {}, icon('file')), body, stop)
    this.#cards.append(card)
    upload.addEventListener('change', () => {
      const part = file.size ? upload.sent / file.size : 1
      bar.value = 100 * part
      card.dataset.state = upload.state
      if (upload.state === 'sending') note.textContent = part < 1 ? `${bytes(upload.sent)} of ${bytes(file.size)} · ${Math.floor(100 * part)} %` : 'Sent, being checked'
      if (upload.state === 'waiting') note.textContent = `${bytes(upload.sent)} of ${bytes(file.size)} are there. ${upload.problem.status ? upload.problem.message : 'The line broke; it goes on by itself.'}`
    })
    await upload.run()
    this.#uploads.delete(upload)
    bar.remove()
    if (upload.state === 'failed') {
      card.classList.add('refused')
      fill(card.querySelector('.thumb'), icon('bang'))
      note.replaceWith(el('p.problem.small', { role: 'alert' }, upload.problem.title ? el('strong', {}, `${upload.problem.title}. `) : null, upload.problem.message))
      stop.setAttribute('aria-label', `Take ${file.name} away`)
      return
    }
    if (upload.state !== 'done') return
    card.remove()
    try {
      this.show(await get(`/v1/files/${upload.fileId}/metadata`))
    } catch (problem) {
      toast(problem.message, 'error')
    }
  }

  /** Show a file that the service has. */
  show(file) {
    if (this.ready.some((other) => other.id === file.id)) return
    this.ready.push(file)
    const usable = kindsOf(file).length > 0
    const picture = el('img', { src: `/v1/files/${file.id}/thumbnail`, alt: '', loading: 'lazy', decoding: 'async' })
    const thumb = el('div.thumb', {}, picture)
    picture.addEventListener('error', () => fill(thumb, icon('file')))
    const remove = () => {
      this.ready = this.ready.filter((other) => other !== file)
      card.remove()
      this.dispatchEvent(new Event('change'))
    }
    const card = el(
      'li.file.ready',
      { 'data-file': file.id },
      thumb,
      el('div.file-body', {}, el('strong', {}, file.filename), el('span.facts', {}, ...facts(file)), usable ? null : el('span.problem.small', {}, 'No pipeline reads this kind of file.')),
      button('', { icon: 'cross', label: `Take ${file.filename} away`, class: 'ghost', onclick: remove })
    )
    this.#cards.append(card)
    announce(`${file.filename} is there: ${facts(file).map((fact) => fact.textContent).join(', ')}`)
    this.dispatchEvent(new Event('change'))
  }

  /** Whether something is still on its way. */
  get busy() {
    return this.#uploads.size > 0
  }
}

/** What the check of a file found: grid, spacing, values. */
function facts(file) {
  const { shape_zyx: shape, spacing_mm: spacing, intensity, width, height } = file.metadata ?? {}
  const found = [kindsOf(file).map((kind) => KINDS[kind] ?? kind).join(' or ') || (KINDS[file.kind] ?? file.kind)]
  if (shape) found.push(`${[...shape].reverse().join(' × ')}`)
  if (spacing) found.push(`${spacing.map((mm) => Number(mm.toFixed(2))).join(' × ')} mm`)
  if (intensity) found.push(intensity.min < -200 ? `${Math.round(intensity.min)} to ${Math.round(intensity.max)} HU` : `values ${Math.round(intensity.min)} to ${Math.round(intensity.max)}`)
  if (width && height) found.push(`${width} × ${height} px`)
  found.push(bytes(file.size))
  return found.map((text) => el('span.fact', {}, text))
}

// --- a new execution ---------------------------------------------------------------------------------------------------------

/** Which file goes where: by phase in its name, then in the order in which they came. */
export function assign(inputs, files) {
  const chosen = {}
  const free = new Set(files)
  const fits = (input, file) => kindsOf(file).includes(input.kind)
  for (const [name, input] of Object.entries(inputs)) {
    const pattern = PHASES[input.phase] ?? PHASES[name]
    const found = pattern && [...free].find((file) => fits(input, file) && pattern.test(file.filename.replace(/\.nii(\.gz)?$/i, '')))
    if (!found) continue
    chosen[name] = input.many ? [found.id] : found.id
    free.delete(found)
  }
  for (const [name, input] of Object.entries(inputs)) {
    if (chosen[name] || input.optional) continue
    const fitting = [...free].filter((file) => fits(input, file))
    if (!fitting.length) continue
    chosen[name] = input.many ? fitting.map((file) => file.id) : fitting.at(0).id
    for (const file of input.many ? fitting : [fitting[0]]) free.delete(file)
  }
  return chosen
}

class NewRun {
  #files
  #pipelines
  #components
  #labels
  #recent
  #shell
  #chosen = null
  #form = null
  #picked = {} // input -> what somebody chose by hand
  #inputs
  #options
  #error
  #start

  constructor({ files, pipelines, components, labels, recent, shell }) {
    this.#files = files
    this.#pipelines = pipelines
    this.#components = components
    this.#labels = labels
    this.#recent = recent
    this.#shell = shell
    this.#inputs = el('div.inputs')
    this.#options = el('div')
    this.#error = el('div.problem', { role: 'alert', hidden: true })
    this.#start = button('Start', { icon: 'arrow', class: 'primary big', onclick: () => this.#run() })
    const names = el('datalist', { id: 'label-names' }, ...[...labels.keys()].map((name) => el('option', { value: name })))
    this.node = el(
      'section.card.new-run',
      { 'aria-labelledby': 'new-title' },
      el('h2', { id: 'new-title' }, 'New execution'),
      el('h3', {}, el('span.step-number', {}, '1'), 'Scans'),
      files.node,
      el('h3', {}, el('span.step-number', {}, '2'), 'Pipeline'),
      this.#choice(),
      this.#inputs,
      el('h3', {}, el('span.step-number', {}, '3'), 'Options'),
      this.#options,
      this.#error,
      el('div.row', {}, this.#start, this.#priority()),
      names
    )
    files.addEventListener('change', () => this.#showInputs())
  }

  #priority() {
    this.priority = el('select', { id: 'priority' }, el('option', { value: 'normal' }, 'normal'), el('option', { value: 'high' }, 'high'), el('option', { value: 'low' }, 'low'))
    return el('label.inline', { for: 'priority' }, 'Priority ', this.priority)
  }

  /** Pipelines of several steps as cards, the single components in a list: there are many of them. */
  #choice() {
    const several = this.#pipelines.filter(({ spec }) => spec.steps.length > 1)
    const single = this.#pipelines.filter(({ spec }) => spec.steps.length === 1)
    const cards = several.map((pipeline) => {
      const radio = el('input', { type: 'radio', name: 'pipeline', value: pipeline.id, id: `pipeline-${pipeline.name}`, onchange: () => this.choose(pipeline) })
      const takes = Object.values(pipeline.spec.inputs).map(({ kind, phase }) => `${phase === 'any' ? '' : `${phase} `}${KINDS[kind] ?? kind}`)
      return el(
        'label.pipeline',
        { 'data-pipeline': pipeline.name },
        radio,
        el('span.pipeline-title', {}, pipeline.spec.title || capital(words(pipeline.name))),
        el('span.quiet.small', {}, pipeline.spec.description),
        el('span.pipeline-foot', {}, el('span.fact', {}, takes.join(' + ')), el('span.fact', {}, icon('clock'), pipeline.expected_seconds ? about(pipeline.expected_seconds) : 'time not known yet'))
      )
    })
    this.other = el('select', { id: 'other-pipeline' }, el('option', { value: '' }, 'A single component …'), ...single.map((pipeline) => el('option', { value: pipeline.id }, pipeline.spec.title || pipeline.name)))
    this.other.addEventListener('change', () => {
      const found = this.#pipelines.find(({ id }) => id === this.other.value)
      if (found) this.choose(found)
    })
    this.about = el('p.quiet.small', {})
    return el('fieldset.pipelines', {}, el('legend.unseen', {}, 'Pipeline'), el('div.pipeline-cards', {}, ...cards), el('div.row', {}, el('label.unseen', { for: 'other-pipeline' }, 'Single component'), this.other), this.about)
  }

  /** Take a pipeline. */
  choose(pipeline) {
    this.#chosen = pipeline
    this.#picked = {}
    for (const radio of this.node.querySelectorAll('input[name=pipeline]')) radio.checked = radio.value === pipeline.id
    const single = pipeline.spec.steps.length === 1
    this.other.value = single ? pipeline.id : ''
    this.about.textContent = single ? `${pipeline.spec.description} ${pipeline.expected_seconds ? `Expected: ${about(pipeline.expected_seconds)}.` : ''}` : ''
    this.#form = schemaForm(pipeline.spec, this.#components, this.#labels)
    const limits = pipeline.spec.steps.flatMap((step) => this.#components.get(step.component)?.constraints ?? [])
    const waiting = pipeline.spec.steps.map((step) => this.#components.get(step.component)).filter((component) => component && !component.ready)
    fill(
      this.#options,
      this.#form.count ? this.#form.node : el('p.quiet.small', {}, 'This pipeline has no options.'),
      limits.length ? el('details.limits', {}, el('summary', {}, 'Limits'), el('ul', {}, ...[...new Set(limits)].map((limit) => el('li', {}, limit)))) : null,
      ...waiting.map((component) => el('p.problem.small', {}, `${component.title} is not ready: ${component.not_ready}`))
    )
    this.#showInputs()
  }

  #showInputs() {
    if (!this.#chosen) return
    const { inputs } = this.#chosen.spec
    const here = this.#files.ready
    const chosen = { ...assign(inputs, here), ...this.#picked }
    const rows = Object.entries(inputs).map(([name, input]) => {
      const id = `input-${name}`
      const fits = (file) => kindsOf(file).includes(input.kind)
      const fitting = here.filter(fits)
      const older = this.#recent.filter((file) => fits(file) && !here.some(({ id: known }) => known === file.id))
      const title = `${capital(words(name))}${input.optional ? ' (optional)' : ''}`
      const hint = [input.description, input.phase !== 'any' && `${input.phase} phase`].filter(Boolean).join(' · ')
      if (input.many) {
        const boxes = [...fitting, ...older].map((file) => el('label.inline', {}, el('input', { type: 'checkbox', value: file.id, checked: (chosen[name] ?? []).includes(file.id) }), ` ${file.filename}`))
        const group = el('div.boxes.column', { role: 'group', 'aria-label': title, 'data-input': name }, ...(boxes.length ? boxes : [el('span.quiet.small', {}, 'None yet')]))
        group.addEventListener('change', () => {
          this.#picked[name] = [...group.querySelectorAll('input:checked')].map((box) => box.value)
          this.#check()
        })
        return el('div.field', {}, el('span.label', {}, title), group, el('span.hint', {}, hint))
      }
      const options = (files) => files.map((file) => el('option', { value: file.id }, file.filename))
      const select = el(
        'select',
        { id, 'data-input': name },
        el('option', { value: '' }, input.optional ? 'none' : `choose ${KINDS[input.kind] === 'CT' ? 'a CT' : `a ${(KINDS[input.kind] ?? input.kind).toLowerCase()}`}`),
        ...options(fitting),
        older.length ? el('optgroup', { label: 'Sent earlier' }, ...older.map((file) => el('option', { value: file.id }, `${file.filename} · ${moment(file.created_at)}`))) : null
      )
      select.value = chosen[name] ?? ''
      select.addEventListener('change', () => {
        this.#picked[name] = select.value
        this.#check()
      })
      return el('div.field', {}, el('label', { for: id }, title), select, el('span.hint', {}, hint))
    })
    fill(this.#inputs, ...rows)
    this.#check()
  }

  #given() {
    const given = {}
    for (const select of this.#inputs.querySelectorAll('select')) if (select.value) given[select.dataset.input] = select.value
    for (const group of this.#inputs.querySelectorAll('[role=group]')) {
      const ids = [...group.querySelectorAll('input:checked')].map((box) => box.value)
      if (ids.length) given[group.dataset.input] = ids
    }
    return given
  }

  #check() {
    const given = this.#given()
    const missing = Object.entries(this.#chosen.spec.inputs).filter(([name, input]) => !input.optional && !given[name])
    this.#start.disabled = missing.length > 0 || !may('operator')
    this.#start.title = !may('operator') ? 'A viewer cannot start executions' : missing.length ? `Missing: ${missing.map(([name]) => words(name)).join(', ')}` : ''
  }

  async #run() {
    const steps = this.#form.read()
    this.#error.hidden = true
    if (!steps) return
    this.#start.disabled = true
    // The same wish sent twice, because an answer was lost, is one execution.
    const headers = { 'Idempotency-Key': crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}` }
    const json = { pipeline_id: this.#chosen.id, inputs: this.#given(), parameters: Object.keys(steps).length ? { steps } : {}, priority: this.priority.value }
    try {
      let answer
      for (let attempt = 0; ; attempt += 1) {
        try {
          answer = await get('/v1/executions', { json, headers })
          break
        } catch (problem) {
          if (problem.status !== 0 || attempt === 3) throw problem
          await new Promise((resolve) => setTimeout(resolve, 800 * 2 ** attempt))
        }
      }
      announce('The execution was accepted')
      this.#shell.go(`/executions/${answer.execution_id}`)
    } catch (problem) {
      const others = this.#form.complain(problem.errors ?? [])
      const all = problem.errors?.length && others.length < problem.errors.length
      fill(this.#error, el('strong', {}, `${problem.title || 'That did not work'}. `), all ? ['See the marked options. ', ...others].join(' ') : problem.message, problem.traceId ? el('span.quiet.small', {}, ` (trace ${problem.traceId})`) : null)
      this.#error.hidden = false
      this.#check()
    }
  }
}

// --- what was done -----------------------------------------------------------------------------------------------------------

class Executions {
  #shell
  #rows = new Map() // id -> {view, node, unwatch}
  #list
  #more
  #state
  #pipeline
  #cursor = null
  #timer

  constructor(shell, pipelines) {
    this.#shell = shell
    this.#state = el('select', { id: 'filter-state', 'aria-label': 'State' }, el('option', { value: '' }, 'any state'), ...STATES.map((state) => el('option', { value: state }, state)))
    this.#pipeline = el('select', { id: 'filter-pipeline', 'aria-label': 'Pipeline' }, el('option', { value: '' }, 'any pipeline'), ...pipelines.map(({ name, spec }) => el('option', { value: name }, spec.title || name)))
    for (const filter of [this.#state, this.#pipeline]) filter.addEventListener('change', () => this.load())
    this.#list = el('ul.executions', { 'aria-label': 'Executions' })
    this.#more = button('Older ones', { class: 'ghost', hidden: true, onclick: () => this.load(true) })
    this.titles = new Map(pipelines.map(({ name, spec }) => [name, spec.title || capital(words(name))]))
    this.node = el('section.card.history', { 'aria-labelledby': 'executions-title' }, el('div.pane-head', {}, el('h2', { id: 'executions-title' }, 'Executions'), el('div.row', {}, this.#state, this.#pipeline)), this.#list, this.#more)
    this.#timer = setInterval(() => this.#look(), 5000)
  }

  /** Ask for the list, or for its next page. */
  async load(more = false) {
    const query = new URLSearchParams({ limit: '25' })
    if (this.#state.value) query.set('status', this.#state.value)
    if (this.#pipeline.value) query.set('pipeline', this.#pipeline.value)
    if (more && this.#cursor) query.set('cursor', this.#cursor)
    const page = await get(`/v1/executions?${query}`)
    if (!more) this.#clear()
    for (const view of page.items) this.#put(view)
    this.#cursor = page.next_cursor
    this.#more.hidden = !page.next_cursor
    if (!this.#rows.size) fill(this.#list, el('li.empty', {}, this.#state.value || this.#pipeline.value ? 'None of these.' : 'Nothing yet. What you start appears here, and stays when you leave.'))
  }

  /** New ones that others, or another tab, started. */
  async #look() {
    if (document.hidden || this.#state.value || this.#pipeline.value) return
    const page = await get('/v1/executions?limit=25').catch(() => null)
    if (!page) return
    const fresh = page.items.filter(({ execution_id: id }) => !this.#rows.has(id))
    if (fresh.length) this.#list.querySelector('.empty')?.remove()
    for (const view of fresh.reverse()) this.#put(view, true)
  }

  #clear() {
    for (const { unwatch } of this.#rows.values()) unwatch?.()
    this.#rows.clear()
    this.#list.replaceChildren()
  }

  #put(view, first = false) {
    const id = view.execution_id
    if (this.#rows.has(id)) return
    const row = { view, node: el('li.execution', { 'data-execution': id }), unwatch: null }
    this.#rows.set(id, row)
    this.#draw(row)
    if (first) this.#list.prepend(row.node)
    else this.#list.append(row.node)
    if (!TERMINAL.has(view.status)) this.#follow(row)
  }

  #follow(row) {
    row.unwatch = this.#shell.live.watch(row.view.execution_id, (message) => {
      const before = row.view.status
      row.view = merge(row.view.steps?.length || message.type === 'snapshot' ? row.view : { ...row.view, steps: [] }, message)
      this.#draw(row)
      if (TERMINAL.has(row.view.status)) {
        row.unwatch?.()
        row.unwatch = null
        if (before !== row.view.status) announce(`${this.titles.get(row.view.pipeline) ?? row.view.pipeline}: ${row.view.status}`)
      }
    })
  }

  #draw({ view, node }) {
    const { execution_id: id, status } = view
    const running = !TERMINAL.has(status)
    const took = lasted(view.started_at, view.completed_at)
    const parts = [
      moment(view.created_at),
      status === 'pending' && (view.queue_position ? `place ${view.queue_position} in the queue` : 'waiting'),
      status === 'running' && view.current_step && words(view.current_step),
      status === 'running' && view.estimated_completion && Date.parse(view.estimated_completion) > Date.now() && `${about((Date.parse(view.estimated_completion) - Date.now()) / 1000)} left`,
      !running && took !== null && seconds(took),
      status === 'failed' && (view.error?.title ?? view.error?.detail)
    ].filter(Boolean)
    const held = document.activeElement && node.contains(document.activeElement) ? document.activeElement.dataset.act : null
    fill(
      node,
      el('span.state', { class: status }, icon({ pending: 'clock', running: 'arrow', completed: 'check', failed: 'bang', cancelled: 'dash' }[status]), el('span.unseen', {}, status)),
      el('div.execution-body', {}, el('a.execution-title', { href: `/executions/${id}`, 'data-act': 'open' }, this.titles.get(view.pipeline) ?? view.pipeline), el('span.quiet.small', {}, parts.join(' · ')), running ? bar(view) : null),
      el('div.row.tight', {}, ...this.#tools(view))
    )
    if (held) node.querySelector(`[data-act="${held}"]`)?.focus()
  }

  #tools(view) {
    if (!may('operator')) return []
    return actionsOf(view, { go: this.#shell.go, gone: () => this.#drop(view.execution_id), small: true })
  }

  #drop(id) {
    const row = this.#rows.get(id)
    row?.unwatch?.()
    row?.node.remove()
    this.#rows.delete(id)
  }

  /** Look no more. */
  close() {
    clearInterval(this.#timer)
    this.#clear()
  }
}

/** An execution's bar. */
export function bar(view) {
  const node = el('progress', { max: 100, 'aria-label': 'Progress' })
  if (view.status !== 'pending') node.value = view.progress_percentage
  return node
}

/** What can be done with an execution: cancel while it runs, retry where it failed, delete when it has ended. */
export function actionsOf(view, { go, gone, small = false }) {
  const path = `/v1/executions/${view.execution_id}`
  const attempt = (work) => async (event) => {
    const pressed = event.currentTarget
    pressed.disabled = true
    try {
      await work()
    } catch (problem) {
      toast(problem.message, 'error')
    } finally {
      pressed.disabled = false
    }
  }
  const made = (name, symbol, act, run) => button(small ? '' : name, { icon: symbol, label: small ? name : undefined, class: 'ghost', 'data-act': act, onclick: attempt(run) })
  const tools = []
  if (!TERMINAL.has(view.status)) {
    tools.push(
      made(view.cancel_requested_at ? 'Stopping' : 'Cancel', 'stop', 'cancel', async () => {
        await ask(`${path}/cancel`, { method: 'POST' })
        announce('It is being stopped')
      })
    )
  }
  if (view.status === 'failed' || view.status === 'cancelled') {
    tools.push(made('Retry', 'retry', 'retry', async () => go(`/executions/${(await get(`${path}/retry`, { method: 'POST' })).execution_id}`)))
  }
  if (TERMINAL.has(view.status)) {
    tools.push(
      made('Delete', 'trash', 'delete', async () => {
        if (!(await confirmed('Delete this execution and its results? Uploaded scans stay.', 'Delete'))) return
        await ask(path, { method: 'DELETE' })
        announce('Deleted')
        gone()
      })
    )
  }
  return tools
}

// --- the page ----------------------------------------------------------------------------------------------------------------

/** Show `/`; returns what ends it. */
export async function startPage(main, shell) {
  document.title = 'scangraph'
  const [pipelines, components, labels, nifti, pictures] = await Promise.all([
    getAll('/v1/pipelines?limit=200'),
    get('/v1/components'),
    get('/v1/labels'),
    get('/v1/files?origin=upload&kind=nifti&limit=12'),
    get('/v1/files?origin=upload&kind=image2d&limit=12')
  ])
  const order = [...pipelines].sort((a, b) => Number(a.built_in) - Number(b.built_in) || a.name.localeCompare(b.name))
  const files = new Files()
  const history = new Executions(shell, order)
  const run = new NewRun({
    files,
    pipelines: order,
    components: new Map(components.items.map((component) => [component.id, component])),
    labels: new Map(labels.items.map(({ name, number }) => [name, number])),
    recent: [...nifti.items, ...pictures.items],
    shell
  })
  fill(main, el('h1.unseen', {}, 'scangraph'), el('div.start', {}, may('operator') ? run.node : null, history.node))
  const first = order.find(({ spec }) => spec.steps.length > 1) ?? order[0]
  if (first) run.choose(first)
  await history.load()
  shell.keys.set('u', { name: 'Choose files', run: () => document.getElementById('pick')?.click() })
  const unload = (event) => {
    if (files.busy) event.preventDefault()
  }
  addEventListener('beforeunload', unload)
  return () => {
    removeEventListener('beforeunload', unload)
    files.close()
    history.close()
  }
}
