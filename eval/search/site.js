// The search page's api without a server: what eval/search/serve.py answers, computed in the page from files
// beside this one, which eval/search/site.py wrote.
//
//     text -> tokens -> text tower (onnxruntime-web) -> features -> axes -> scores with the codes of all images

const here = new URL("./", import.meta.url);
const PACK_HEAD_BYTES = 4;  // for each thumbnail of a pack: its size

async function read(name) {
  const response = await fetch(new URL(name, here)).catch(() => {
    throw new Error(`${name} cannot be loaded; is there a connection?`);
  });
  if (!response.ok) throw new Error(`${name}: the web server answers ${response.status}; copy the whole folder of the site.`);
  return response;
}
const readJson = async (name) => (await read(name)).json();
const readBytes = async (name) => (await read(name)).arrayBuffer();

// Computed on first use, and again after a failure.
function once(make) {
  let made;
  return () => made ??= make().catch((error) => { made = undefined; throw error; });
}

const site = once(() => readJson("site.json"));
export const about = async () => (await site()).about;

// {key, path, split, group, captions: [of each image], columns: {name: [of each image]}}
const table = once(async () => {
  const bytes = new Uint8Array(await readBytes("images.bin"));
  // Some web servers send a compressed file as an encoding, which the browser has then removed.
  const isCompressed = bytes[0] === 0x1f && bytes[1] === 0x8b;
  const stream = new Blob([bytes]).stream();
  return new Response(isCompressed ? stream.pipeThrough(new DecompressionStream("gzip")) : stream).json();
});

function row(images, number) {
  const of = (name) => images[name][number];
  const columns = Object.fromEntries(Object.entries(images.columns).map(([name, values]) => [name, values[number]]));
  return { number, key: of("key"), path: of("path"), split: of("split"), group: of("group"), captions: of("captions"), columns };
}

// Thumbnails are in packs, so that a folder of many images has few files, and no server needs to know ranges.
const packs = new Map();
export async function thumbnail(number) {
  const { pack_images: perPack } = await site(), pack = Math.floor(number / perPack);
  if (!packs.has(pack)) packs.set(pack, once(() => readBytes(`thumbnails/${pack}.bin`)));
  const bytes = await packs.get(pack)(), view = new DataView(bytes), place = number % perPack;
  let start = PACK_HEAD_BYTES * view.getUint32(0, true);
  const size = (at) => view.getUint32(PACK_HEAD_BYTES * at, true);
  for (let before = 1; before <= place; before++) start += size(before);
  return imageUrl(number, bytes, start, size(place + 1));
}
const urls = new Map();
function imageUrl(number, bytes, start, size) {
  if (!urls.has(number)) urls.set(number, URL.createObjectURL(new Blob([bytes.slice(start, start + size)], { type: "image/webp" })));
  return urls.get(number);
}

const ort = once(async () => {
  const runtime = await import("./onnxruntime.js");
  runtime.env.wasm.numThreads = 1;  // more need headers that a plain web server does not send
  runtime.env.wasm.wasmPaths = { wasm: new URL("onnxruntime.wasm", here).href };
  return runtime;
});

// A session answers one run at a time.
async function openTower(name) {
  const { InferenceSession } = await ort();
  const session = await InferenceSession.create(new Uint8Array(await readBytes(name)), { executionProviders: ["wasm"] });
  let last = Promise.resolve();
  return (inputs) => {
    const outputs = last.then(() => session.run(inputs));
    last = outputs.catch(() => {});
    return outputs.then((tensors) => Object.values(tensors)[0].data);
  };
}

const tokenize = once(async () => {
  const [{ makeTokenizer }, tokenizer, tables] = await Promise.all(
    [import("./text.js"), readJson("tokenizer.json"), readJson("text.json")]);
  return makeTokenizer(tokenizer, tables);
});

// One index and its model: scores of all images for a query.
class Column {
  constructor(folder, { dims, scales, context_length: length, is_causal: isCausal, preprocess }) {
    Object.assign(this, { dims, scales, length, isCausal, preprocess });
    this.texts = new Map();
    this.codes = once(async () => new Int8Array(await readBytes(`${folder}/codes.bin`)));
    this.axes = once(async () => new Float32Array(await readBytes(`${folder}/axes.bin`)));
    this.textTower = once(() => openTower(`${folder}/text.onnx`));
    this.imageTower = once(() => openTower(`${folder}/image.onnx`));
  }

  // Queries: what a code of 1 adds to the score, in each dimension.
  async text(text) {
    if (!this.texts.has(text)) this.texts.set(text, await this.project(await this.textFeatures(text)));
    return this.texts.get(text);
  }
  async textFeatures(text) {
    const [{ Tensor }, tokens, tower] = await Promise.all([ort(), tokenize(), this.textTower()]);
    const ids = tokens(text, this.length);
    if (!this.isCausal) ids.push(...new Array(this.length - ids.length).fill(0));
    const tensor = (numbers) => new Tensor("int64", BigInt64Array.from(numbers, BigInt), [1, numbers.length]);
    return tower({ input_ids: tensor(ids), attention_mask: tensor(ids.map(() => 1)) });
  }
  async image(file) {
    const [{ Tensor }, { preprocess }] = await Promise.all([ort(), import("./image.js")]), { size } = this.preprocess;
    const pixels = await preprocess(file, this.preprocess), tower = await this.imageTower();
    return this.project(await tower({ pixel_values: new Tensor("float32", pixels, [1, 3, size, size]) }));
  }
  async project(features) {  // [d] @ axes [d, dims] * scales
    const axes = await this.axes(), query = new Float32Array(this.dims);
    for (let row = 0; row < features.length; row++) {
      for (let dim = 0; dim < this.dims; dim++) query[dim] += features[row] * axes[row * this.dims + dim];
    }
    return query.map((value, dim) => value * this.scales[dim]);
  }
  async like(number) {
    const codes = (await this.codes()).subarray(number * this.dims, (number + 1) * this.dims);
    return Float32Array.from(codes, (code, dim) => code * this.scales[dim] ** 2);
  }

