"use strict";
// A language model and its viewer in one script without libraries. It runs three times: in the page (the viewer, from
// "the page" on), in a worker for each model (the network and the sampler), and in Node, where the tests call both.
// Letters as in the Python files: T positions, S positions that attention sees, V vocabulary, C embedding, H heads, D = C / H.
//
// The data that page.py writes into the page:
// history: {"label", "tokens": [text, ...], "start": [token, ...], "frames": [[nfe, seconds, written, beliefs], ...]}. A
//     token is an index into "tokens", -1 a mask. A frame is one network evaluation, its numbers are those so far.
//     written: [[position, token, probability], ...], by the sampler or anew by a correction; a position just past the
//         end makes the text longer (GPT).
//     beliefs: {position: [token, p, token, p, ...]}, likeliest first: what the network believed at this step, before
//         anything was written, of every position that was masked then.
// model: {"name", "causal", "config", "ngrams", "characters", "tensors"}: "characters" are the texts of all ids, "ngrams"
//     the offsets of each kind, "tensors" {name: {"shape": (n, k), "offset", "scales"}}: at the offset n k numbers of 8
//     bits, then so many float32 scales (`quantized`). The weights, gzip in base64, follow in elements of their own.
//     On the pretrained models, 8 bits change the loss by 0.001 nats and the distributions by a KL of 0.0001.

// ============================================================================================== matrix products
// The kernel multiplies two rows of x by a matrix. Matrices lie in tiles of eight columns, row after row within a tile,
// so that both are read in order: eight sums a row are kept in four registers. In WebAssembly this is 8 times as fast as
// in JavaScript (11.5 against 1.5 GMAC/s), so the page assembles its kernel itself: the bytes are listed in the order of
// the specification (webassembly.github.io/spec/core/binary). Where it is not allowed, `plainKernel` does the same.
const ceil8 = (n) => (n + 7) & ~7;

// kernel(x, strideX, w, strideW, out, strideOut, K, tiles): bytes; K: four times the length of the sums.
function assembleKernel() {
  const leb = (n) => (n < 128 ? [n] : [(n & 127) | 128, ...leb(n >> 7)]);
  const [x, strideX, w, strideW, out, strideOut, K, tiles, end, p, x0, x1, a0, a1, b0, b1, w0, w1, v] = Array(19).keys();
  const get = (i) => [0x20, i], set = (i) => [0x21, i], number = (n) => [0x41, n], plus = 0x6a;
  const move = (i, by) => [...get(i), ...by, plus, ...set(i)];
  const load = (offset) => [0xfd, 0, 4, offset], store = (offset) => [0xfd, 11, 4, offset], splat = [0xfd, 9, 2, 0];
  const multiply = [0xfd, 0xe6, 1], add = [0xfd, 0xe4, 1], zeros = [0xfd, 12, ...Array(16).fill(0)];
  const sum = (a, weights) => [...get(a), ...get(v), ...get(weights), ...multiply, ...add, ...set(a)];
  const loop = (...body) => [0x03, 0x40, ...body.flat(), 0x0d, 0, 0x0b]; // again while the value on the stack is not 0
  const code = loop(
    ...[a0, a1, b0, b1].map((a) => [...zeros, ...set(a)]),
    get(w), set(p), get(x), set(x0), get(x), get(strideX), plus, set(x1), get(x), get(K), plus, set(end),
    loop(
      get(p), load(0), set(w0), get(p), load(16), set(w1),
      get(x0), splat, set(v), sum(a0, w0), sum(a1, w1), get(x1), splat, set(v), sum(b0, w0), sum(b1, w1),
      move(p, number(32)), move(x1, number(4)), move(x0, number(4)), get(x0), get(end), 0x49,
    ),
    get(out), get(a0), store(0), get(out), get(a1), store(16), get(out), get(strideOut), plus, set(p),
    get(p), get(b0), store(0), get(p), get(b1), store(16), move(w, get(strideW)), move(out, number(32)),
    get(tiles), number(1), 0x6b, 0x22, tiles, // one tile less, and keep the number on the stack
  );
  const body = [2, 4, 0x7f, 7, 0x7b, ...code, 0x0b]; // four more locals of 32 bits, seven of 128
  const section = (id, bytes) => [id, ...leb(bytes.length), ...bytes];
  return new Uint8Array([
    0, 0x61, 0x73, 0x6d, 1, 0, 0, 0, ...section(1, [1, 0x60, 8, ...Array(8).fill(0x7f), 0]),
    ...section(2, [1, 1, 0x6d, 1, 0x6d, 2, 0, 1]), ...section(3, [1, 0]), ...section(7, [1, 1, 0x6b, 0, 0]),
    ...section(10, [1, ...leb(body.length), ...body]),
  ]);
}

const plainKernel = (f) => (x, strideX, w, strideW, out, strideOut, K, tiles) => {
  for (let tile = 0; tile < 2 * tiles; tile += 1) {
    const first = (w + (tile >> 1) * strideW + (tile & 1) * 16) >> 2, end = (x + K) >> 2, next = strideX >> 2;
    let a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
    for (let i = x >> 2, p = first; i < end; i += 1, p += 8) {
      const w0 = f[p], w1 = f[p + 1], w2 = f[p + 2], w3 = f[p + 3], a = f[i], b = f[i + next];
      a0 += a * w0; a1 += a * w1; a2 += a * w2; a3 += a * w3;
      b0 += b * w0; b1 += b * w1; b2 += b * w2; b3 += b * w3;
    }
    f.set([a0, a1, a2, a3], (out >> 2) + 4 * tile);
    f.set([b0, b1, b2, b3], ((out + strideOut) >> 2) + 4 * tile);
  }
};

// One piece of memory for weights and activations: floats are handed out by their index.
class Floats {
  constructor(size, wasm = true) {
    this.used = 0;
    try {
      if (!wasm) throw new Error("not wanted");
      const memory = new WebAssembly.Memory({ initial: Math.ceil((4 * size) / 65536) + 1 });
      this.kernel = new WebAssembly.Instance(new WebAssembly.Module(assembleKernel()), { m: { m: memory } }).exports.k;
      this.f = new Float32Array(memory.buffer);
      this.fast = true;
    } catch {
      this.f = new Float32Array(size + 64);
      this.kernel = plainKernel(this.f);
      this.fast = false;
    }
  }
  take(size) {
    const at = this.used;
    this.used += ceil8(size);
    return at;
  }
}

// ============================================================================================== the network
// packed: what page.py's `packed_model` writes, {name, causal, config, ngrams, characters, tensors}; bytes: its weights.
class Network {
  constructor(packed, bytes, wasm = true) {
    const { vocab_size: V, n_embd: C, n_head: H, n_layer: L, block_size: T } = packed.config;
    Object.assign(this, { packed, V, C, H, L, T, D: C / H, causal: packed.causal, CC: ceil8(C), length: 0 });
    const width = Math.max(ceil8(4 * C), ceil8(3 * C)), S = ceil8(T), D8 = ceil8(this.D);
    const matrices = Object.entries(packed.tensors).filter(([name]) => !name.includes("tables"));
    const weights = matrices.reduce((sum, [, { shape: [n, k] }]) => sum + ceil8(n) * (k + 8), 0);
    const activations = (T + 2) * (3 * this.CC + width + ceil8(V) + L * C) + 2 * S + 2 * D8 + 2 * L * H * S * D8;
    this.memory = new Floats(weights + activations + 8 * (10 + 3 * L), wasm);
    this.f = this.memory.f;
    const take = (size) => this.memory.take(size);
    this.x = take((T + 2) * this.CC); // the residual stream
    this.y = take((T + 2) * this.CC); // what enters a layer
    this.z = take((T + 2) * width); // its inner values
    this.out = take((T + 2) * this.CC); // what it adds to the stream
    this.logits = take((T + 2) * ceil8(V));
    this.scores = take(2 * S);
    this.head = take(2 * ceil8(this.D));
    this.inputs = Array.from({ length: L }, () => take((T + 2) * C)); // of each convolution
    this.keys = Array.from({ length: L }, () => take(H * S * this.D)); // per head, in tiles of eight positions
    this.values = Array.from({ length: L }, () => take(H * S * ceil8(this.D))); // per head, in tiles of eight channels
    this.tokens = new Int32Array(T);
    this.loadWeights(bytes);
    this.rotations = new Float32Array(T * this.D); // cosine, sine
    for (let t = 0; t < T; t += 1)
      for (let d = 0; d < this.D; d += 2) {
        const angle = Math.fround(t * Math.fround(10000 ** Math.fround(-d / this.D)));
        this.rotations.set([Math.cos(angle), Math.sin(angle)], t * this.D + d);
      }
  }

