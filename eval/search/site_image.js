// An image file becomes what the model's preprocessing makes of it: upright, on the background, resized as Pillow
// resizes (antialiased; each pass rounded to 8 bits), cropped in the center, normalised.
const MAX_PIXELS = 50e6;
const FILTERS = {  // the value at a distance, and the distance from which it is 0; bicubic: Keys 1981, a = -1/2
  bilinear: [(x) => Math.max(0, 1 - x), 1],
  bicubic: [(x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0), 2],
};

// For each new pixel of a side: the first old pixel and the weights.
function weightsOf(oldSide, newSide, [filter, reach]) {
  const scale = oldSide / newSide, stretch = Math.max(scale, 1), support = reach * stretch;
  return Array.from({ length: newSide }, (_, place) => {
    const center = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5)), end = Math.min(oldSide, Math.trunc(center + support + 0.5));
    const weights = Array.from({ length: end - first }, (_, at) => filter(Math.abs(at + first - center + 0.5) / stretch));
    const sum = weights.reduce((a, b) => a + b, 0);
    return [first, weights.map((weight) => weight / sum)];
  });
}

// RGBA, width x height -> newWidth x height, then turned on its side, so that two calls resize both sides.
function resizeRows(pixels, width, height, newWidth, filter) {
  const made = new Uint8ClampedArray(4 * newWidth * height), columns = weightsOf(width, newWidth, filter);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < newWidth; x++) {
      const [first, weights] = columns[x];
      for (let channel = 0; channel < 3; channel++) {
        let sum = 0;
        for (let at = 0; at < weights.length; at++) sum += weights[at] * pixels[4 * (y * width + first + at) + channel];
        made[4 * (x * height + y) + channel] = Math.floor(sum + 0.5);
      }
    }
  }
  return made;
}

// Python's round: halves to the even number.
const roundHalf = (half) => (half % 1 ? 2 * Math.round(half / 2) : half);

// Float32Array of [3, size, size].
export async function preprocess(file, { size, resize_mode: mode, interpolation, mean, std, background }) {
  const bitmap = await createImageBitmap(file).catch(() => { throw new Error("the image: not an image, or damaged; use another image"); });
  let { width, height } = bitmap;
  if (width * height > MAX_PIXELS) throw new Error(`the image: ${width} x ${height} pixels; use one of at most ${MAX_PIXELS / 1e6} million`);
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = background;
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  let pixels = context.getImageData(0, 0, width, height).data;
  const shorter = Math.min(width, height), filter = FILTERS[interpolation];
  const side = (length) => (mode === "squash" || length === shorter ? size : Math.trunc(size * length / shorter));
  const newWidth = side(width), newHeight = side(height);
  pixels = resizeRows(pixels, width, height, newWidth, filter);
  pixels = resizeRows(pixels, height, newWidth, newHeight, filter);
  const left = roundHalf((newWidth - size) / 2), above = roundHalf((newHeight - size) / 2);
  return Float32Array.from({ length: 3 * size * size }, (_, at) => {
    const channel = Math.floor(at / size / size), y = Math.floor(at / size) % size, x = at % size;
    return (pixels[4 * ((above + y) * newWidth + left + x) + channel] / 255 - mean[channel]) / std[channel];
  });
}
