// A form out of JSON Schema: what a component declares is all that is known of it, so new ones need nothing here.
// Only what differs from the default is sent.

import { el } from './dom.js'
import { capital, unitOf, words } from './format.js'

/** Follow `$ref` and take `null` out of a choice. */
export function plain(schema, root) {
  let found = schema
  while (found.$ref) found = { ...root.$defs[found.$ref.split('/').pop()], ...found, $ref: undefined }
  const options = found.anyOf ?? found.oneOf
  if (!options) return { ...found, nullable: [found.type].flat().includes('null') }
  const others = options.map((option) => plain(option, root)).filter((option) => option.type !== 'null')
  if (others.length === 1) return { ...others[0], ...found, anyOf: undefined, nullable: options.length > 1, type: others[0].type }
  return { ...found, type: 'json', nullable: options.length > others.length }
}

const same = (a, b) => JSON.stringify(a ?? null) === JSON.stringify(b ?? null)

function shown(value) {
  if (value === null || value === undefined) return 'unset'
  if (Array.isArray(value)) return value.length ? value.join(', ') : 'none'
  if (typeof value === 'boolean') return value ? 'yes' : 'no'
  return typeof value === 'object' ? JSON.stringify(value) : String(value)
}

/** What a number may be, in words. */
function range(schema) {
  const low = schema.minimum ?? schema.exclusiveMinimum
  const high = schema.maximum ?? schema.exclusiveMaximum
  const above = schema.exclusiveMinimum !== undefined ? 'above ' : 'from '
  const below = schema.exclusiveMaximum !== undefined ? 'below ' : 'to '
  if (low !== undefined && high !== undefined) return `${above === 'from ' ? '' : above}${low} ${below === 'to ' ? 'to' : 'and below'} ${high}`
  if (low !== undefined) return `${above}${low}`
  if (high !== undefined) return `${below === 'to ' ? 'up to' : 'below'} ${high}`
  return ''
}

/** A number that can be read, or undefined where nothing is written; throws with what is wrong. */
function numeric(text, schema) {
  if (text.trim() === '') return undefined
  const value = Number(text.replace(',', '.'))
  if (!Number.isFinite(value)) throw new Error('This is not a number.')
  if (schema.type === 'integer' && !Number.isInteger(value)) throw new Error('A whole number, please.')
  const fits =
    !(value < schema.minimum) && !(value > schema.maximum) && !(value <= schema.exclusiveMinimum) && !(value >= schema.exclusiveMaximum)
  if (!fits) throw new Error(`Allowed: ${range(schema)}.`)
  return value
}

/**
 * One field.
 *
 * @returns {{node: HTMLElement, read: Function, complain: Function}} `read()` gives the value, undefined for the default
 */