  // A tensor (n, k) is n*k numbers of 8 bits, then a scale for each of n / group * (columns? k : 1) groups of rows.
  loadWeights(bytes) {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length), at = this.packed.tensors;
    const numbers = ({ offset, shape: [n, k] }) => new Int8Array(bytes.buffer, bytes.byteOffset + offset, n * k);
    const scales = ({ offset, shape: [n, k], scales: length }) =>
      Float32Array.from({ length }, (_, i) => view.getFloat32(offset + n * k + 4 * i, true));
    const matrix = (name) => { // in the kernel's tiles
      const tensor = at[name], [n, k] = tensor.shape, q = numbers(tensor), s = scales(tensor), w = this.memory.take(ceil8(n) * k);
      for (let i = 0; i < n; i += 1)
        for (let j = 0; j < k; j += 1) this.f[w + (i >> 3) * 8 * k + 8 * j + (i & 7)] = q[i * k + j] * s[i];
      return { w, n, k };
    };
    const rows = (name) => { // as they are
      const tensor = at[name], [, k] = tensor.shape, s = scales(tensor);
      return Float32Array.from(numbers(tensor), (q, i) => q * s[Math.floor(i / k)]);
    };
    this.embedding = rows("encoder.embedding.weight");
    this.tables = numbers(at["encoder.ngrams.tables.weight"]); // stays in 8 bits: most of the model
    this.tableScales = scales(at["encoder.ngrams.tables.weight"]); // (kinds, width)
    this.width = at["encoder.ngrams.tables.weight"].shape[1];
    this.up = at["encoder.ngrams.up.weight"] ? matrix("encoder.ngrams.up.weight") : null;
    this.layers = Array.from({ length: this.L }, (_, l) => {
      const of = (name) => `encoder.blocks.${l}.${name}.weight`;
      return { conv: rows(of("conv")), qkv: matrix(of("attention.qkv")), proj: matrix(of("attention.proj")),
        fc: matrix(of("mlp.fc")), down: matrix(of("mlp.proj")) };
    });
    this.unembed = matrix("head.weight");
    const { ngram_rows, ngram_base, vocab_size } = this.packed.config, base = ngram_base || vocab_size;
    this.ngrams = this.packed.ngrams.map((offsets) => { // [offset, base ** place mod rows] of each token; all below 2 ** 53
      let power = 1 % ngram_rows;
      return [...offsets].reverse().map((offset) => {
        const digit = power;
        power = (power * base) % ngram_rows;
        return [offset, digit];
      });
    });
  }

  // rows x (rows, k), strideX apart -> (rows, ceil8(n)); a last odd row takes one more along.
  multiply(x, strideX, rows, { w, n, k }, out) {
    const n8 = ceil8(n);
    for (let t = 0; t < rows; t += 2)
      this.memory.kernel(4 * (x + t * strideX), 4 * strideX, 4 * w, 32 * k, 4 * (out + t * n8), 4 * n8, 4 * k, n8 / 8);
  }

  // y = (x - mean) / deviation of n numbers.
  norm(x, y, n) {
    const f = this.f;
    let sum = 0, squares = 0;
    for (let i = 0; i < n; i += 1) sum += f[x + i];
    const mean = sum / n;
    for (let i = 0; i < n; i += 1) squares += (f[x + i] - mean) ** 2;
    const scale = 1 / Math.sqrt(squares / n + 1e-5);
    for (let i = 0; i < n; i += 1) f[y + i] = (f[x + i] - mean) * scale;
  }

  // Ids at positions start, start + 1, ... -> logits, (positions `at`, or all; V) row after row. GPT keeps what it has
  // read, so that it continues where start is the length so far. LLaDA reads everything at once, and start is 0.
  forward(ids, { start = 0, at = null } = {}) {
    const { f, C, CC, V, x, y, z, out } = this, T = ids.length, end = start + T;
    if (end > this.T) throw new Error(`${end} positions do not fit the context of ${this.T}`);
    this.tokens.set(ids, start);
    this.embed(start, end);
    let rows = T;
    this.layers.forEach((layer, l) => {
      const last = l === this.L - 1;
      this.convolve(layer.conv, this.inputs[l], start, end);
      for (let t = 0; t < T; t += 1) this.norm(x + t * CC, y + t * CC, C);
      this.multiply(y, CC, T, layer.qkv, z);
      this.attend(l, start, end);
      this.multiply(y, CC, T, layer.proj, out);
      for (let i = 0; i < T * CC; i += 1) f[x + i] += f[out + i];
      if (last && at) { // the rest works on each position alone
        rows = at.length;
        at.forEach((position, row) => f.copyWithin(x + row * CC, x + (position - start) * CC, x + (position - start + 1) * CC));
      }
      for (let t = 0; t < rows; t += 1) this.norm(x + t * CC, y + t * CC, C);
      this.multiply(y, CC, rows, layer.fc, z);
      for (let i = z; i < z + rows * ceil8(4 * C); i += 1) f[i] = f[i] > 0 ? f[i] * f[i] : 0;
      this.multiply(z, ceil8(4 * C), rows, layer.down, out);
      for (let i = 0; i < rows * CC; i += 1) f[x + i] += f[out + i];
    });
    for (let t = 0; t < rows; t += 1) this.norm(x + t * CC, y + t * CC, C);
    this.multiply(y, CC, rows, this.unembed, this.logits);
    const logits = new Float32Array(rows * V);
    for (let t = 0; t < rows; t += 1) {
      logits.set(f.subarray(this.logits + t * ceil8(V), this.logits + t * ceil8(V) + V), t * V);
      logits.fill(-Infinity, t * V, t * V + 3); // [PAD], [MASK], [START]
    }
    return logits;
  }

  // x = norm(embedding + n-grams).
  embed(start, end) {
    const { f, C, CC, width, z, x, tokens, tableScales: scales } = this, rows = this.packed.config.ngram_rows;
    const n = this.up ? this.up.k : C, stride = ceil8(n);
    for (let t = start; t < end; t += 1) {
      const sum = z + (t - start) * stride;
      f.fill(0, sum, sum + n);
      this.ngrams.forEach((offsets, kind) => {
        let number = 0;
        for (const [offset, digit] of offsets) {
          const place = t + offset;
          if (place >= 0 && place < end) number += tokens[place] * digit; // outside of the text stand [PAD]s, 0
        }
        const row = ((number % rows) + kind * rows) * width;
        for (let i = 0; i < width; i += 1) f[sum + i] += this.tables[row + i] * scales[kind * width + i];
      });
    }
    if (this.up) this.multiply(z, stride, end - start, this.up, x);
    for (let t = 0; t < end - start; t += 1) {
      const from = this.up ? x + t * CC : z + t * stride, token = tokens[start + t] * C;
      for (let i = 0; i < C; i += 1) f[x + t * CC + i] = f[from + i] + this.embedding[token + i];
      this.norm(x + t * CC, x + t * CC, C);
    }
  }

  // x = x + conv(x); the inputs are kept for the positions that follow.
  convolve(weight, inputs, start, end) {
    const { f, C, CC, x } = this, taps = weight.length / C, left = this.causal ? taps - 1 : taps >> 1;
    for (let t = start; t < end; t += 1) f.copyWithin(inputs + t * C, x + (t - start) * CC, x + (t - start) * CC + C);
    for (let t = start; t < end; t += 1)
      for (let k = 0; k < taps; k += 1) {
        const place = t + k - left;
        if (place < 0 || place >= end) continue;
        for (let c = 0; c < C; c += 1) f[x + (t - start) * CC + c] += weight[c * taps + k] * f[inputs + place * C + c];
      }
  }

  // y = attention of the queries, keys and values in z (T, 3C), and of the keys and values before them.
  attend(layer, start, end) {
    const { f, C, CC, H, D, y, z, scores, head, rotations } = this, S = ceil8(this.T), D8 = ceil8(D), stride = ceil8(3 * C);
    const keys = this.keys[layer], values = this.values[layer];
    for (let t = start; t < end; t += 1) {
      const row = z + (t - start) * stride;
      for (let h = 0; h < 2 * H; h += 1) { // QK-norm, then RoPE
        const q = row + h * D;
        this.norm(q, q, D);
        for (let d = 0; d < D; d += 2) {
          const cos = rotations[t * D + d], sin = rotations[t * D + d + 1], a = f[q + d], b = f[q + d + 1];
          f[q + d] = a * cos - b * sin;
          f[q + d + 1] = a * sin + b * cos;
        }
      }
      for (let h = 0; h < H; h += 1)
        for (let d = 0; d < D; d += 1) {
          f[keys + (h * S + (t & ~7)) * D + 8 * d + (t & 7)] = f[row + C + h * D + d];
          f[values + h * S * D8 + (d >> 3) * 8 * S + 8 * t + (d & 7)] = f[row + 2 * C + h * D + d];
        }
    }
    for (let h = 0; h < H; h += 1)
      for (let t = start; t < end; t += 2) { // two queries at a time
        const seen = this.causal ? Math.min(t + 2, end) : end;
        const q = z + (t - start) * stride + h * D, k = keys + h * S * D, v = values + h * S * D8;
        this.memory.kernel(4 * q, 4 * stride, 4 * k, 32 * D, 4 * scores, 4 * S, 4 * D, Math.ceil(seen / 8));
        this.softmax(scores, this.causal ? t + 1 : end, seen);
        this.softmax(scores + S, seen, seen);
        this.memory.kernel(4 * scores, 4 * S, 4 * v, 32 * S, 4 * head, 4 * D8, 4 * seen, D8 / 8);
        f.copyWithin(y + (t - start) * CC + h * D, head, head + D);
        if (t + 1 < end) f.copyWithin(y + (t + 1 - start) * CC + h * D, head + D8, head + D8 + D);
      }
  }

  // The first n of scores become their softmax after scaling by 1 / sqrt(D), the others up to `all` 0.
  softmax(scores, n, all) {
    const { f } = this, scale = 1 / Math.sqrt(this.D);
    let most = -Infinity, sum = 0;
    for (let s = 0; s < n; s += 1) most = Math.max(most, f[scores + s]);
    for (let s = 0; s < n; s += 1) sum += f[scores + s] = Math.exp((f[scores + s] - most) * scale);
    for (let s = 0; s < n; s += 1) f[scores + s] /= sum;
    f.fill(0, scores + n, scores + all);
  }
}

