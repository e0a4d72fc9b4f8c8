"""What a site of `python -m eval site` finds in a browser, against `python -m eval search`, and how fast.

  python -m benchmarks.site SITE INDEX [--queries 500] [--screenshots FOLDER]

Captions of the index, every so many, are typed into the page's api in an installed Chromium, with the tokens
of site_text.js compared to open_clip's. With onnxruntime-node (in FOLDER/node_modules, by --node FOLDER) the
same scripts run in node as well.
"""

import http.server
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from data_prep.cli import Index as IndexFolder
from data_prep.errors import exit_on_user_error
from data_prep.terminal import say
from eval.search.index import Index
from eval.search.nearest import Nearest
from eval.search.query import text_query
from eval.search.tower import K, some_captions

TIMED = """async (texts) => {
  const options = { k: 10, filters: [], grouped: true }, answers = [], times = [];
  const { search } = await import("./site.js");
  const first = performance.now();
  await search({ text: "one" }, options);
  const loaded = performance.now() - first;
  for (const text of texts) {
    const start = performance.now();
    const { results } = await search({ text }, options);
    times.push(performance.now() - start);
    answers.push(results.map((hits) => hits.map(({ number }) => number)));
  }
  return { answers, times, loaded };
}"""
NODE = """import * as fs from "node:fs";
globalThis.fetch = async (url) => new Response(fs.readFileSync(url));
const texts = JSON.parse(fs.readFileSync("texts.json"));
fs.writeFileSync("answers.json", JSON.stringify(await (%s)(texts)));
"""
NODE_RUNTIME = """import { createRequire } from "node:module";
const { InferenceSession: { create }, Tensor } = createRequire(%s)("onnxruntime-node");
const ONE_THREAD = { intraOpNumThreads: 1 };
export const env = { wasm: {} }, InferenceSession = { create: (bytes) => create(bytes, ONE_THREAD) };
export { Tensor };
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a plain static server of a folder."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def in_chromium(site: Path, texts: list[str], screenshots: Path | None) -> dict:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from browser import chromium, expect, opened, screenshot

    with served(site.parent) as url, chromium() as browser, opened(browser, f"{url}/{site.name}/") as page:
        expect(page.locator(".card").first).to_be_visible()
        answer = page.evaluate(TIMED, texts)
        for width in (1280, 390) if screenshots else ():
            page.set_viewport_size({"width": width, "height": 800})
            page.goto(f"{url}/{site.name}/#text=bell%20with%20a%20slash")
            expect(page.locator("#status")).to_contain_text("Top")
            screenshot(page, screenshots / f"site-{width}.png")
        return answer


def in_node(site: Path, texts: list[str], node: Path) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        for path in site.iterdir():
            if path.suffix in (".js", ".json", ".bin"):
                shutil.copyfile(path, copy / path.name)
        (copy / "models").symlink_to(site.resolve() / "models")
        (copy / "package.json").write_text('{"type": "module"}')
        (copy / "onnxruntime.js").write_text(NODE_RUNTIME % json.dumps(f"{node.resolve()}/"))
        (copy / "texts.json").write_text(json.dumps(texts))
        (copy / "run.js").write_text(NODE % TIMED)
        subprocess.run(["node", "run.js"], cwd=copy, check=True)
        return json.loads((copy / "answers.json").read_text())


def main(
    site: Annotated[Path, tyro.conf.Positional],
    index: Annotated[IndexFolder, tyro.conf.Positional],
    queries: int = 500,
    screenshots: Path | None = None,
    node: Path | None = None,
) -> None:
    opened_index = Index(index)
    texts = some_captions(opened_index)[:queries]
    features = text_query(opened_index.model(), texts)
    expected = [[hit.number for hit in hits] for hits in Nearest(opened_index).top(features, K)]
    report("Chromium, onnxruntime-web", expected, in_chromium(site, texts, screenshots))
    if node:
        report("node, onnxruntime-node", expected, in_node(site, texts, node))


def report(name: str, expected: list[list[int]], run: dict) -> None:
    pairs = list(zip(expected, (answer[0] for answer in run["answers"]), strict=True))
    same = 100 * np.mean([len({*a} & {*b}) / len(a) for a, b in pairs])
    first = 100 * np.mean([a[0] == b[0] for a, b in pairs])
    say(
        f"{name}: {len(pairs)} queries, top {K} {same:.2f} % as eval search, first {first:.1f} %;"
        f" {np.median(run['times']):.1f} ms a query (median), {run['loaded']:.0f} ms with loading",
        flush=True,
    )


if __name__ == "__main__":
    exit_on_user_error(lambda: tyro.cli(main, description=__doc__))
