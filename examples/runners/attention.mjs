// A runner of kvconform's vectors in JavaScript, for Node without packages: an attention layer with a KV cache.
//
//   kvconform vectors write vectors
//   node attention.mjs vectors answers [--fault shared-fork]
//   kvconform vectors judge vectors answers
//
// It answers the vectors of the attention profile in float32. docs/interpreting.md says what a runner must do.
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { pathToFileURL } from 'node:url'

// --- safetensors: a length, a JSON header, and the bytes of the tensors (on little-endian machines) ---
const ARRAYS = {
  F32: Float32Array, F64: Float64Array, I64: BigInt64Array, I32: Int32Array, U8: Uint8Array, BOOL: Uint8Array
}

/** The tensors in a file, by name: `{dtype, shape, data}`. */
export function readTensors(path) {
  const file = readFileSync(path)
  const length = Number(file.readBigUInt64LE(0))
  const header = JSON.parse(file.toString('utf8', 8, 8 + length))
  delete header.__metadata__
  const tensors = {}
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(header)) {
    const bytes = new Uint8Array(file.subarray(8 + length + begin, 8 + length + end)) // a copy, which is aligned
    tensors[name] = { dtype, shape, data: new ARRAYS[dtype](bytes.buffer) }
  }
  return tensors
}

export function writeTensors(path, tensors) {
  const header = {}
  const parts = []
  let size = 0
  for (const [name, { dtype, shape, data }] of Object.entries(tensors)) {
    const bytes = Buffer.from(data.buffer, data.byteOffset, data.byteLength)
    header[name] = { dtype, shape, data_offsets: [size, size + bytes.length] }
    size += bytes.length
    parts.push(bytes)
  }
  let text = JSON.stringify(header)
  text = text.padEnd(Math.ceil(text.length / 8) * 8)
  const length = Buffer.alloc(8)
  length.writeBigUInt64LE(BigInt(text.length))
  mkdirSync(dirname(path), { recursive: true })
  writeFileSync(path, Buffer.concat([length, Buffer.from(text), ...parts]))
}

/** Answers the vectors of a set. `opened(name, entry)` gives the implementation of a config, or the reason why there is
 *  none. It has `sequence(rows)`, and sequences have methods that are named as the calls. */
export async function answer(folder, out, runner, unsupported, opened) {
  const manifest = JSON.parse(readFileSync(join(folder, 'manifest.json'), 'utf8'))
  const layers = {}
  for (const [name, entry] of Object.entries(manifest.configs)) {
    const layer = await opened(name, entry)
    if (typeof layer === 'string') unsupported[name] = layer
    else layers[name] = layer
  }
  let answered = 0
  for (const vector of manifest.vectors) {
    if ([vector.config, ...vector.needs].some(name => name in unsupported)) continue
    const given = readTensors(join(folder, `${vector.name}.safetensors`))
    const answers = {}
    for (const [p, steps] of vector.programs.entries()) {
      const open = new Map()
      for (const [i, { call, tensors }] of steps.entries()) {
        const inputs = Object.fromEntries(Object.entries(tensors).map(([role, name]) => [role, given[name]]))
        const output = await run(layers[vector.config], open, call, inputs)
        if (output) answers[`${p}.${i}`] = output
      }
    }
    writeTensors(join(out, `${vector.name}.safetensors`), answers)
    answered += 1
  }
  const told = { schema: 'kvconform-answers/1', runner, digest: manifest.digest, unsupported }
  mkdirSync(out, { recursive: true })
  writeFileSync(join(out, 'answers.json'), JSON.stringify(told))
  console.log(`${answered} vectors answered`)
}

export class Refused extends Error {}

async function run(layer, open, call, inputs) {
  const sequence = open.get(call.seq)
  switch (call.op) {
    case 'append': {
      const grown = sequence ?? layer.sequence(call.counts.length)
      const output = await grown.append(call, inputs)
      open.set(call.seq, grown)
      return output
    }
    case 'uncached_forward':
      return layer.sequence(call.counts.length).append(call, inputs)
    case 'generate':
      return layer.sequence(call.counts.length).generate(call, inputs)
    case 'fork':
      open.set(call.into, sequence.fork())
      return null
    case 'close':
      open.delete(call.seq)
      return null
    case 'reject':
      return { dtype: 'U8', shape: [1], data: Uint8Array.of(await refuses(layer, open, call.step, inputs)) }
    case 'truncate':
    case 'reorder':
    case 'reset':
    case 'poison':
      sequence[call.op](call)
      return null
  }
  throw new Error(`unknown operation ${call.op}`)
}