// ============================================================================================== from logits to text
const MASK = 1, START = 2, FIRST = 4; // ids below FIRST are special and never written
const SHOWN = 8; // candidates kept of each belief

// Uniform numbers in [0, 1) of 53 bits (sfc32, Chris Doty-Humphrey). Not PyTorch's: a seed gives another text there.
function generator(seed) {
  let a = 0x9e3779b9, b = seed >>> 0, c = Math.floor(seed / 2 ** 32) >>> 0, d = 1;
  const next = () => {
    const t = (a + b + d) >>> 0;
    d = (d + 1) >>> 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) >>> 0;
    c = (((c << 21) | (c >>> 11)) + t) >>> 0;
    return t;
  };
  for (let i = 0; i < 15; i += 1) next();
  return () => ((next() >>> 5) * 2 ** 26 + (next() >>> 6)) / 2 ** 53;
}

// Row `row` of logits (n, V) -> the network's probabilities (V,), or those of ids from `first` on after temperature.
function probabilities(logits, row, V, temperature = 1, first = 0) {
  const p = new Float64Array(V), at = row * V;
  let most = -Infinity, sum = 0;
  for (let i = first; i < V; i += 1) most = Math.max(most, logits[at + i]);
  for (let i = first; i < V; i += 1) sum += p[i] = Math.exp((logits[at + i] - most) / temperature);
  for (let i = first; i < V; i += 1) p[i] /= sum;
  return p;
}
const likeliest = (p) => { let best = FIRST; for (let i = FIRST; i < p.length; i += 1) if (p[i] > p[best]) best = i; return best; };

// A token of row `row`: the likeliest at temperature 0, else by inverting the cumulative distribution.
function draw(logits, row, V, temperature, uniform) {
  if (temperature === 0) return likeliest(probabilities(logits, row, V));
  const p = probabilities(logits, row, V, temperature, FIRST);
  let rest = uniform(), token = FIRST;
  while (token < V - 1 && (rest -= p[token]) >= 0) token += 1;
  return p[token] > 0 ? token : likeliest(p);
}

const candidates = (p) => [...p.keys()].filter((i) => i >= FIRST && p[i] > 0).sort((a, b) => p[b] - p[a]).slice(0, SHOWN)
  .flatMap((i) => [i, Math.round(p[i] * 1e4) / 1e4]);

// What the network believes of positions `at`: {position: [id, p, id, p, ...]}, and their probabilities and logits.
function look(network, tokens, at) {
  const logits = network.forward(tokens, { at }), p = at.map((_, row) => probabilities(logits, row, network.V, 1, FIRST));
  return { logits, p, beliefs: Object.fromEntries(at.map((position, row) => [position, candidates(p[row])])) };
}

// sampler.py's orders: which of the masked positions `at` are written, `count` of them (rows of `at`).
const ORDERS = {
  sweep: ({ at, turn, step }) => [...at.keys()].filter((row) => turn.get(at[row]) === step),
  confidence: ({ p, count }) => highest(p.map((q) => q[likeliest(q)]), count),
  drawn_confidence: ({ p, drawn, count }) => highest(p.map((q, row) => q[drawn(row)]), count),
  left: ({ count }) => Array.from({ length: count }, (_, row) => row),
  random: ({ at, uniform, count }) => highest(at.map(uniform), count),
};
const highest = (scores, count) => [...scores.keys()].sort((a, b) => scores[b] - scores[a]).slice(0, count);

// The reverse process: fills the masks of `tokens` and yields, for each network evaluation, {written: [[position, id, p]],
// beliefs}: what it wrote, and what it believed of every mask before. Then correction passes draw written tokens anew.
function* fill(network, tokens, { steps, order, temperature, correct, correctTemperature, seed }) {
  const uniform = generator(seed), V = network.V, masked = [...tokens.keys()].filter((i) => tokens[i] === MASK);
  const K = Math.min(steps, masked.length), turn = new Map(masked.map((position, j) => [position, j % K]));
  tokens = [...tokens];
  for (let step = 0; step < K; step += 1) {
    const at = masked.filter((i) => tokens[i] === MASK), { logits, p, beliefs } = look(network, tokens, at), ids = [];
    const drawn = (row) => (ids[row] ??= draw(logits, row, V, temperature, uniform));
    const count = Math.floor(masked.length / K) + (step < masked.length % K);
    const rows = ORDERS[order]({ at, p, drawn, uniform, count, turn, step }).sort((a, b) => a - b);
    for (const row of rows) tokens[at[row]] = drawn(row);
    yield { written: rows.map((row) => [at[row], ids[row], p[row][ids[row]]]), beliefs };
  }
  for (let step = 0; step < 8 * correct; step += 1) { // every eighth written position, k, k + 8, ...
    const at = masked.filter((_, j) => j % 8 === step % 8);
    if (!at.length) continue;
    for (const position of at) tokens[position] = MASK;
    const { logits, p, beliefs } = look(network, tokens, at);
    at.forEach((position, row) => { tokens[position] = draw(logits, row, V, correctTemperature, uniform); });
    yield { written: at.map((position, row) => [position, tokens[position], p[row][tokens[position]]]), beliefs };
  }
}

// GPT writes from left to right: `tokens` without [START], up to `length` of them. It reads the prompt once, then one a time.
function* decode(network, tokens, length, { temperature, seed }) {
  const uniform = generator(seed), V = network.V;
  for (let start = 0, ids = [START, ...tokens]; tokens.length < length; ) {
    const logits = network.forward(ids, { start, at: [start + ids.length - 1] }), p = probabilities(logits, 0, V);
    const position = tokens.length, token = draw(logits, 0, V, temperature, uniform);
    yield { written: [[position, token, p[token]]], beliefs: { [position]: candidates(p) } };
    tokens = [...tokens, token];
    start += ids.length;
    ids = [token];
  }
}

