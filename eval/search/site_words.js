// Exact words of a query, and the images that have them, as eval/search/words.py finds them.

const WEIGHT = 2, END = " ", PART = /[\p{L}\p{N}]+/gu, LEAST_CHARACTERS = 4, MAX_CHARACTERS = 8192, MAX_TOKENS = 512;
const SURROUNDING = /^["'“”‘’`.,;:!?()[\]{}<>]+|["'“”‘’`.,;:!?()[\]{}<>]+$/g;

// Between Python's white space, of which JavaScript's \s is another set.
const WHOLE = /[^\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/g;

export function tokens(text) {
  return (text.toLowerCase().match(WHOLE) ?? []).flatMap((word) => {
    const whole = word.replace(SURROUNDING, ""), parts = whole.match(PART) ?? [];
    return parts.length && !(parts.length === 1 && parts[0] === whole) ? [whole, ...parts] : parts;
  });
}

// What an image with this text is found by, as indexed() of words.py: END follows a whole word.
export function indexed(text) {
  return tokens(text).flatMap((token) => {
    if (token.match(PART)[0] === token) return [token];
    const ends = [...token.matchAll(PART)].map((part) => part.index + part[0].length);
    return [token, token + END, ...ends.slice(1).filter((end) => end < token.length).map((end) => token.slice(0, end))];
  });
}

export function exactWords(text) {
  const quoted = [];
  const others = text.replace(/"([^"]*)"|“([^”]*)”/g, (_, one, other) => { quoted.push(one || other || ""); return " "; });
  const withDigits = tokens(others).filter((token) => [...token].length >= LEAST_CHARACTERS && /\p{Nd}/u.test(token));
  return [...new Set([...tokens(quoted.join(" ")), ...withDigits])];
}

// The name of a file without its folders and its extension.
function stem(path) {
  const name = path.split("/").filter(Boolean).pop() ?? "", dot = name.lastIndexOf(".");
  return dot > 0 && dot < name.length - 1 ? name.slice(0, dot) : name;
}

// Word -> the set of images that have it.
export function wordIndex({ key, path, captions, columns }) {
  const index = new Map();
  for (let image = 0; image < key.length; image++) {
    const values = Object.values(columns).map((column) => column[image]).filter(Boolean);
    let left = MAX_CHARACTERS, count = 0;
    for (const text of [stem(path[image] || key[image]), ...values, ...captions[image]]) {
      for (const token of indexed(text.slice(0, left)).slice(0, MAX_TOKENS - count)) {
        if (!index.has(token)) index.set(token, new Set());
        index.get(token).add(image);
        count++;
      }
      left -= Math.min(left, text.length);
    }
  }
  return index;
}

// What the known words of a query add to the score of each image of n: BM25 with k1 0 and b 0, its maximum WEIGHT.
export function bonus(known, index, n) {
  const scores = new Float32Array(n);
  for (const word of [...known, ...known.map((word) => word + END).filter((word) => index.has(word))]) {
    const having = index.get(word), idf = Math.log(1 + (n - having.size + 0.5) / (having.size + 0.5));
    for (const image of having) scores[image] += idf;
  }
  const largest = scores.reduce((best, score) => Math.max(best, score), 0);
  return largest ? scores.map((score) => score * WEIGHT / largest) : scores;
}