async function refuses(layer, open, call, inputs) {
  try {
    await run(layer, open, call, inputs)
  } catch (error) {
    if (error instanceof Refused) return 1
    throw error
  }
  return 0
}

// --- an attention layer: each row keeps a list of tokens, {key, value}, each (g, d) ---
class Rows {
  constructor(config, number, fault) {
    Object.assign(this, { config, fault, rows: Array.from({ length: number }, () => []) })
  }

  append({ counts, pad }, { query, key, value, mask }) {
    const c = this.config
    const [h, g, d, t] = [c.heads, c.kv_heads, c.head_dim, Math.max(...counts)]
    const want = (tensor, heads) =>
      tensor.dtype === 'F32' && String(tensor.shape) === String([this.rows.length, heads, t, d])
    if (counts.length !== this.rows.length || !want(query, h) || !want(key, g) || !want(value, g)) {
      throw new Refused('malformed inputs')
    }
    if (this.rows.some((row, r) => row.length + counts[r] > c.capacity)) throw new Refused('beyond the capacity')
    const output = new Float32Array(query.data.length)
    this.rows.forEach((row, r) => {
      const past = row.length
      const first = pad?.[0] === 'left' ? t - counts[r] : 0
      const cut = (tensor, heads, head, i) => {
        const from = ((r * heads + head) * t + first + i) * d
        return tensor.data.subarray(from, from + d)
      }
      for (let i = 0; i < counts[r]; i++) {
        const all = tensor => Array.from({ length: g }, (_, head) => Float32Array.from(cut(tensor, g, head, i)))
        row.push({ key: all(key), value: all(value) })
      }
      const hidden = j => mask && !mask.data[r * mask.shape[1] + j]
      for (let head = 0; head < h; head++) {
        for (let i = 0; i < counts[r]; i++) {
          const made = this.attend(row, past + i, head, cut(query, h, head, i), hidden)
          output.set(made, ((r * h + head) * t + first + i) * d)
        }
      }
    })
    return { dtype: 'F32', shape: query.shape, data: output }
  }

  /** The output of the query at position `at` on all tokens that it sees. */
  attend(row, at, head, query, hidden) {
    const c = this.config
    const group = Math.floor(head / (c.heads / c.kv_heads))
    const scale = c.scale ?? 1 / Math.sqrt(c.head_dim)
    const sink = c.sink === null ? -Infinity : (c.sink * (head + 1)) / c.heads
    const seen = []
    for (let j = c.window === null ? 0 : Math.max(0, at - c.window + 1); j <= at; j++) {
      if (hidden(j)) continue
      let score = row[j].key[group].reduce((sum, x, k) => sum + x * query[k], 0) * scale
      if (c.softcap !== null) score = c.softcap * Math.tanh(score / c.softcap)
      if (c.positions === 'alibi') score += 2 ** ((-8 * (head + 1)) / c.heads) * (j - at)
      seen.push([score, row[j].value[group]])
    }
    const output = new Float64Array(c.head_dim)
    if (!seen.length) return output
    const top = seen.reduce((most, [score]) => Math.max(most, score), sink)
    let total = Math.exp(sink - top)
    for (const [score, value] of seen) {
      const weight = Math.exp(score - top)
      total += weight
      value.forEach((x, k) => { output[k] += weight * x })
    }
    return output.map(x => x / total)
  }

  truncate({ length }) {
    const kept = this.rows.map((_, r) => (Array.isArray(length) ? length[r] : length))
    if (this.rows.some((row, r) => kept[r] < 0 || kept[r] > row.length)) throw new Refused('no such tokens')
    this.rows.forEach((row, r) => { row.length = kept[r] })
  }

  fork() {
    const copy = new Rows(this.config, 0, this.fault)
    copy.rows = this.fault === 'shared-fork' ? this.rows : this.rows.map(row => [...row])
    return copy
  }

  reorder({ rows }) {
    if (rows.some(r => !(r in this.rows))) throw new Refused('no such row')
    this.rows = rows.map(r => [...this.rows[r]])
  }

  reset() {
    this.rows = this.rows.map(() => [])
  }

  poison() {} // no slot is without a token
}

if (import.meta.url === pathToFileURL(process.argv[1]).href) {
  const [folder, out, option, fault] = process.argv.slice(2)
  if (!out || (option && (option !== '--fault' || fault !== 'shared-fork'))) {
    console.error('usage: node attention.mjs VECTORS ANSWERS [--fault shared-fork]')
    process.exit(2)
  }
  await answer(folder, out, 'attention-js', {}, (_name, { config }) => {
    if (config.profile !== 'attention') return 'is an attention layer'
    if (config.dtype !== 'float32') return 'computes in float32'
    return { sequence: rows => new Rows(config, rows, fault) }
  })
}