// ============================================================================================== a worker
// The weights of a model: base64 of gzip.
async function unpack(text) {
  const bytes = new Uint8Array(text.length * 0.75 - (text.endsWith("==") ? 2 : text.endsWith("=") ? 1 : 0));
  const values = new Uint8Array(128);
  [..."ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"].forEach((c, i) => { values[c.charCodeAt(0)] = i; });
  for (let i = 0, to = 0; i < text.length; i += 4, to += 3) {
    const [a, b, c, d] = [0, 1, 2, 3].map((k) => values[text.charCodeAt(i + k)]);
    bytes[to] = (a << 2) | (b >> 4);
    bytes[to + 1] = (b << 4) | (c >> 2);
    bytes[to + 2] = (c << 6) | d;
  }
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Messages {load: packed, weights}, then {id, task: "fill" | "decode" | "look" | "stop", ...}. One text is written at a
// time: a newer task, unless it only looks, ends the one before.
function serve(post) {
  const pause = () => new Promise((resolve) => { setTimeout(resolve); });
  let loading = null, newest = 0;
  const answer = async ({ id, load, weights, task, tokens, at, length, settings }) => {
    if (load) loading = unpack(weights).then((bytes) => new Network(load, bytes));
    if (task !== "look") newest = id ?? newest;
    const network = await loading;
    if (load) return post({ ready: true, fast: network.memory.fast });
    const isOld = () => task !== "look" && newest !== id;
    if (task === "stop" || isOld()) return null;
    let nfe = 0, seconds = 0, before = performance.now();
    const states = task === "fill" ? fill(network, tokens, settings) : task === "decode" ? decode(network, tokens, length, settings)
      : [{ written: [], beliefs: look(network, tokens, at).beliefs }]; // look
    for (const { written, beliefs } of states) {
      nfe += 1;
      seconds += (performance.now() - before) / 1000;
      post({ id, frame: [nfe, seconds, written, beliefs] });
      await pause();
      if (isOld()) return null;
      before = performance.now();
    }
    return post({ id, done: true });
  };
  return (message) => answer(message).catch((error) => post({ error: String(error) }));
}

// ============================================================================================== the page
// Texts are only ever assigned to textContent, values and attributes of labels: they are never parsed as markup.
// A cell is {text: token or null for a mask, kind: "given" | "mask" | "written", step, p, redrawn, was}; a history is
// {start: cells, frames: [{step, nfe, seconds, written, beliefs}], done, total}, of a fill that runs or of a recorded one.
const $ = (id) => document.getElementById(id);
const make = (tag, className = "", text = "") => Object.assign(document.createElement(tag), { className, textContent: text });
const percent = (p) => {
  if (p < 0.001) return "< 0.1 %";
  return p < 0.0995 ? `${(100 * p).toFixed(1)} %` : `${Math.round(100 * p)} %`;
};
const masked = (count) => Array.from({ length: count }, () => ({ text: null, kind: "mask" }));
const isMask = (cell) => cell.kind === "mask";
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
const PACE = 360; // milliseconds a step, that the eye can follow
const HELP = {
  sweep: "Every 32nd mask at once (with 32 steps), then the ones beside them: far apart, so that they hardly depend on each other.",
  confidence: "Where the model is surest comes first.",
  drawn_confidence: "A character is drawn everywhere; the likeliest of these are kept (LLaDA's published rule).",
  left: "From left to right, several at once.",
  random: "Anywhere: the order in which the model was trained.",
};
const EXAMPLES = [ // _ stands for a mask; a number in braces for so many
  ["A gap to fill", "ROMEO:\nWhat light {44}\nIt is the east, and {40}\n\nJULIET:\n{46}\nand I'll no longer be a Capulet.\n"],
  ["A dialogue", "KING:\n{70}\n\nQUEEN:\n{70}\n\nKING:\n{50}\n"],
  ["From a prompt", "JULIET:\nO Romeo, {190}"],
  ["From nothing", "{240}"],
];

// What stands for a token on the screen: as long as the token is (in lines and columns), and never invisible.
function shown(token) {
  return token === "[END]" ? "∎" : token.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => {
    const code = c.codePointAt(0);
    return c === "\n" ? c : code < 32 ? String.fromCharCode(0x2400 + code) : code === 127 ? "\u2421" : "\ufffd";
  });
}
const named = (token) => (token === "\n" ? "↵" : token.trim() === "" ? "␣".repeat(token.length || 1) : shown(token));

// A model in its worker.
class Remote {
  constructor(packed, weights, source) {
    this.packed = packed;
    Object.assign(this, { id: 0, pending: new Map(), writing: 0 });
    this.ids = new Map(packed.characters.map((text, id) => [text, id]));
    const receive = (message) => this.receive(message);
    try {
      const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
      worker.onmessage = (event) => receive(event.data);
      worker.onerror = (event) => note(`The model has stopped: ${event.message || "this browser allows no worker here"}.`);
      this.send = (message) => worker.postMessage(message);
    } catch {
      this.send = serve(receive);
    }
    this.send({ load: packed, weights });
  }
  ask(message, onFrame = () => {}, onDone = () => {}) {
    this.id += 1;
    if (message.task !== "look") {
      this.pending.delete(this.writing);
      this.writing = this.id;
    }
    this.pending.set(this.id, { onFrame, onDone });
    this.send({ ...message, id: this.id });
  }
  receive({ id, ready, fast, frame, done, error }) {
    if (error) note(`The model has stopped: ${error}`);
    else if (ready) Object.assign(this, { ready, fast });
    else if (frame) this.pending.get(id)?.onFrame(readFrame(frame, this.packed.characters));
    else if (done) {
      this.pending.get(id)?.onDone();
      this.pending.delete(id);
    }
  }
}

function readFrame([nfe, seconds, written, beliefs], texts, step) {
  const pairs = (list) => Array.from({ length: list.length / 2 }, (_, i) => [texts[list[2 * i]], list[2 * i + 1]]);
  return {
    nfe, seconds, step, written: written.map(([position, token, p]) => ({ position, text: texts[token], p })),
    beliefs: new Map(Object.entries(beliefs).map(([position, list]) => [Number(position), pairs(list)])),
  };
}

// The cells after `step` frames. What the next frame looked at is masked, also where the text becomes longer.
function stateAt({ start, frames }, step) {
  const cells = [...start];
  frames.slice(0, step + 1).forEach(({ written, beliefs }, i) => {
    for (const position of beliefs.keys()) while (cells.length <= position) cells.push({ text: null, kind: "mask" });
    if (i === step) return;
    for (const { position, text, p } of written) {
      const before = cells[position], redrawn = before?.kind === "written" && before.step > 0;
      cells[position] = { text, p, kind: "written", step: i + 1, redrawn, was: redrawn ? before.text : null };
    }
  });
  return cells;
}

const note = (text) => { $("note").textContent = text; };
const announce = (text) => { $("live").textContent = text; };

// ---------------------------------------------------------------------------------------------- one text
class Panel {
  constructor(viewer, label, editable, growing) {
    Object.assign(this, { viewer, label: shown(label), editable, growing, cells: [], beliefs: new Map() });
    Object.assign(this, { history: null, step: 0, past: [], future: [] });
    this.root = make("section", "panel");
    this.numbers = make("span", "number");
    this.status = make("p", "status");
    this.paper = make("div", "paper");
    this.mirror = make("div", "mirror");
    this.area = Object.assign(make("textarea"), { spellcheck: false, autocomplete: "off" });
    this.area.inputMode = editable && !viewer.coarse ? "text" : "none"; // on a phone, a touch opens no keyboard
    const attributes = { autocorrect: "off", autocapitalize: "off", "aria-label": `${this.label}: text`, "aria-readonly": !editable };
    for (const [name, value] of Object.entries(attributes)) this.area.setAttribute(name, value);
    this.area.setAttribute("aria-describedby", (this.status.id = `status-${(Panel.count = (Panel.count ?? 0) + 1)}`));
    this.mirror.setAttribute("aria-hidden", "true");
    const heading = make("h2", "", this.label);
    heading.append(this.numbers);
    this.paper.append(this.mirror, this.area);
    this.root.append(heading, this.paper, this.status);
    this.end = make("span", "", "\u200b");
    this.mirror.append(this.end);
    this.spans = [];
    const on = (type, action) => this.area.addEventListener(type, action), atCaret = () => this.indexOf(this.area.selectionStart);
    on("beforeinput", (event) => {
      if (editable && !event.inputType.startsWith("history")) return;
      event.preventDefault();
      if (editable) this.undo(event.inputType === "historyRedo");
    });
    on("input", (event) => this.typed(event.isComposing));
    on("compositionend", () => this.typed(false));
    on("pointermove", (event) => viewer.hover(this, event.pointerType === "touch" ? null : this.indexAt(event)));
    on("pointerleave", () => viewer.hover(this, null));
    on("pointerup", (event) => {
      const index = this.indexAt(event);
      if (index !== null) setTimeout(() => viewer.pin(this, index));
    });
    on("keyup", (event) => /^(Arrow|Home|End|Page)/.test(event.key) && viewer.pin(this, atCaret()));
    on("focus", () => setTimeout(() => viewer.pinned?.panel === this || viewer.pin(this, atCaret())));
  }

  // Columns of the text area <-> cells.
  get offsets() {
    let sum = 0;
    return this.cells.map((cell) => (sum += this.display(cell).length));
  }
  indexOf(offset) {
    const index = this.offsets.findIndex((end) => end > offset);
    return index < 0 ? this.cells.length - 1 : index;
  }
  offsetOf(index) { return index ? this.offsets[index - 1] : 0; }
  indexAt({ clientX, clientY }) {
    const index = this.spans.indexOf(document.elementsFromPoint(clientX, clientY).find((element) => element.parentNode === this.mirror));
    return index < 0 ? null : index;
  }
  selection() {
    const { selectionStart: from, selectionEnd: to } = this.area;
    return from === to ? [] : [...this.cells.keys()].filter((i) => this.offsetOf(i) < to && this.offsets[i] > from);
  }
  display(cell) { return cell.text === null ? this.viewer.maskSign : shown(cell.text); }

