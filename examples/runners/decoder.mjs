// A runner of kvconform's vectors in JavaScript: exported decoders with past_key_values in onnxruntime-node.
//
//   kvconform vectors write vectors
//   python export_decoders.py vectors decoders
//   npm install onnxruntime-node
//   node decoder.mjs vectors answers decoders [--fault keys-only]
//   kvconform vectors judge vectors answers
//
// The presents of a step are the pasts of the next, and are never changed. docs/interpreting.md says what a runner must do.
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'

import { Refused, answer } from './attention.mjs'

const ort = createRequire(join(process.cwd(), 'package.json'))('onnxruntime-node')

/** Rows or positions of a past `(b, g, s, d)`: `rows` in that order, and the first `length` positions. */
function cut(past, rows, length) {
  const [, g, s, d] = past.dims
  const data = new Float32Array(rows.length * g * length * d)
  rows.forEach((row, r) => {
    for (let head = 0; head < g; head++) {
      const from = (row * g + head) * s * d
      data.set(past.data.subarray(from, from + length * d), (r * g + head) * length * d)
    }
  })
  return new ort.Tensor('float32', data, [rows.length, g, length, d])
}

class Sequence {
  constructor(decoder, batch) {
    Object.assign(this, { decoder, batch })
    this.reset()
  }

  get length() {
    return this.pasts[0].dims[2]
  }

  async append({ last_only: last }, { 'token ids': ids }) {
    const { config } = this.decoder
    const [b, t] = ids.shape
    const known = x => x >= 0n && x < BigInt(config.vocabulary)
    if (ids.dtype !== 'I64' || ids.shape.length !== 2 || b !== this.batch || !ids.data.every(known)) {
      throw new Refused('malformed inputs')
    }
    if (this.length + t > config.capacity) throw new Refused('beyond the capacity')
    if (!t) return { dtype: 'F32', shape: [b, 0, config.vocabulary], data: new Float32Array() }
    return this.run(ids.data, t, last)
  }

  async run(ids, t, last) {
    const { config, session, names } = this.decoder
    const asked = BigInt64Array.from({ length: last ? 1 : t }, (_, i) => BigInt(last ? t - 1 : i))
    const feeds = {
      input_ids: new ort.Tensor('int64', ids, [this.batch, t]),
      logit_positions: new ort.Tensor('int64', asked, [asked.length])
    }
    names.forEach((name, i) => { feeds[`past_key_values.${name}`] = this.pasts[i] })
    const found = await session.run(feeds)
    this.pasts = names.map(name => found[`present.${name}`])
    return { dtype: 'F32', shape: [this.batch, asked.length, config.vocabulary], data: found.logits.data }
  }

  /** The `count` tokens that follow greedily, `(b, count)`. */
  async generate({ new: count }, { 'token ids': ids }) {
    const v = this.decoder.config.vocabulary
    const made = new BigInt64Array(this.batch * count)
    let [tokens, t] = [ids.data, ids.shape[1]]
    for (let i = 0; i < count; i++) {
      const { data } = await this.run(tokens, t, true)
      tokens = BigInt64Array.from({ length: this.batch }, (_, r) => {
        const logits = data.subarray(r * v, (r + 1) * v)
        return BigInt(logits.indexOf(logits.reduce((a, b) => Math.max(a, b))))
      })
      tokens.forEach((token, r) => { made[r * count + i] = token })
      t = 1
    }
    return { dtype: 'I64', shape: [this.batch, count], data: made }
  }

  truncate({ length }) {
    if (length < 0 || length > this.length) throw new Refused('no such tokens')
    this.pasts = this.pasts.map(past => cut(past, [...Array(this.batch).keys()], length))
  }

  fork() {
    return Object.assign(Object.create(Sequence.prototype), this)
  }

  reorder({ rows }) {
    if (rows.some(row => row < 0 || row >= this.batch)) throw new Refused('no such row')
    const moved = i => this.decoder.fault !== 'keys-only' || i % 2 === 0 || rows.length !== this.batch
    this.pasts = this.pasts.map((past, i) => (moved(i) ? cut(past, rows, this.length) : past))
    this.batch = rows.length
  }

  reset() {
    const { config, names } = this.decoder
    const shape = [this.batch, config.kv_heads, 0, config.head_dim]
    this.pasts = names.map(() => new ort.Tensor('float32', new Float32Array(), shape))
  }
}

const [folder, out, decoders, option, fault] = process.argv.slice(2)
if (!decoders || (option && (option !== '--fault' || fault !== 'keys-only'))) {
  console.error('usage: node decoder.mjs VECTORS ANSWERS DECODERS [--fault keys-only]')
  process.exit(2)
}
const unsupported = {
  ragged: 'the graph has one length for all rows',
  'ragged at any time': 'the graph has one length for all rows',
  'left padding': 'the graph has one length for all rows',
  truncate_rows: 'the graph has one length for all rows',
  contexts: 'the graph has no input for them',
  poison: 'a past has no slot without a token',
  'poison-safe slots': 'a past has no slot without a token'
}
await answer(folder, out, 'decoder-onnxruntime-node', unsupported, async (name, { config }) => {
  if (config.profile !== 'decoder') return 'is a decoder'
  const file = join(decoders, `${name}.onnx`)
  if (!existsSync(file)) return 'was not exported'
  const session = await ort.InferenceSession.create(file, { intraOpNumThreads: 1 })
  const names = [...Array(config.layers).keys()].flatMap(layer => [`${layer}.key`, `${layer}.value`])
  return { sequence: batch => new Sequence({ config, session, names, fault }, batch) }
})
