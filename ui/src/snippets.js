// The same run again, for a terminal and for Python.

const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`

/** JSON as Python writes it. */
function python(value, indent = '') {
  if (value === null || value === undefined) return 'None'
  if (typeof value === 'boolean') return value ? 'True' : 'False'
  if (typeof value !== 'object') return JSON.stringify(value)
  const deeper = `${indent}    `
  if (Array.isArray(value)) return `[${value.map((one) => python(one, deeper)).join(', ')}]`
  const entries = Object.entries(value)
  if (!entries.length) return '{}'
  const flat = `{${entries.map(([key, one]) => `${JSON.stringify(key)}: ${python(one, deeper)}`).join(', ')}}`
  if (flat.length < 80) return flat
  return `{\n${entries.map(([key, one]) => `${deeper}${JSON.stringify(key)}: ${python(one, deeper)},`).join('\n')}\n${indent}}`
}

/** What the run was asked for: the pipeline's revision, inputs by id or path, and the parameters that were given. */
function wish(execution) {
  const one = ({ file_id, path, label_scheme }) => (label_scheme ? { ...(file_id ? { file_id } : { path }), label_scheme } : (file_id ?? path))
  const inputs = Object.fromEntries(Object.entries(execution.inputs).map(([name, given]) => [name, Array.isArray(given) ? given.map(one) : one(given)]))
  const steps = Object.fromEntries(Object.entries(execution.parameters.steps ?? {}).filter(([, values]) => Object.keys(values).length))
  const parameters = Object.keys(steps).length ? { steps } : {}
  return { pipeline_id: `${execution.pipeline}@${execution.revision}`, inputs, parameters }
}

/** A command for a terminal. */
export function curl(execution) {
  const body = JSON.stringify(wish(execution), null, 1).replace(/\n\s*/g, ' ')
  return `curl ${location.origin}/v1/executions \\
  -H "Authorization: Bearer $TOKEN" -H 'Prefer: wait=300' \\
  -H 'Content-Type: application/json' \\
  -d ${quoted(body)}`
}

/** A program with scangraph's client. */
export function program(execution) {
  const { pipeline_id: pipeline, inputs, parameters } = wish(execution)
  const stored = Object.values(execution.inputs).flat().some((input) => !input.file_id)
  const given = Object.keys(parameters).length ? `,\n        parameters=${python(parameters, '        ')}` : ''
  return `from scangraph import Client

with Client(${JSON.stringify(location.origin)}) as client:
    client.login("name", "password")
${stored ? '    # a path in the server\u2019s storage is given as scangraph.contracts.api.InputFile(path=\u2026)\n' : ''}    done = client.run(
        ${JSON.stringify(pipeline)},
        ${python(inputs, '        ')},
        "results"${given},
    )
    print(done.files, done.execution.warnings)`
}