  async scores(query) {
    const codes = await this.codes(), scores = new Float32Array(codes.length / this.dims);
    for (let image = 0, at = 0; image < scores.length; image++) {
      let sum = 0;
      for (let dim = 0; dim < this.dims; dim++) sum += query[dim] * codes[at++];
      scores[image] = sum;
    }
    return scores;
  }
}
const columns = once(async () => (await site()).models.map((model, number) => new Column(`models/${number}`, model)));

// As filter_rows of eval/search/query.py: Uint8Array, 1 for an image that matches all.
function matching(images, filters, { n, filters: choices }) {
  const known = { ...images.columns, split: images.split, key: images.key, path: images.path }, matches = new Uint8Array(n).fill(1);
  for (const filter of filters) {
    const equals = filter.indexOf("="), [name, value] = [filter.slice(0, equals), filter.slice(equals + 1)];
    if (equals < 0) throw new Error(`filter '${filter}': must be COLUMN=VALUE; the columns are ${Object.keys(known).join(", ")}`);
    if (!Object.hasOwn(known, name)) throw new Error(`no column '${name}'; it can be ${Object.keys(known).join(", ")}`);
    known[name].forEach((other, image) => { matches[image] &= other === value; });
    if (!matches.includes(1)) {
      const values = Object.hasOwn(choices, name) ? `; ${name} can be ${choices[name].map(([choice]) => choice).join(", ")}` : "";
      throw new Error(`filter '${filter}': no image matches${values}`);
    }
  }
  return matches;
}

// The exact words of a query: {unknown, known, index, added: to the score of each image}; nothing where there are none.
const words = once(() => import("./words.js")), wordsOfImages = once(async () => (await words()).wordIndex(await table()));
async function exact(text, n) {
  const { exactWords, bonus } = await words(), asked = exactWords(text);
  if (!asked.length) return null;
  const index = await wordsOfImages(), known = asked.filter((word) => index.has(word));
  return { unknown: asked.filter((word) => !index.has(word)), known, index, added: bonus(known, index, n) };
}

// The k best images, of each group the best; `variants` counts the searched images of its group.
function top(scores, matches, group, k, exact) {
  const best = new Map(), rank = exact ? scores.map((score, number) => score + exact.added[number]) : scores;
  for (let number = 0; number < scores.length; number++) {
    if (!matches[number]) continue;
    const name = group ? group[number] : number, hit = best.get(name);
    if (!hit) best.set(name, { number, variants: 1 });
    else if (++hit.variants && rank[number] > rank[hit.number]) hit.number = number;
  }
  return [...best.values()].sort((a, b) => rank[b.number] - rank[a.number] || a.number - b.number).slice(0, k).map((hit) => (
    { ...hit, score: scores[hit.number], words: exact ? exact.known.filter((word) => exact.index.get(word).has(hit.number)) : [] }));
}

// {"searched", "unknown", "results": hits of each column, "images": number -> row}, as results_of of eval/search/serve.py.
export async function search({ text, like, image }, { k, filters, grouped, vectors_only: vectorsOnly }) {
  const [{ about }, images, models] = await Promise.all([site(), table(), columns()]);
  const { n, limits } = about;
  if (!(Number.isInteger(k) && k >= 1 && k <= limits.k)) throw new Error(`k: must be a whole number from 1 to ${limits.k}`);
  if (text?.length > limits.text) throw new Error(`text: must be a text of 1 to ${limits.text} characters`);
  if (like !== undefined && !(Number.isInteger(like) && like >= 0 && like < n)) throw new Error(`like: must be from 0 to ${n - 1}`);
  const matches = matching(images, filters, about);
  if (like !== undefined) {
    for (let number = 0; number < n; number++) {
      if (grouped ? images.group[number] === images.group[like] : number === like) matches[number] = 0;
    }
  }
  const found = text && !vectorsOnly ? await exact(text, n) : null;
  const results = await Promise.all(models.map(async (column) => {
    const query = await (text ? column.text(text) : image ? column.image(image) : column.like(like));
    return top(await column.scores(query), matches, grouped && images.group, k, found);
  }));
  const numbers = new Set([...results.flat().map(({ number }) => number), ...(like === undefined ? [] : [like])]);
  const rows = Object.fromEntries([...numbers].map((number) => [number, row(images, number)]));
  return { searched: matches.reduce((sum, one) => sum + one, 0), unknown: found?.unknown ?? [], results, images: rows };
}
