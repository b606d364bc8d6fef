// What others wrote and the bundle holds, with their licences; some packages carry the text, the others only its name.
import { existsSync, readFileSync, readdirSync } from 'node:fs'

const BUNDLED = ['@niivue/niivue', '@lukeed/uuid', '@ungap/structured-clone', 'array-equal', 'fflate', 'gl-matrix', 'nifti-reader-js']

/** NiiVue's package has no licence file; this is the one of its repository. */
const NIIVUE = `BSD 2-Clause License

Copyright (c) 2021, Niivue
All rights reserved.

Redistribution and use in source and binary forms, with or without modification, are permitted provided that the following
conditions are met:

1. Redistributions of source code must retain the above copyright notice, this list of conditions and the following disclaimer.

2. Redistributions in binary form must reproduce the above copyright notice, this list of conditions and the following
   disclaimer in the documentation and/or other materials provided with the distribution.

THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS" AND ANY EXPRESS OR IMPLIED WARRANTIES, INCLUDING, BUT
NOT LIMITED TO, THE IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE ARE DISCLAIMED. IN NO EVENT SHALL
THE COPYRIGHT HOLDER OR CONTRIBUTORS BE LIABLE FOR ANY DIRECT, INDIRECT, INCIDENTAL, SPECIAL, EXEMPLARY, OR CONSEQUENTIAL DAMAGES
(INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF SUBSTITUTE GOODS OR SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS
INTERRUPTION) HOWEVER CAUSED AND ON ANY THEORY OF LIABILITY, WHETHER IN CONTRACT, STRICT LIABILITY, OR TORT (INCLUDING NEGLIGENCE OR
OTHERWISE) ARISING IN ANY WAY OUT OF THE USE OF THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE.
`

/** Return one text with name, version and licence of every bundled package. */
export function notices(root) {
  const parts = BUNDLED.map((name) => {
    const folder = new URL(`node_modules/${name}/`, root)
    const about = JSON.parse(readFileSync(new URL('package.json', folder)))
    const file = readdirSync(folder).find((entry) => /^licen[cs]e/i.test(entry))
    const text = file && existsSync(new URL(file, folder)) ? readFileSync(new URL(file, folder), 'utf8') : name === '@niivue/niivue' ? NIIVUE : ''
    return `${name} ${about.version} (${about.license ?? 'see below'})\n\n${text.trim()}\n`
  })
  return `The page of scangraph holds these packages of others.\n\n${parts.join(`\n${'-'.repeat(100)}\n\n`)}`
}