  // Show the history after `step` frames, or the cells of the editor.
  show(step = this.step, animate = false) {
    const { history } = this;
    if (history) {
      this.cells = stateAt(history, step);
      if (history.frames[step]) this.beliefs = history.frames[step].beliefs;
    }
    const last = this.step;
    this.step = step;
    const finished = history && history.done && step === history.frames.length && this.cells.every((cell) => !isMask(cell));
    const value = this.cells.map((cell) => this.display(cell)).join("");
    if (this.area.value !== value) {
      const { selectionStart, selectionEnd } = this.area;
      this.area.value = value;
      this.area.setSelectionRange(selectionStart, selectionEnd);
    }
    while (this.spans.length > this.cells.length) this.spans.pop().remove();
    while (this.spans.length < this.cells.length) { this.spans.push(make("span")); this.end.before(this.spans.at(-1)); }
    this.cells.forEach((cell, i) => this.paint(this.spans[i], cell, i, finished, animate && step > last));
    const isOpen = this.paper.classList.contains("open") && history && !finished; // lines end anywhere, until all is written
    this.paper.classList.toggle("open", Boolean(isOpen) || this.cells.filter(isMask).length > this.cells.length / 2);
    this.describe(finished);
  }

  paint(span, cell, i, finished, animate) {
    const { history, step } = this, text = this.display(cell), isNew = cell.kind === "written" && cell.step === step && step > 0;
    const belief = cell.kind === "mask" ? this.beliefs.get(i)?.[0] : null, pinned = this.viewer.pinned;
    let name = cell.kind[0];
    if (cell.text === "\n" || (belief && belief[0] === "\n")) name += " n";
    if (isNew && !finished) name += cell.redrawn ? (cell.was === cell.text ? " redrawn" : " redrawn other") : " now";
    if (pinned && pinned.panel === this && pinned.index === i) name += " pinned";
    if (span.textContent !== text) span.textContent = text;
    if (span.className !== name) span.className = name;
    if (cell.kind === "mask") {
      span.dataset.ghost = belief ? named(belief[0]).replace("␣", "") : "";
      span.style.cssText = `--faint: ${belief ? (0.3 + 0.7 * belief[1]).toFixed(2) : 0}`;
    } else if (cell.kind === "written") {
      const age = cell.step / Math.max(1, history?.total ?? cell.of ?? 1);
      span.style.cssText = `--sure: ${Math.round(100 * cell.p ** 0.7)}%; --age: ${Math.round(100 * age)}%`;
      if (!isNew || !animate || still()) return;
      span.animate([{ opacity: 0.1 }, { opacity: 1 }], { duration: 260, easing: "ease-out" });
      const flash = { backgroundColor: getComputedStyle(span).getPropertyValue("--fresh"), borderRadius: "5px" };
      if (finished) span.animate([flash, { ...flash, backgroundColor: "transparent" }], { duration: 1400, easing: "ease-in" });
    } else span.style.cssText = "";
  }

  // One sentence about what the text is and what has just happened.
  describe(finished) {
    const { history, step, cells, viewer } = this, { nfe, seconds } = history?.frames[step - 1] ?? { nfe: 0, seconds: 0 };
    const numbers = this.editable ? `${cells.length} of ${viewer.capacity} characters` : "";
    this.numbers.textContent = history ? `${seconds.toFixed(2)} s · ${plural(nfe, "evaluation")}` : numbers;
    const words = finished ? this.ending(nfe, seconds) : history && step ? this.happened() : this.beginning();
    if (this.status.textContent !== words) this.status.textContent = words;
  }
  beginning() {
    const count = this.cells.filter(isMask).length, are = `${plural(count, "character")} ${count === 1 ? "is" : "are"} masked.`;
    if (this.history && this.growing) return "GPT has read the beginning, and sees nothing to its right.";
    if (this.history) return `${are} One evaluation reads the whole text and gives a distribution for every mask.`;
    if (this.growing && (count || !this.editable)) return "GPT reads what stands before the first mask, and nothing behind it: press Fill.";
    if (count) return `${are} The faint letters are what the model would write there now; press Fill.`;
    return "Nothing is masked. Select characters and press Mask, or add masks: the model writes there.";
  }
  happened() {
    const { history, step, cells } = this, { written } = history.frames[step - 1], of = `${step} of ${history.total}`;
    const again = written.map(({ position }) => cells[position]).filter(({ redrawn }) => redrawn);
    if (this.growing) return `Character ${of}: “${named(written[0]?.text ?? "")}”, drawn from what stands to its left alone.`;
    if (again.length) return `Step ${of}, a correction: ${plural(again.length, "character")} masked again and drawn anew; `
      + `${again.filter(({ was, text }) => was !== text).length} came out different.`;
    return `Step ${of}: after one look at the whole text, ${plural(written.length, "character")} written at once; `
      + `${cells.filter(isMask).length} still masked.`;
  }
  ending(nfe, seconds) {
    const here = this.viewer.live ? " on this device" : "";
    const words = `Finished: ${plural(nfe, "network evaluation")}, ${seconds.toFixed(2)} s of computing${here}. `;
    if (!this.growing) return `${words}Select a character to see what else it might have been.`;
    const race = this.viewer.shownPanels.length > 1 ? " On a GPU one takes about as long as one of LLaDA’s: see the race by evaluations." : "";
    return `${words}Each read one character; what came before is kept.${race}`;
  }

  // ------------------------------------------------------------------------------------------ editing
  snapshot() { return { cells: this.cells, history: this.history, step: this.step, caret: this.area.selectionStart }; }
  remember() { this.past.push(this.snapshot()); this.past = this.past.slice(-200); this.future = []; }
  restore({ cells, history, step, caret }) {
    Object.assign(this, { cells, history, step });
    this.viewer.restored(step);
    this.area.setSelectionRange(caret, caret);
  }
  undo(redo = false) {
    const [from, to] = redo ? [this.future, this.past] : [this.past, this.future];
    if (!from.length) return;
    to.push(this.snapshot());
    this.restore(from.pop());
  }
  edit(cells, caret = null) { // caret: a cell, or null to keep it
    const total = this.history?.total;
    this.remember();
    this.history = null;
    this.beliefs = new Map();
    const { capacity } = this.viewer;
    this.cells = cells.slice(0, capacity).map((cell) => (total && cell.kind === "written" ? { ...cell, of: total } : cell));
    note(cells.length > capacity ? `The model reads ${capacity} characters at once: what went beyond is left out.` : "");
    this.step = 0;
    this.viewer.restored(0);
    if (caret !== null) this.area.setSelectionRange(this.offsetOf(caret), this.offsetOf(caret));
  }
  typed(isComposing) { // the text area has changed: find what was replaced
    const { area } = this, value = area.value, old = this.cells.map((cell) => this.display(cell)).join("");
    if (value === old) return;
    let suffix = value.length - area.selectionStart, prefix = 0;
    if (suffix > old.length || old.slice(old.length - suffix) !== value.slice(area.selectionStart)) suffix = 0;
    while (prefix < Math.min(old.length, value.length) - suffix && old[prefix] === value[prefix]) prefix += 1;
    while (suffix < Math.min(old.length, value.length) - prefix && old.at(-1 - suffix) === value.at(-1 - suffix)) suffix += 1;
    const ends = this.offsets, first = ends.filter((end) => end <= prefix).length;
    const last = ends.filter((_, i) => this.offsetOf(i) < old.length - suffix).length;
    const inserted = this.cellsOf(value.slice(prefix, value.length - suffix));
    if (!inserted.length && last <= first) { // nothing that the model knows
      this.show();
      area.setSelectionRange(prefix, prefix);
      return;
    }
    const cells = [...this.cells.slice(0, first), ...inserted, ...this.cells.slice(Math.max(first, last))];
    this.edit(cells, isComposing ? null : first + inserted.length);
  }
  cellsOf(text) { // typed or pasted characters
    const { known, maskSign, maskKey } = this.viewer, unknown = new Set();
    const cells = [...text.replace(/\r\n?/g, "\n")].flatMap((c) => {
      if (c === maskSign || c === maskKey) return masked(1);
      if (!known.has(c)) unknown.add(c);
      return known.has(c) ? [{ text: known.get(c), kind: "given" }] : [];
    });
    const examples = [...unknown].slice(0, 5).map((c) => `“${named(c)}”`).join(", ");
    if (examples) setTimeout(() => note(`This model has never seen ${examples}: it knows ${this.viewer.characters.length} characters.`));
    return cells;
  }
  mask(indices) {
    if (!indices.length) return;
    this.edit(this.cells.map((cell, i) => (indices.includes(i) ? masked(1)[0] : cell)));
    this.area.setSelectionRange(this.offsetOf(indices[0]), this.offsetOf(indices[0]));
    announce(`${plural(indices.length, "character")} masked`);
  }
  insertMasks(count) {
    const room = this.viewer.capacity - this.cells.length, from = this.area.selectionStart;
    const at = from >= this.area.value.length ? this.cells.length : this.indexOf(from), masks = masked(Math.min(count, room));
    if (!masks.length) return note(`The text has all ${this.viewer.capacity} characters that the model reads at once.`);
    this.edit([...this.cells.slice(0, at), ...masks, ...this.cells.slice(at)], at + masks.length);
  }
  take(index, text) {
    this.edit(this.cells.map((cell, i) => (i === index ? { text, kind: "given" } : cell)), index + 1);
    this.viewer.pin(this, index);
  }
}