function field(name, schema, preset, id, context) {
  const fallback = preset === undefined ? (schema.default ?? null) : preset
  const hint = el('span.hint', { id: `${id}-hint` })
  const error = el('span.field-error', { id: `${id}-error`, role: 'alert', hidden: true })
  const about = { id, name: id, 'aria-describedby': `${id}-hint ${id}-error` }
  const unit = unitOf(name)
  let control
  let read
  let group = false

  const choices = schema.enum ?? (schema.const !== undefined ? [schema.const] : null)
  const models = name === 'model' && context.models?.length ? context.models.map((model) => model.id) : null
  if (choices || models) {
    const values = choices ?? models
    const empty = schema.nullable || models ? [el('option', { value: '' }, fallback === null ? 'default' : `default (${shown(fallback)})`)] : []
    control = el('select', about, ...empty, ...values.map((value, n) => el('option', { value: String(n) }, words(value))))
    if (!empty.length) control.value = String(Math.max(values.indexOf(fallback), 0))
    read = () => (control.value === '' ? undefined : values[Number(control.value)])
  } else if (schema.type === 'boolean') {
    control = el('select', about, el('option', { value: '' }, `default (${shown(fallback)})`), el('option', { value: '1' }, 'yes'), el('option', { value: '0' }, 'no'))
    read = () => (control.value === '' ? undefined : control.value === '1')
  } else if (schema.type === 'number' || schema.type === 'integer') {
    control = el('input', { ...about, inputmode: 'decimal', placeholder: shown(fallback), autocomplete: 'off' })
    read = () => numeric(control.value, schema)
  } else if (schema.type === 'array' && schema.items?.enum) {
    group = true
    const boxes = schema.items.enum.map((value) => el('input', { type: 'checkbox', value, checked: (fallback ?? []).includes(value), id: `${id}-${value}` }))
    control = el('span.boxes', { id, role: 'group', 'aria-describedby': about['aria-describedby'] }, ...boxes.map((box) => el('label.inline', {}, box, ` ${box.value}`)))
    read = () => boxes.filter((box) => box.checked).map((box) => box.value)
  } else if (schema.type === 'array' && ['integer', 'number', 'string'].includes(schema.items?.type)) {
    const named = schema.items.type === 'integer' && /label/.test(schema.description ?? '') && context.labels?.size
    control = el('input', { ...about, placeholder: shown(fallback), autocomplete: 'off', ...(named ? { list: 'label-names' } : {}) })
    if (named) hint.append('Names or numbers, with commas. ')
    read = () => {
      const parts = control.value.split(',').map((part) => part.trim()).filter(Boolean)
      if (!parts.length) return undefined
      if (schema.items.type === 'string') return parts
      return parts.map((part) => {
        const number = named ? context.labels.get(part.replace(/\s+/g, '_').toLowerCase()) : undefined
        if (number !== undefined) return number
        if (!/^-?\d/.test(part)) throw new Error(named ? `There is no structure “${part}”.` : `“${part}” is not a number.`)
        return numeric(part, schema.items)
      })
    }
  } else if (schema.type === 'string') {
    control = el('input', { ...about, placeholder: shown(fallback), autocomplete: 'off', maxlength: schema.maxLength })
    read = () => control.value || undefined
  } else {
    control = el('textarea', { ...about, rows: 2, placeholder: shown(fallback), spellcheck: 'false' })
    hint.append('As JSON. ')
    read = () => {
      if (!control.value.trim()) return undefined
      try {
        return JSON.parse(control.value)
      } catch {
        throw new Error('This is not JSON.')
      }
    }
  }

  hint.append([schema.description && `${capital(schema.description)}.`, range(schema) && `${capital(range(schema))}.`].filter(Boolean).join(' '))
  const title = capital(words(unit ? name.replace(/_[^_]+$/, '') : name))
  const label = el(group ? 'span' : 'label', group ? { class: 'label', id: `${id}-label` } : { for: id }, title, unit ? el('span.unit', {}, ` ${unit}`) : null)
  if (group) control.setAttribute('aria-labelledby', `${id}-label`)
  const node = el('div.field', { 'data-parameter': name }, label, control, error, hint)

  const complain = (text) => {
    error.textContent = text ?? ''
    error.hidden = !text
    hint.hidden = Boolean(text) // the fault takes its place: nothing moves away from under a click
    control.setAttribute('aria-invalid', text ? 'true' : 'false')
    if (group) control.removeAttribute('aria-invalid')
    node.classList.toggle('wrong', Boolean(text))
  }
  const value = () => {
    complain(null)
    const found = read()
    return found === undefined || same(found, fallback) ? undefined : found
  }
  control.addEventListener('input', () => complain(null))
  control.addEventListener('change', () => {
    try {
      value()
    } catch (problem) {
      complain(problem.message)
    }
  })
  return { node, read: value, complain, control }
}

/**
 * The options of a pipeline, a group for each step that has any.
 *
 * @param {object} spec the pipeline
 * @param {Map} components by id
 * @param {Map} labels name -> number
 * @returns {{node: HTMLElement, read: Function, complain: Function}} `read()` gives `{step: {name: value}}` of what was
 *   changed, or null with the faults shown; `complain(errors)` shows a 422's and returns those that belong to no field
 */
export function schemaForm(spec, components, labels) {
  const fields = new Map()
  const groups = spec.steps.flatMap((step) => {
    const component = components.get(step.component)
    const schema = component?.parameters ?? {}
    const properties = Object.entries(schema.properties ?? {})
    if (!properties.length) return []
    const nodes = properties.map(([name, raw]) => {
      const one = field(name, plain(raw, schema), step.parameters[name], `option-${step.id}-${name}`, { models: component.models, labels })
      fields.set(`${step.id}/${name}`, one)
      return one.node
    })
    const summary = el('summary', {}, el('span', {}, capital(component.title ?? words(step.id))), el('span.quiet.small', {}, ` ${step.id} · ${properties.length} option${properties.length > 1 ? 's' : ''}`))
    return [el('details.options', { 'data-step': step.id }, summary, el('div.fields', {}, ...nodes))]
  })
  const node = el('div.option-groups', {}, ...groups)

  const reveal = (one) => {
    one.node.closest('details').open = true
    one.control.focus()
  }
  return {
    node,
    count: fields.size,
    read() {
      const found = {}
      let wrong = null
      for (const [key, one] of fields) {
        const [step, name] = key.split('/')
        try {
          const value = one.read()
          if (value !== undefined) (found[step] ??= {})[name] = value
        } catch (problem) {
          one.complain(problem.message)
          wrong ??= one
        }
      }
      if (wrong) reveal(wrong)
      return wrong ? null : found
    },
    complain(errors) {
      const others = []
      let first = null
      for (const { pointer, detail } of errors) {
        const [, root, kind, step, name] = pointer.split('/')
        const one = root === 'parameters' && kind === 'steps' ? fields.get(`${step}/${name}`) : null
        if (one) {
          one.complain(capital(detail.replace(/^step '[^']*': /, '')))
          first ??= one
        } else {
          others.push(detail)
        }
      }
      if (first) reveal(first)
      return others
    }
  }
}
