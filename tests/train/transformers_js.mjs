// The features of captions and images by transformers.js: node transformers_js.mjs PACKAGE FOLDER JOB.json
import { readFileSync } from "node:fs";
import { basename, dirname } from "node:path";

const [library, folder, job] = process.argv.slice(2);
const { AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage, env } =
  await import(library);
env.allowRemoteModels = false;
env.localModelPath = `${dirname(folder)}/`;
const place = basename(folder);
const { captions, images } = JSON.parse(readFileSync(job));
const tokenizer = await AutoTokenizer.from_pretrained(place);
const processor = await AutoProcessor.from_pretrained(place);
processor.image_processor.resample = "lanczos"; // as the model card does
const result = {};
for (const dtype of ["fp32", "q8"]) {
  const textModel = await CLIPTextModelWithProjection.from_pretrained(place, { dtype });
  const visionModel = await CLIPVisionModelWithProjection.from_pretrained(place, { dtype });
  const { text_embeds } = await textModel(tokenizer(captions, { padding: true, truncation: true }));
  const image_embeds = [];
  for (const path of images) {
    const output = await visionModel(await processor(await RawImage.read(path)));
    image_embeds.push(output.image_embeds.tolist()[0]);
  }
  result[dtype] = { text_embeds: text_embeds.tolist(), image_embeds };
}
console.log(JSON.stringify(result));