// ---------------------------------------------------------------------------------------------- the viewer
class Viewer {
  constructor(data, source) {
    Object.assign(this, { data, live: data.models.length > 0, now: 0, playing: false, pinned: null, hovered: null, axis: "step" });
    this.coarse = matchMedia("(pointer: coarse)").matches;
    document.title = document.querySelector("h1").textContent = shown(data.title);
    if (this.live) this.startModels(source);
    else this.startHistories();
    this.panels.forEach((panel) => $("panels").append(panel.root));
    this.listen();
    this.setAxis(this.shownPanels.length > 1 ? "seconds" : "step");
    if (this.live) this.example(EXAMPLES.find(([, text]) => this.cellsOfExample(text)) ?? ["", "{60}"], false);
    this.panels[0].past = [];
    this.update();
    const wanted = /^#step=(\d+)$/.exec(location.hash); // page.html#step=5 opens paused at that step
    if (!this.live) this.pin(this.panels[0], Math.max(0, this.panels[0].cells.findIndex(isMask)));
    if (!this.live && wanted) this.go(this.ticks[Math.min(Number(wanted[1]), this.ticks.length - 1)]);
    else if (!this.live && !still()) this.play(true);
  }

  startModels(source) {
    const weights = [...document.querySelectorAll("script.weights")], models = this.data.models;
    this.engines = models.map((packed, i) => new Remote(packed, weights[i].textContent, source))
      .sort((a, b) => Number(a.packed.causal) - Number(b.packed.causal)); // LLaDA first
    weights.forEach((element) => element.remove());
    const characters = models[0].characters.slice(FIRST), free = (signs) => signs.find((c) => !characters.includes(c)) ?? "\ufffc";
    this.characters = characters;
    this.known = new Map(characters.flatMap((c) => [[shown(c), c], [c, c]])); // typed, or copied from the screen
    this.maskSign = free([..."·¤¦¬§¶"]); // Latin-1: in every font
    this.maskKey = free([..."_~§#|"]);
    this.capacity = Math.min(...models.map(({ config }) => config.block_size));
    const labels = { llada: "LLaDA", gpt: "GPT" };
    this.panels = this.engines.map(({ packed: { name, causal } }, i) => new Panel(this, labels[name] ?? name, i === 0, causal));
    if (this.panels[1]) this.panels[1].root.hidden = true;
    else $("race").hidden = true;
    const how = this.panels[0].growing ? "from left to right, after what you type."
      : "by filling masks, anywhere in a text and in any order. Type, mask what it shall write, press Fill.";
    $("lead").textContent = `A language model that runs in this page and writes ${how} Nothing leaves your device.`;
    $("about").textContent = this.data.settings;
    $("mask").querySelector("kbd").textContent = $("key").textContent = this.maskKey;
    for (const [label, text] of EXAMPLES.filter(([, text]) => this.cellsOfExample(text))) {
      const chip = Object.assign(make("button", "chip", label), { type: "button" });
      chip.addEventListener("click", () => this.example([label, text]));
      $("examples").append(chip);
    }
    if (this.panels[0].growing) for (const id of ["steps", "order", "correct"]) $(id).closest(".field").hidden = true;
  }

  startHistories() {
    Object.assign(this, { capacity: 0, known: new Map(), maskSign: "·", engines: [] });
    this.panels = this.data.histories.map(({ label, tokens, start, frames }) => {
      const read = frames.map((frame) => readFrame(frame, tokens));
      const cells = start.map((t) => (t < 0 ? masked(1)[0] : { text: tokens[t], kind: "given" }));
      const growing = read.every(({ written, beliefs }) => beliefs.size < 2 && written.length < 2)
        && read.some(({ written: [{ position } = {}] }) => position >= cells.length);
      const seen = new Set(), isKnown = ({ position }) => seen.size === seen.add(position).size; // a correction writes no new one
      const again = read.map(({ written }) => written.length > 0 && written.map(isKnown).every(Boolean));
      const panel = new Panel(this, label, false, growing);
      panel.history = { start: cells, frames: read, done: true, total: read.length, growing, isAgain: (i) => again[i] };
      return panel;
    });
    document.querySelector("main").classList.add("replay");
    document.querySelector("main").classList.toggle("race", this.panels.length > 1);
    for (const id of ["examples", "actions", "settings"]) $(id).hidden = true;
    $("lead").textContent = shown(this.data.settings) || "How this text came about, step by step.";
    $("about").textContent = "A recording: masks show what the model believed at each step.";
    document.querySelector("footer .keys").textContent = "Keys: space plays · ← → step.";
  }

  get shownPanels() { return this.panels.filter((panel) => !panel.root.hidden && panel.history); }

  // ------------------------------------------------------------------------------------------ what the text is
  cellsOfExample(text) {
    const cells = text.split(/(\{\d+\})/).flatMap((part) => {
      const masks = /^\{(\d+)\}$/.exec(part);
      return masks ? masked(Number(masks[1])) : [...part].map((c) => ({ text: c, kind: "given" }));
    });
    return cells.length <= this.capacity && cells.every(({ text }) => text === null || this.known.has(text)) ? cells : null;
  }
  example([, text], focus = true) {
    this.play(false);
    this.panels[0].edit(this.cellsOfExample(text) ?? [], null);
    const first = this.panels[0].cells.findIndex(isMask);
    this.pinned = first < 0 ? null : { panel: this.panels[0], index: first };
    this.update();
    if (focus) $("fill").focus();
  }

  // After an edit or undo: the clock, and what the model believes of the masks now.
  restored(step) {
    const [panel] = this.panels;
    this.play(false);
    this.showRace();
    this.now = panel.history ? this.valueOf(panel.history, step) : 0;
    this.engines.forEach((engine) => engine.ask({ task: "stop" }));
    this.update();
    clearTimeout(this.waiting);
    if (panel.history && !panel.history.done) panel.history = { ...panel.history, done: true }; // it was interrupted
    this.waiting = setTimeout(() => this.lookNow(), 120);
  }
  idsOf(cells, engine) { return cells.map((cell) => (cell.text === null ? MASK : engine.ids.get(cell.text))); }
  lookNow() {
    const [panel] = this.panels, [engine] = this.engines, { cells } = panel, at = [...cells.keys()].filter((i) => isMask(cells[i]));
    if (!at.length || panel.history) return;
    const tokens = this.idsOf(cells, engine), next = { tokens: tokens.slice(0, at[0]), length: at[0] + 1 };
    const message = panel.growing ? { task: "decode", ...next, settings: { temperature: 0, seed: 0 } } : { task: "look", tokens, at };
    engine.ask(message, ({ beliefs }) => { if (panel.cells === cells) { panel.beliefs = beliefs; this.update(); } });
  }

  // ------------------------------------------------------------------------------------------ fill and race
  settings() {
    const number = (id) => Math.min(Number($(id).max), Math.max(Number($(id).min), Number($(id).value) || 0));
    const numbers = ["steps", "temperature", "correct", "seed"].map((id) => [id, number(id)]);
    return { ...Object.fromEntries(numbers), order: $("order").value, correctTemperature: 0.5 };
  }
  fill() {
    const [panel] = this.panels, isAgain = panel.history && !panel.cells.some(isMask);
    if (isAgain) $("seed").value = Number($("seed").value) + 1; // the same masks, with another seed
    const before = isAgain ? panel.history.start : panel.cells;
    const cells = before.map((cell) => (cell.kind === "written" ? { ...cell, step: 0 } : cell));
    const masks = cells.filter(isMask).length;
    if (!masks) return note("Nothing is masked: select characters and press Mask, or add masks.");
    note("");
    panel.remember();
    const settings = this.settings(), isRace = this.panels[1] && !this.panels[1].root.hidden, { length } = cells;
    const first = cells.findIndex(isMask), prefix = cells.slice(0, first);
    clearTimeout(this.waiting);
    this.panels.slice(0, isRace ? 2 : 1).forEach((each, i) => {
      const engine = this.engines[i], start = each.growing ? prefix : cells;
      const total = each.growing ? length - first : Math.min(settings.steps, masks) + settings.correct * Math.min(8, masks);
      const isAgain = (frame) => !each.growing && frame >= Math.min(settings.steps, masks); // a correction
      const history = { start, frames: [], done: false, total, growing: each.growing, isAgain };
      Object.assign(each, { history, step: 0, beliefs: new Map(panel.beliefs) });
      const message = { task: each.growing ? "decode" : "fill", tokens: this.idsOf(start, engine), length, settings };
      engine.ask(message, (frame) => this.arrived(history.frames.push(frame)), () => this.arrived((history.done = true)));
    });
    this.setAxis(isRace ? (this.axis === "nfe" ? "nfe" : "seconds") : "step");
    this.now = 0;
    this.update();
    this.play(true);
    announce(`Filling ${plural(masks, "mask")}`);
  }
  arrived() {
    const histories = this.shownPanels.map(({ history }) => history), isFirst = this.playing && this.now === 0;
    if (isFirst && histories.every(({ frames }) => frames.length)) this.now = Math.min(...histories.map((history) => this.valueOf(history, 1)));
    this.update();
  }
  // GPT's panel, before it writes: what stands before the first mask.
  showRace() {
    const [panel, other] = this.panels, isOn = $("race").getAttribute("aria-pressed") === "true";
    if (!this.live || !other) return;
    const first = panel.cells.findIndex(isMask), start = panel.history?.start ?? panel.cells;
    const given = start.findIndex(isMask);
    Object.assign(other, { history: null, step: 0, cells: start.slice(0, given < 0 ? first < 0 ? start.length : first : given) });
    other.root.hidden = !isOn;
    document.querySelector("main").classList.toggle("race", isOn);
    this.setAxis("step");
  }

