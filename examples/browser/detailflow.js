// Generate images with exported ONNX files in a browser; see ../onnx_generate.py for the same loop in Python, and the
// README in the exported folder for what it does. Knows nothing of the page.

const DIST = "./node_modules/onnxruntime-web/dist/";
const TINY = 2 ** -126; // the smallest temperature, as float32 has it

const BACKENDS = ["wasm", "webgpu"];

/** Load a model from a folder: `precision` is "float32" or "int8", `backend` is "wasm" or "webgpu". */
export async function load(folder, precision, backend) {
  if (!BACKENDS.includes(backend)) throw new Error(`the backend must be wasm or webgpu, not ${backend}`);
  const model = await readModel(folder);
  const files = model.files[precision];
  if (!files) throw new Error(`the export in ${folder} has no ${precision} networks`);
  const ort = await import(`${DIST}ort.${backend}.min.mjs`);
  ort.env.logLevel = "error"; // it warns of each operation that stays on the processor
  const sessions = {};
  // One network after the other, as they share one WebAssembly module.
  for (const part of ["step", "decoder"]) {
    const [name, weights] = [files[part], `${files[part]}.data`];
    const options = { executionProviders: [backend] };
    if (weights in model.sha256)
      options.externalData = [{ path: weights, data: await network(folder, weights, model) }];
    sessions[part] = await ort.InferenceSession.create(await network(folder, name, model), options);
  }
  if (!networksFit(model, sessions))
    throw new Error(`the networks in ${folder} do not fit its model.json: repeat the export`);
  return new Generator(ort, model, sessions, backend);
}

/** Return the backend that this browser can use: "webgpu" where there is a graphics processor for it, else "wasm". */
export async function bestBackend() {
  try {
    return (await navigator.gpu?.requestAdapter()) ? "webgpu" : "wasm";
  } catch {
    return "wasm";
  }
}

/** Fetch a file of the export. An older one in the browser's cache is not taken: it may not fit the other files. */
async function get(folder, name) {
  const response = await fetch(`${folder}/${name}`, { cache: "no-cache" });
  if (response.status === 404)
    throw new Error(`there is no ${folder}/${name}: run \`detailflow export --onnx ${folder}\` first`);
  if (!response.ok) throw new Error(`could not read ${folder}/${name}: the server answered with status ${response.status}`);
  return response;
}

/** Fetch a network, or its weights, and check that model.json was written with them. */
async function network(folder, name, { sha256 }) {
  const bytes = await (await get(folder, name)).arrayBuffer();
  // Browsers compute checksums only in pages from this machine or by https.
  if (crypto.subtle && hexadecimal(await crypto.subtle.digest("SHA-256", bytes)) !== sha256[name])
    throw new Error(`${folder}/${name} is not the file that model.json was written with: repeat the export`);
  return new Uint8Array(bytes);
}

