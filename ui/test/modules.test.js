// What needs no browser: `node --test ui/test/`.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { groupOf } from '../src/groups.js'
import { plain } from '../src/schema-form.js'
import { curl, program } from '../src/snippets.js'
import { assign } from '../src/start-page.js'

globalThis.location = { origin: 'https://scans.example.org' }

const ct = (id, filename) => ({ id, filename, kind: 'nifti', metadata: { readable_as: ['image'] } })

test('phases are found in names, the rest goes by order', () => {
  const inputs = { arterial: { kind: 'image', phase: 'arterial' }, portal: { kind: 'image', phase: 'portal' } }
  assert.deepEqual(assign(inputs, [ct(1, 'p_venous.nii.gz'), ct(2, 'ct_A.nii')]), { arterial: 2, portal: 1 })
  assert.deepEqual(assign(inputs, [ct(1, 'first.nii.gz'), ct(2, 'second.nii.gz')]), { arterial: 1, portal: 2 })
  assert.deepEqual(assign({ masks: { kind: 'mask', phase: 'any', many: true } }, [ct(1, 'x.nii')]), {})
})

test('null is taken out of a choice, its rules stay', () => {
  const schema = { properties: { n: { anyOf: [{ type: 'integer', minimum: 3 }, { type: 'null' }], default: null } } }
  const found = plain(schema.properties.n, schema)
  assert.equal(found.type, 'integer')
  assert.equal(found.minimum, 3)
  assert.equal(found.nullable, true)
  const root = { $defs: { Side: { enum: ['left', 'right'] } } }
  assert.deepEqual(plain({ $ref: '#/$defs/Side' }, root).enum, ['left', 'right'])
})

test('structures are grouped by their names', () => {
  const groups = { vertebrae_L5: 'Bones', iliac_vena_left: 'Vessels', kidney_left: 'Organs', kidney_cyst_left: 'Findings', gluteus_maximus_right: 'Muscles', something_new: 'Other', rib_left_4: 'Bones', lung_upper_lobe_left: 'Airways and lungs' }
  for (const [name, group] of Object.entries(groups)) assert.equal(groupOf(name, name !== 'something_new'), group, name)
})

test('a run is written again as curl and as Python', () => {
  const execution = {
    pipeline: 'organs',
    revision: 2,
    inputs: { image: { file_id: 'abc', path: 'files/abc', label_scheme: null }, masks: [{ file_id: null, path: "o'hara.nii", label_scheme: null }] },
    parameters: { steps: { organs: {}, scene: { strict: true, structures: [1, 2] } } }
  }
  assert.match(curl(execution), /o'\\''hara\.nii/)
  assert.match(curl(execution), /organs@2/)
  assert.match(program(execution), /"strict": True/)
  assert.doesNotMatch(program(execution), /"organs": \{\}/)
})