  // ------------------------------------------------------------------------------------------ the clock
  // `now` counts steps, network evaluations or seconds of computing; a history shows the frames up to it.
  valueOf({ frames }, step) { return step ? (this.axis === "step" ? step : frames[step - 1][this.axis]) : 0; }
  stepOf(history) {
    let step = 0;
    while (step < history.frames.length && this.valueOf(history, step + 1) <= this.now + 1e-9) step += 1;
    return step;
  }
  get ticks() {
    const values = this.shownPanels.flatMap(({ history }) => history.frames.map((_, i) => this.valueOf(history, i + 1)));
    return [...new Set([0, ...values])].sort((a, b) => a - b);
  }
  setAxis(axis) {
    const [panel] = this.panels, step = panel.history ? this.stepOf(panel.history) : 0;
    this.axis = axis;
    $("axis").hidden = this.shownPanels.length < 2;
    if (axis !== "step") $("axis").value = axis;
    this.now = panel.history ? this.valueOf(panel.history, step) : 0;
  }
  go(value) { this.now = value; this.update(); }
  step(change) {
    const { ticks } = this, i = ticks.findLastIndex((tick) => tick <= this.now + 1e-9);
    this.play(false);
    this.go(ticks[Math.max(0, Math.min(ticks.length - 1, i + change))]);
    announce(this.shownPanels.map((panel) => `${panel.label}: ${panel.status.textContent}`).join(" "));
  }
  play(on) {
    const { ticks } = this;
    if (on && this.now >= ticks.at(-1) && ticks.length > 1 && this.shownPanels.every(({ history }) => history.done)) this.go(0);
    this.playing = on;
    $("play").textContent = on ? "Pause" : "Play";
    if (!on || this.isTicking) return;
    this.last = performance.now();
    this.isTicking = true;
    requestAnimationFrame((time) => this.advance(time));
  }
  advance(time) {
    this.isTicking = this.playing;
    const histories = this.shownPanels.map(({ history }) => history), waited = Math.max(0, Math.min(200, time - this.last));
    this.last = time;
    if (!this.playing || !histories.length) return;
    const mean = ({ frames }) => this.valueOf({ frames }, frames.length) / (frames.length || 1);
    const span = Math.max(...histories.map((history) => mean(history) * (history.done ? history.frames.length : history.total)));
    const gap = Math.max(...histories.map(mean)); // of the slowest
    const milliseconds = Math.min(14000, Math.max(1500, (PACE * span) / gap)) / Number($("speed").value);
    const { ticks } = this, known = (history) => (history.done ? Infinity : this.valueOf(history, history.frames.length));
    const limit = Math.min(...histories.map(known));
    if (span > 0) {
      const before = ticks.findLastIndex((tick) => tick <= this.now + 1e-9);
      this.now = Math.min(this.now + (waited * span) / milliseconds, limit, ticks.at(-1));
      if (ticks.findLastIndex((tick) => tick <= this.now + 1e-9) !== before) this.update(true);
    }
    if (this.now >= ticks.at(-1) && histories.every(({ done }) => done)) {
      this.isTicking = false;
      this.play(false);
      this.update();
      announce(this.shownPanels.map((panel) => `${panel.label}. ${panel.status.textContent} ${panel.area.value}`).join(" "));
    } else {
      this.isTicking = true;
      requestAnimationFrame((next) => this.advance(next));
    }
  }

  update(animate = false) {
    for (const panel of this.panels.filter(({ root }) => !root.hidden))
      panel.show(panel.history ? this.stepOf(panel.history) : 0, animate);
    const { ticks } = this, i = ticks.findLastIndex((tick) => tick <= this.now + 1e-9), [panel] = this.panels, { history } = panel;
    const unit = { step: "step", nfe: "evaluation", seconds: "" }[this.axis], digits = this.axis === "seconds" ? 2 : 0;
    const end = this.axis === "step" && history ? history.total : ticks.at(-1);
    const words = history ? `${unit} ${ticks[i].toFixed(digits)} of ${end.toFixed(digits)}${unit ? "" : " s"}`.trim() : "";
    $("playback").hidden = !this.shownPanels.length;
    $("clock").textContent = words;
    $("slider").step = this.axis === "seconds" ? "any" : 1;
    $("slider").max = end;
    $("slider").value = this.now;
    $("slider").setAttribute("aria-valuetext", words);
    $("undo").disabled = !panel.past.length;
    $("redo").disabled = !panel.future.length;
    const masked = panel.cells.some(isMask);
    $("fill").disabled = !masked && !history;
    $("fill").textContent = masked || !history ? "Fill" : "Fill again";
    $("again").hidden = !this.panels.some(({ cells, root }) => !root.hidden && cells.some(({ redrawn }) => redrawn));
    this.drawDetails();
    this.drawCurve();
  }

  // ------------------------------------------------------------------------------------------ one character
  hover(panel, index) {
    if (this.hovered?.panel === panel && this.hovered.index === index) return;
    this.hovered = index === null ? null : { panel, index };
    this.drawDetails();
  }
  pin(panel, index) {
    const before = this.pinned;
    this.pinned = index !== null && index >= 0 && index < panel.cells.length ? { panel, index } : null;
    this.hovered = null;
    for (const each of new Set([before?.panel, panel])) each?.show();
    this.drawDetails();
    if (this.pinned) this.ifMasked(panel, index);
  }
  ifMasked(panel, index) { // what would stand in place of a given character?
    const cell = panel.cells[index], engine = this.engines[this.panels.indexOf(panel)];
    if (!engine || panel.growing || cell.kind !== "given" || this.playing || panel.history?.done === false) return;
    const tokens = this.idsOf(panel.cells, engine);
    tokens[index] = MASK;
    engine.ask({ task: "look", tokens, at: [index] }, ({ beliefs }) => {
      this.guess = { cell, belief: beliefs.get(index) };
      this.drawDetails();
    });
  }
  // What is known of a character, in words, and the candidates that it was or will be drawn from.
  explain({ panel, index }) {
    const { history, step } = panel, cell = panel.cells[index], name = `“${named(cell.text ?? "")}”`;
    if (isMask(cell)) {
      const list = panel.beliefs.get(index) ?? [], when = history ? ` after step ${step}` : "";
      if (list.length) return [list, `Masked${when}. Knowing the text as it is now, the model believes:`];
      return [list, panel.growing ? "Masked. GPT believes something of the next character only." : "Masked. The model has not looked yet."];
    }
    if (cell.kind === "written" && cell.step > 0 && history) {
      const list = history.frames[cell.step - 1].beliefs.get(index) ?? [], other = cell.was === cell.text ? "" : `, in place of “${named(cell.was ?? "")}”`;
      if (cell.redrawn) return [list, `${name} was drawn anew at step ${cell.step}${other}, from:`];
      return [list, `${name} settled at step ${cell.step} of ${history.total}. It was drawn from:`];
    }
    if (cell.kind === "written") return [[], `${name} was written earlier, with ${percent(cell.p)}. Mask it again to see what else might stand here.`];
    if (this.guess?.cell === cell && this.guess.belief) return [this.guess.belief, `${name} is given. If it were masked, the model would believe:`];
    const hint = panel.editable && !panel.growing ? " Click it to see what the model would write in its place." : "";
    return [[], `${name} is given.${hint}`];
  }
  drawDetails() {
    const chosen = this.hovered ?? this.pinned, cell = chosen && chosen.panel.cells[chosen.index], card = $("details");
    const heading = make("h3", "", "What the model believes");
    if (!cell) {
      const touch = this.coarse ? "Touch" : "Point at", take = this.live ? " Choose one to take it." : "";
      const hint = `${touch} any mask or character, before, during or after a step: its likeliest candidates stand here.${take}`;
      card.replaceChildren(heading, make("p", "", hint));
      return;
    }
    const { panel, index } = chosen, [list, words] = this.explain(chosen);
    heading.append(make("span", "number", `${panel.label} · ${index + 1}`));
    const items = make("ol"), canTake = panel.editable && !(panel.growing && panel.history);
    for (const [text, p] of list) {
      const button = Object.assign(make(canTake ? "button" : "div", `candidate${text === cell.text ? " taken" : ""}`), { type: "button" });
      const track = make("span", "track"), bar = make("i");
      bar.style.width = `${100 * p}%`;
      track.append(bar);
      button.append(make("span", "token", named(text)), track, make("span", "", percent(p)));
      if (canTake) {
        button.setAttribute("aria-label", `Take ${named(text)}, ${percent(p)}`);
        button.addEventListener("click", () => panel.take(index, text));
      }
      items.append(make("li"));
      items.lastChild.append(button);
    }
    card.replaceChildren(heading, make("p", "", words), items);
    if (canTake && !isMask(cell)) {
      const words = cell.kind === "written" ? "Mask it again" : "Mask it";
      const again = Object.assign(make("button", "again", words), { type: "button" });
      again.addEventListener("click", () => { panel.mask([index]); this.pin(panel, index); });
      card.append(again);
    }
  }