function hexadecimal(bytes) {
  return Array.from(new Uint8Array(bytes), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Return whether the networks have the inputs and outputs that model.json speaks of, where sizes are fixed. */
function networksFit({ depth, heads, head_dim, codebook_size }, { step, decoder }) {
  const found = shapes(step);
  const caches = found.filter((shape) => shape.includes("."));
  const others = found.filter((shape) => !shape.includes("."));
  return (
    caches.length === 4 * depth &&
    caches.every((shape) => shape.endsWith(` * ${heads} * ${head_dim}`)) &&
    others.join() === `inputs * *,logits * * ${codebook_size}` &&
    shapes(decoder).join() === "ids * *,size 1,pixels * 3 * *"
  );
}

/** Return the name and the shape of each input and output, with a star where any size will do. */
function shapes({ inputMetadata, outputMetadata }) {
  const size = (value) => (typeof value === "number" ? value : "*");
  return [...inputMetadata, ...outputMetadata].map(({ name, shape }) => [name, ...shape.map(size)].join(" "));
}

class Generator {
  constructor(ort, model, { step, decoder }, backend) {
    Object.assign(this, { ort, model, step, decoder, backend });
  }

  /** Yield {count, tokens} after each step: the tokens so far of an image for each class number, (images, count). */
  async *generate(classes, seed, options = {}) {
    const { model } = this;
    checkSeed(seed);
    checkClasses(classes, model);
    const sampling = { ...model.sampling, ...options };
    const guided = sampling.guidance_scale !== 1;
    const rows = guided ? [...classes, ...classes.map(() => model.null_class)] : classes;
    const tokens = classes.map(() => []);
    const noise = classes.map((_, image) => imageNoise(BigInt(seed), image, model.num_tokens));
    let cache = this.emptyCache(rows.length);
    for (const [start, end] of model.steps) {
      const inputs = rows.flatMap((row, i) => this.inputs(row, tokens[i % classes.length], start, end));
      const results = await this.step.run({ ...cache, inputs: this.integers(inputs, [rows.length, end - start]) });
      cache = this.nextCache(cache, results);
      const logits = results.logits.data;
      const scale = Math.fround(guidanceScale(model, sampling, start));
      const size = model.codebook_size;
      for (let image = 0; image < classes.length; image++)
        for (let i = start; i < end; i++) {
          const at = (row) => logits.subarray((row * (end - start) + i - start) * size).subarray(0, size);
          const mixed = guided ? mix(at(image), at(image + classes.length), scale) : at(image).slice();
          tokens[image].push(draw(mixed, noise[image][i], sampling));
        }
      yield { count: end, tokens };
    }
  }

  /** Return what positions `start` to `end` hold: the class, c tokens, g − 1 masks, then the other tokens. */
  inputs(row, tokens, start, end) {
    const { causal_tokens: c, group_size: g, code_row, mask_row } = this.model;
    const held = [];
    for (let i = start; i < end; i++)
      if (i === 0) held.push(row);
      else if (i <= c) held.push(code_row + tokens[i - 1]);
      else if (i < c + g) held.push(mask_row + i - c - 1);
      else held.push(code_row + tokens[i - g]);
    return held;
  }

  emptyCache(rows) {
    const { heads, head_dim } = this.model;
    const names = this.step.inputNames.filter((name) => name !== "inputs");
    const empty = () => new this.ort.Tensor("float32", new Float32Array(0), [rows, heads, 0, head_dim]);
    return Object.fromEntries(names.map((name) => [name, empty()]));
  }

  nextCache(cache, results) {
    return Object.fromEntries(Object.keys(cache).map((name) => [name, results[name.replace("past_key_values", "present")]]));
  }

  integers(values, shape) {
    return new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);
  }

  /** Decode the first tokens, (images, count), to ImageData objects. */
  async decode(tokens) {
    const count = tokens[0].length;
    const side = this.model.sizes[this.model.counts.indexOf(count)];
    const feeds = { ids: this.integers(tokens.flat(), [tokens.length, count]), size: this.integers([side], [1]) };
    const pixels = (await this.decoder.run(feeds)).pixels.data;
    return tokens.map((_, image) => toImage(pixels.subarray(image * 3 * side * side), side));
  }
}

/** (3, side, side) numbers in about [-1, 1] → ImageData. */
function toImage(pixels, side) {
  const image = new ImageData(side, side);
  for (let i = 0; i < side * side; i++) {
    for (let color = 0; color < 3; color++) {
      const value = 127.5 * pixels[color * side * side + i] + 128;
      image.data[4 * i + color] = Math.floor(Math.min(Math.max(value, 0), 255));
    }
    image.data[4 * i + 3] = 255; // opaque
  }
  return image;
}

// --- model.json -------------------------------------------------------------------------------------------------------

const LARGEST_INTEGER = 2 ** 31 - 1;
const MOST_TOKENS = 2 ** 13; // of an image; published models have 512 at most

/** Return what the folder's model.json says, after a check that its entries fit each other. */
export async function readModel(folder) {
  const text = await (await get(folder, "model.json")).text();
  const model = parsed(text);
  if (model?.format !== "detailflow-onnx")
    throw new Error(`${folder}/model.json is not what \`detailflow export\` writes: repeat the export`);
  if (!model.files) throw new Error(`the export in ${folder} is not complete: repeat it`);
  const wrong = misfits(model);
  if (wrong.length) throw new Error(`${folder}/model.json is damaged, see ${wrong.join(", ")}: repeat the export`);
  return model;
}

/** Return what JSON holds, or null if it is none. */
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

const isText = (value) => typeof value === "string";
const between = (value, low, high = LARGEST_INTEGER) => Number.isInteger(value) && low <= value && value <= high;
const all = (list, fits) => Array.isArray(list) && list.every(fits);

/** Return which entries do not fit the others: steps must go from 0 to all tokens, and after each there is a size. */
function misfits(model) {
  const { steps, counts, sizes, num_tokens: total, class_names: names, num_classes: classes } = model;
  const follows = (step, i) =>
    all(step, Number.isInteger) && step.length === 2 && step[0] === (i ? steps[i - 1][1] : 0) && step[0] < step[1];
  const stepsFit = all(steps, follows) && steps.at(-1)?.[1] === total;
  const rows = [model.null_class, model.code_row, model.mask_row];
  const named = names === null || (all(names, isText) && names.length === classes);
  const pairs = Object.values(model.files);
  const listed = (name) => isText(model.sha256?.[name]);
  const holds = {
    "files, sha256": pairs.length && pairs.every((pair) => listed(pair?.step) && listed(pair?.decoder)),
    num_tokens: between(total, 1, MOST_TOKENS),
    steps: stepsFit,
    counts: all(counts, (n) => between(n, 1, total)) && stepsFit && steps.every(([, end]) => counts.includes(end)),
    sizes: all(sizes, (side) => between(side, 1)) && sizes.length === counts?.length,
    class_names: named,
    num_classes: between(classes, 0),
    "null_class, code_row, mask_row":
      rows.every((row) => between(row, 0)) && classes <= rows[0] && rows[0] < rows[1] && rows[1] < rows[2],
    codebook_size: model.codebook_size === model.mask_row - model.code_row,
    causal_tokens: between(model.causal_tokens, 0, total),
    sampling: samplingFits(model.sampling ?? {}),
    "heads, head_dim, group_size": [model.heads, model.head_dim, model.group_size].every((value) => between(value, 1)),
  };
  return Object.keys(holds).filter((name) => !holds[name]);
}

function samplingFits({ guidance_scale, guidance_schedule, temperature, top_k, top_p }) {
  return (
    Number.isFinite(guidance_scale) &&
    guidance_scale >= 0 &&
    guidance_scale <= 1e6 &&
    ["constant", "linear"].includes(guidance_schedule) &&
    Number.isFinite(temperature) &&
    temperature >= 0 &&
    (top_k === null || between(top_k, 0)) &&
    (top_p === null || (Number.isFinite(top_p) && top_p > 0 && top_p <= 1))
  );
}

// --- what is asked for -------------------------------------------------------------------------------------------------

/** Refuse what is no seed; BigInt alone would take "" and " " as 0, and a larger number's lower bits. */
function checkSeed(seed) {
  const exact = typeof seed !== "number" || Number.isSafeInteger(seed); // larger numbers are rounded: give text or a BigInt
  if (!exact || !/^[0-9]+$/.test(String(seed)) || BigInt(seed) >= 2n ** 64n)
    throw new Error(`the seed must be a whole number from 0 to ${2n ** 64n - 1n}, not ${seed}`);
}

function checkClasses(classes, { num_classes: count, null_class: none }) {
  const wrong = classes.filter((label) => (count ? !between(label, 0, count - 1) : label !== none));
  if (!wrong.length) return;
  const allowed = count ? `must be a whole number from 0 to ${count - 1}` : `of this model is always ${none}`;
  throw new Error(`the class number ${allowed}, not ${wrong[0]}`);
}

// --- drawing tokens --------------------------------------------------------------------------------------------------

function guidanceScale(model, sampling, start) {
  if (sampling.guidance_schedule === "constant" || start < model.causal_tokens) return sampling.guidance_scale;
  const groups = model.num_tokens / model.group_size;
  return (sampling.guidance_scale * (groups - Math.floor(start / model.group_size) + 1)) / (groups + 1);
}

/** Return unconditional + scale · (conditional − unconditional), rounded to float32 as PyTorch does. */
function mix(conditional, unconditional, scale) {
  return conditional.map((value, i) => unconditional[i] + Math.fround(scale * Math.fround(value - unconditional[i])));
}

/** Draw a code from a Float32Array of logits, which is changed, with a uniform number. */
function draw(logits, uniform, { temperature, top_k, top_p }) {
  const largest = logits.reduce((a, b) => Math.max(a, b));
  if (temperature === 0) return logits.indexOf(largest);
  const divisor = Math.fround(Math.max(temperature, TINY));
  const weights = logits.map((value) => Math.exp(Math.fround(Math.fround(value - largest) / divisor)));
  if (top_k || top_p) keepLikely(weights, top_k || weights.length, top_p || 1);
  const threshold = uniform * weights.reduce((a, b) => a + b, 0);
  let sum = 0;
  const code = weights.findIndex((weight) => (sum += weight) > threshold);
  return code < 0 ? weights.length - 1 : code;
}

/** Set to 0 all but the `topK` largest weights, and of these all but the fewest that sum to `topP` of them. */
function keepLikely(weights, topK, topP) {
  const order = [...weights.keys()].sort((a, b) => weights[b] - weights[a]); // stable: of equal ones the first stay
  const total = order.slice(0, topK).reduce((sum, i) => sum + weights[i], 0);
  let before = 0;
  order.forEach((code, place) => {
    const weight = weights[code];
    if (place >= topK || (place && before >= topP * total)) weights[code] = 0;
    before += weight;
  });
}

// --- noise -----------------------------------------------------------------------------------------------------------

/** Return the uniform numbers of an image's tokens, those that `detailflow generate` draws from the same seed. */
export function imageNoise(seed, image, count) {
  const next = mersenneTwister(imageSeed(seed, image));
  return Array.from({ length: count }, () => {
    const upper = next() & 0x1fffff; // 21 + 32 bits
    return (upper * 2 ** 32 + next()) * 2 ** -53;
  });
}

/** Return the lower 32 bits of NumPy's SeedSequence(seed, spawn_key=(image,)). */
function imageSeed(seed, image) {
  const words = [Number(seed & 0xffffffffn), Number(seed >> 32n), 0, 0];
  const folded = (value) => value ^ (value >>> 16);
  let constant = 0x43b0d7e5;
  const hashed = (value) => {
    value ^= constant;
    constant = Math.imul(constant, 0x931e8875);
    return folded(Math.imul(value, constant));
  };
  const mixed = (x, y) => folded((Math.imul(x, 0xca01f9dd) - Math.imul(y, 0x4973f715)) | 0);
  const pool = words.map(hashed);
  for (let from = 0; from < 4; from++)
    for (let to = 0; to < 4; to++) if (from !== to) pool[to] = mixed(pool[to], hashed(pool[from]));
  for (let to = 0; to < 4; to++) pool[to] = mixed(pool[to], hashed(image));
  return folded(Math.imul(pool[0] ^ 0x8b51f9dd, Math.imul(0x8b51f9dd, 0x58f38ded))) >>> 0;
}

/** Return a function that draws 32 bits: MT19937, PyTorch's generator on a CPU. */
function mersenneTwister(seed) {
  const state = new Uint32Array(624);
  state[0] = seed;
  for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  let place = 624;
  return () => {
    if (place === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      place = 0;
    }
    let y = state[place++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}
