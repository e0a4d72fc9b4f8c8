// A text becomes the tokens of open_clip's SimpleTokenizer: cleaned as ftfy and Python's html.unescape clean it,
// in lower case, then byte-pair encoded by @huggingface/tokenizers.
// Not done: ftfy's repair of text that was decoded by a wrong encoding (mojibake).
import { Tokenizer } from "./tokenizers.js";

// tables: of eval.search.site.text_tables. Returns a function: text, length -> token ids, at most so many.
export function makeTokenizer(tokenizerJson, tables) {
  const tokenizer = new Tokenizer(tokenizerJson, {}), clean = makeClean(tables);
  return (text, length) => {
    const { ids } = tokenizer.encode(clean(text), { add_special_tokens: false });
    return [tables.start, ...ids.slice(0, length - 2), tables.end];
  };
}

export function makeClean(tables) {
  const [strict, html, numbers, characters] = ["strict_entities", "entities", "numbers", "characters"].map(
    (name) => new Map(Object.entries(tables[name])));

  // A character reference, without & and ;
  function character(reference) {
    const code = /^#x/i.test(reference) ? parseInt(reference.slice(2), 16) : parseInt(reference.slice(1), 10);
    if (numbers.has(String(code))) return numbers.get(String(code));
    return code > 0x10ffff || (code >= 0xd800 && code < 0xe000) ? "\ufffd" : String.fromCodePoint(code);
  }
  const unescapeStrict = (text) => text.replace(/&#?[0-9A-Za-z]{1,24};/g, (entity) => {
    if (strict.has(entity)) return strict.get(entity);
    return /^&#(\d+|x[\da-f]+);$/i.test(entity) ? character(entity.slice(1, -1)) : entity;
  });
  const unescapeHtml = (text) => text.replace(/&(#\d+|#x[\da-f]+|[^\t\n\f <&#;]{1,32})(;?)/giu, (entity, name, semicolon) => {
    if (name[0] === "#") return character(name);
    if (html.has(name + semicolon)) return html.get(name + semicolon);
    for (let end = name.length; end > 1; end--) {
      if (html.has(name.slice(0, end))) return html.get(name.slice(0, end)) + name.slice(end) + semicolon;
    }
    return entity;
  });
  function fix(text) {
    const hasEntities = !text.includes("<");
    for (let before; before !== text;) {
      before = text;
      if (hasEntities) text = unescapeStrict(text);
      text = text.replace(/\x1b\[[\d;]*[a-zA-Z]/g, "");
      text = Array.from(text, (sign) => characters.get(sign) ?? sign).join("").normalize("NFC");
    }
    return text;
  }
  return (text) => unescapeHtml(unescapeHtml(fix(text))).split(/[\s\x1c-\x1f\x85]+/).filter(Boolean).join(" ").toLowerCase();
}