  // ------------------------------------------------------------------------------------------ the masking curve
  // The points of a text: m characters masked, and the mean probability p of the first choices.
  pointsOf({ history, growing, step, beliefs, cells }) {
    const frames = history ? history.frames.slice(0, step + 1) : beliefs.size ? [{ beliefs }] : [];
    const total = growing && history ? history.total : (history?.start ?? cells).filter(isMask).length;
    const points = frames.map((frame, i) => {
      const sure = [...frame.beliefs.values()].map(([first]) => first?.[1] ?? 0), p = sure.reduce((a, b) => a + b, 0) / (sure.length || 1);
      return { m: growing ? total - i : sure.length, p, isAgain: history?.isAgain(i) };
    });
    if (!growing) return { total, points };
    const mean = (part) => part.reduce((sum, { p }) => sum + p, 0) / part.length; // GPT's are of single characters
    return { total, points: points.map((point, i) => ({ ...point, p: mean(points.slice(Math.max(0, i - 15), i + 1)) })) };
  }
  drawCurve() {
    const panels = this.panels.filter(({ root }) => !root.hidden), lines = panels.map((panel) => this.pointsOf(panel));
    const W = $("curve").clientWidth - 36 || 310, H = panels.length > 1 ? 236 : 148, left = 34, top = 8, bottom = 26;
    const most = Math.max(1, ...lines.map(({ total }) => total)), right = W - 8;
    const x = (m) => left + (1 - m / most) * (right - left), y = (p) => top + (1 - p) * (H - top - bottom);
    const svg = (tag, attributes, text = "") => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
      element.textContent = text;
      return element;
    };
    const label = "How sure the model is while so many characters are masked";
    const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label });
    for (const p of [0, 0.5, 1]) {
      picture.append(svg("line", { class: "grid", x1: left, x2: right, y1: y(p), y2: y(p) }));
      picture.append(svg("text", { x: left - 5, y: y(p) + 4, "text-anchor": "end" }, `${100 * p}%`));
    }
    picture.append(svg("text", { x: left, y: H - 10 }, `${most} masked`));
    picture.append(svg("text", { x: right, y: H - 10, "text-anchor": "end" }, "none"));
    lines.forEach(({ points }, i) => {
      const { growing } = panels[i], name = growing ? "gpt" : "llada", way = points.filter(({ isAgain }) => !isAgain);
      picture.append(svg("polyline", { class: name, points: way.map(({ m, p }) => `${x(m)},${y(p)}`).join(" ") }));
      for (const { m, p, isAgain } of growing ? points.slice(-1) : points)
        picture.append(svg("circle", { class: isAgain ? "again" : name, cx: x(m), cy: y(p), r: isAgain ? 2 : 3 }));
    });
    const last = lines[0].points.at(-1), heading = make("h3", "", "How sure it is");
    if (last) heading.append(make("span", "number", `${percent(last.p)} at ${plural(last.m, "mask")}`));
    let words = "Mean probability of its first choice over all masks: the more text it sees, the surer it is.";
    if (panels[0].growing) words = "Mean probability of its first choice over the last 16 characters.";
    if (panels.length > 1) words = "Mean probability of the first choice, LLaDA over all masks, GPT over 16 characters.";
    $("curve").replaceChildren(heading, make("p", "hint", words), picture);
  }

  // ------------------------------------------------------------------------------------------ input
  listen() {
    const [panel] = this.panels, on = (id, type, action) => $(id).addEventListener(type, action);
    on("fill", "click", () => this.fill());
    on("mask", "click", () => {
      const chosen = panel.selection(), pinned = this.pinned?.panel === panel ? [this.pinned.index] : [];
      panel.mask(chosen.length ? chosen : pinned);
    });
    on("add", "click", () => panel.insertMasks(40));
    on("undo", "click", () => panel.undo());
    on("redo", "click", () => panel.undo(true));
    on("race", "click", () => {
      const starts = $("race").getAttribute("aria-pressed") !== "true", step = panel.history ? this.stepOf(panel.history) : 0;
      $("race").setAttribute("aria-pressed", String(starts));
      this.play(false);
      this.showRace();
      if (panel.history && !starts) this.now = this.valueOf(panel.history, step);
      if (starts && panel.history) panel.restore({ ...panel.snapshot(), cells: panel.history.start, history: null, step: 0 });
      if (starts && panel.cells.some(isMask)) this.fill();
      this.update();
    });
    on("keyboard", "click", () => {
      const off = panel.area.inputMode === "none";
      panel.area.inputMode = off ? "text" : "none";
      $("keyboard").setAttribute("aria-pressed", String(off));
      panel.area.blur();
      panel.area.focus();
    });
    for (const id of ["mask", "add", "undo", "redo"]) // the text keeps the focus
      on(id, "pointerdown", (event) => event.preventDefault());
    on("play", "click", () => this.play(!this.playing));
    on("back", "click", () => this.step(-1));
    on("forward", "click", () => this.step(1));
    on("slider", "input", () => { this.play(false); this.go(Math.min($("slider").valueAsNumber, this.ticks.at(-1))); });
    on("axis", "change", () => { this.setAxis($("axis").value); this.update(); });
    on("shade", "change", () => {
      $("panels").className = $("scale").className = $("shade").value;
      $("scale").hidden = $("shade").value === "plain";
      [$("from").textContent, $("to").textContent] = $("shade").value ? ["first step", "last"] : ["unsure", "sure"];
    });
    const explain = () => {
      $("order-help").textContent = HELP[$("order").value];
      $("temperature-value").textContent = Number($("temperature").value).toFixed(2);
    };
    on("order", "change", explain);
    on("temperature", "input", explain);
    on("dice", "click", () => { $("seed").value = Math.floor(Math.random() * 1e6); });
    explain();
    const narrow = matchMedia("(max-width: 700px)"); // there, the candidates stand near the text
    const place = () => (narrow.matches ? $("actions").after($("details")) : $("side").prepend($("details")));
    narrow.addEventListener("change", place);
    place();
    document.addEventListener("keydown", (event) => this.onKey(event));
  }

  onKey(event) {
    const { key, target } = event, [panel] = this.panels, command = event.ctrlKey || event.metaKey, lower = key.toLowerCase();
    const inText = target.tagName === "TEXTAREA", inField = inText || ["INPUT", "SELECT"].includes(target.tagName);
    const masks = this.live && target === panel.area && key === this.maskKey && panel.selection().length;
    if (this.live && command && key === "Enter") this.fill();
    else if (this.live && command && lower === "z" && (inText || !inField)) panel.undo(event.shiftKey);
    else if (this.live && command && lower === "y" && (inText || !inField)) panel.undo(true);
    else if (event.altKey && ["ArrowLeft", "ArrowRight"].includes(key)) this.step(key === "ArrowLeft" ? -1 : 1);
    else if (command || event.altKey || event.isComposing) return;
    else if (key === "Escape" && this.playing) this.play(false);
    else if (masks) panel.mask(panel.selection());
    else if (inText && !this.live && key === " ") this.play(!this.playing);
    else if (inField || (target.tagName === "BUTTON" && key === " ")) return;
    else if (key === " " && this.shownPanels.length) this.play(!this.playing);
    else if (key === "ArrowLeft") this.step(-1);
    else if (key === "ArrowRight") this.step(1);
    else if (key === "Home") this.step(-1e9);
    else if (key === "End") this.step(1e9);
    else return;
    event.preventDefault();
  }
}

// ============================================================================================== where it runs
if (typeof WorkerGlobalScope !== "undefined") {
  const answer = serve((message) => postMessage(message));
  addEventListener("message", (event) => answer(event.data));
} else if (typeof document !== "undefined") {
  globalThis.viewer = new Viewer(JSON.parse($("data").textContent), document.currentScript.textContent);
} else module.exports = { Network, Floats, assembleKernel, decode, draw, fill, generator, look, probabilities, unpack };
