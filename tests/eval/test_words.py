"""Exact words: BM25 equals its formula, and all ways to search put what has the words first."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import assert_mistake, call_here
from test_serve import ask, running

from eval.__main__ import main
from eval.api import Index as ApiIndex
from eval.search import words as words_module
from eval.search.command import compress, search
from eval.search.index import Index, filter_rows
from eval.search.nearest import Nearest
from eval.search.query import text_query
from eval.search.serve import app, open_columns
from eval.search.words import (
    END,
    MAX_CHARACTERS,
    MAX_TOKENS,
    WEIGHT,
    Words,
    exact_words,
    indexed,
    tokens,
    top,
)


def with_metadata(source: Path, folder: Path, columns: dict[str, list]) -> Path:
    """A copy of an index with other metadata."""
    shutil.copytree(source, folder)
    table = pq.read_table(source / "metadata.parquet")
    for name, values in columns.items():
        if name in table.column_names:
            at = table.column_names.index(name)
            table = table.set_column(
                at, table.schema.field(name), pa.array(values, table.schema.field(name).type)
            )
        else:
            table = table.append_column(name, pa.array(values, pa.string()))
    pq.write_table(table, folder / "metadata.parquet")
    return folder


@pytest.fixture(scope="module")
def parts(icon_index, tmp_path_factory) -> Path:
    """The icons with a part number for each group, and one null."""
    groups = Index(icon_index).group_of
    numbers = [None, *(f"{'AB'[group % 2]}X-{4000 + group // 2}/7" for group in groups[1:].tolist())]
    return with_metadata(icon_index, tmp_path_factory.mktemp("parts") / "icons", {"part number": numbers})


@pytest.fixture(scope="module")
def index(parts) -> Index:
    return Index(parts)


@pytest.fixture(scope="module")
def clip(index):
    return index.model()


def test_tokens_keep_part_numbers_whole_and_split_them():
    assert list(tokens("Bolt (M8x30), AB-1234/7: 3001.")) == [
        *("bolt", "m8x30", "ab-1234/7", "ab", "1234", "7", "3001")
    ]
    assert list(tokens("front_ÄX-9.png --- ")) == ["front_äx-9.png", "front", "äx", "9", "png"]
    assert exact_words('a red "Bell Kowalski" AX-4711 of 3M, “Spectrum” "') == [
        *("bell", "kowalski", "spectrum", "ax-4711", "4711")
    ]
    assert exact_words("2 well-known bells in 3D, with a slash") == []


def test_scores_are_those_of_the_formula(index):
    words = Words(index)
    assert words.known('"bell" AX-4003/7 unknown-99') == ["bell", "ax-4003/7", "4003"]
    documents = [[token for text in of_image for token in indexed(text)] for of_image in words.texts()]
    for known in (["bell"], ["ax-4003/7", "4003", "7"], ["arrow", "up", "fill"]):
        expected = []
        for document in documents:
            score = 0.0
            for word in [*known, *(word + END for word in known if word + END in words._ids)]:
                having = sum(word in other for other in documents)
                idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
                score += idf * (word in document)
            expected.append(score)
        assert max(expected) > 0
        np.testing.assert_allclose(words.scores(known), expected, rtol=1e-5)
        for word in known:
            assert sorted(words.having(word)) == [at for at, one in enumerate(documents) if word in one]


@pytest.fixture(scope="module")
def small(parts, tmp_path_factory) -> Index:
    compress(parts, out := tmp_path_factory.mktemp("small") / "icons", dims=8)
    return Index(out)


@pytest.mark.parametrize(
    ("name", "filters", "grouped"),
    [("index", [], True), ("index", ["split=test"], False), ("small", [], True), ("small", [], False)],
)
def test_ranking_is_brute_force_over_all_images(request, clip, name, filters, grouped):
    index = request.getfixturevalue(name)
    rows, words = filter_rows(index, filters), Words(index)
    texts = ["bell AX-4003/7", '"arrow"', "4005 4006 4007", '"ax" arrow', "bell"]
    features = text_query(clip, texts)
    matrix = index.projection.matrix if index.projection else np.eye(features.shape[1])
    cosines = features.double().numpy() @ matrix @ index.decoded(slice(None)).astype(np.float64).T
    for k in (3, 400):
        for text, of_text, hits in zip(
            texts, cosines, top(Nearest(index), words, features, texts, k, rows, grouped), strict=True
        ):
            known, fused = words.known(text), of_text.copy()
            if known:
                fused += WEIGHT * words.scores(known).astype(float) / words.scores(known).max()
            searched = np.ones(len(index), bool) if rows is None else rows
            found, seen = [], set()
            for number in np.argsort(-fused, kind="stable").tolist():
                group = int(index.group_of[number])
                if searched[number] and not (grouped and group in seen) and len(found) < k:
                    seen.add(group)
                    variants = int((searched & (index.group_of == group)).sum()) if grouped else 1
                    found.append((fused[number], variants, of_text[number]))
            fused_of_hits = [fused[hit.number] for hit in hits]  # equal images may change places
            assert fused_of_hits == pytest.approx([one[0] for one in found], abs=1e-5)
            assert [hit.score for hit in hits] == pytest.approx(
                [of_text[hit.number] for hit in hits], abs=1e-5
            )
            sizes = np.bincount(index.group_of[searched]) if grouped else np.ones(len(index))
            assert [hit.variants for hit in hits] == [
                sizes[index.group_of[hit.number]] if grouped else 1 for hit in hits
            ]
            for hit in hits:
                assert hit.words == tuple(word for word in known if hit.number in words.having(word))


def test_a_part_number_finds_itself_first_and_then_what_begins_with_it(icon_index, clip, tmp_path):
    numbers = ["AX-4711", "AX-4711/2", "AX-4711-C/9", "BX-4711", "XAX-4711", "AX-47110", "AX-4712"]
    n = len(Index(icon_index))
    columns = {"part number": [numbers[at // 2] if at // 2 < len(numbers) else None for at in range(n)]}
    index = Index(with_metadata(icon_index, tmp_path / "icons", columns))
    words = Words(index)
    for text, begins in (
        ("AX-4711", [{0, 1}, {2, 3, 4, 5}, {6, 7, 8, 9}]),  # the last by the part 4711
        ("ax-4711/2", [{2, 3}, {0, 1, 4, 5, 6, 7, 8, 9}]),
        ("AX-4711-C", [{4, 5}, {0, 1, 2, 3, 6, 7, 8, 9}]),
        ('"AX"', [set(range(6)) | {10, 11, 12, 13}]),
    ):
        (hits,) = top(Nearest(index), words, text_query(clip, [text]), [text], n, grouped=False)
        ranked = [hit.number for hit in hits]
        for expected in begins:
            assert set(ranked[: len(expected)]) == expected, text
            del ranked[: len(expected)]
    assert words.unknown("AX-4711 AX-471 AX-4711/2") == ["ax-471"]


def test_without_known_words_it_is_the_ranking_of_vectors(index, clip):
    texts = ["a bell with a slash", 'an "unheard-of" icon', "QX-999999", "bell", ""]
    features, nearest = text_query(clip, texts), Nearest(index)
    words = Words(index)
    assert top(nearest, words, features, texts, 20) == nearest.top(features, 20)
    assert top(nearest, None, features, ["AX-4003/7"] * 5, 20) == nearest.top(features, 20)
    sentences = Words(index)
    top(nearest, sentences, features, ["a bell with a slash"] * 5, 5)
    assert sentences._bm25 is None  # sentences do not pay for it


def test_all_ways_to_search_find_a_part_number_first(parts, index, tmp_path, capsys):
    number = next(at for at in range(50, len(index)) if index.rows([at])[0]["columns"]["part number"])
    part = index.rows([number])[0]["columns"]["part number"]
    text, group = f"a bell {part}", int(index.group_of[number])
    vectors_only = tmp_path / "vectors.json"
    search(parts, text=text, k=9, json=vectors_only, vectors_only=True)
    assert "words" not in capsys.readouterr().out
    search(parts, text=text, k=9, json=tmp_path / "words.json")
    printed = capsys.readouterr().out
    assert part.lower() in printed
    assert "no image has" not in printed
    search(parts, text='"zeppelin" AX-4711', k=1)
    assert "no image has zeppelin, ax-4711, 4711" in capsys.readouterr().out
    ranked, by_vectors = (
        json.loads(path.read_text())["results"] for path in (tmp_path / "words.json", vectors_only)
    )
    assert ranked[0]["group"] == group != by_vectors[0]["group"]
    assert ranked[0]["words"][0] == part.lower()
    assert [one["words"] for one in by_vectors] == [[]] * 9

    (tmp_path / "q.csv").write_text(f"text\n{text}\n")
    search(parts, queries_csv=tmp_path / "q.csv", out=tmp_path / "found.csv", k=9)
    with open(tmp_path / "found.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["number"]), list(filter(None, row["words"].split(", ")))) for row in rows] == [
        (one["number"], one["words"]) for one in ranked
    ]
    api = ApiIndex(parts)
    assert [one["number"] for one in api.search(text, 9)] == [one["number"] for one in ranked]
    assert [one["number"] for one in api.search(text, 9, vectors_only=True)] == [
        one["number"] for one in by_vectors
    ]
    with running(app(open_columns([parts]))) as url:
        for more, expected in (({}, ranked), ({"vectors_only": True}, by_vectors)):
            status, _, answer = ask(url, "/api/search", {"text": text, "k": 9, **more})
            assert (status, [(hit["number"], hit["words"]) for hit in answer["results"][0]]) == (
                200,
                [(one["number"], one["words"]) for one in expected],
            )


def test_file_names_and_keys_are_found(icon_index, tmp_path):
    plain = Index(icon_index)
    paths = [f"Hall 3/AX-{number}_front.png" for number in range(len(plain))]
    named = Index(with_metadata(icon_index, tmp_path / "named", {"path": paths}))
    words = Words(named)
    assert words.known('ax-7_front "hall" 3') == ["ax-7_front"]  # of the file's name alone
    assert words.having("ax-7_front").tolist() == [7]


def test_a_strangers_captions_are_bounded(icon_index, tmp_path):
    n = len(Index(icon_index))
    long = " ".join(f"w{number}x" for number in range(300_000))
    captions = [[long, "late9"], ["x" * 3_000_000], ['"'], *[[f"{'- ' * 200}m{at}"] for at in range(n - 3)]]
    words = Words(Index(with_metadata(icon_index, tmp_path / "long", {"captions": captions})))
    assert words.known("m100 w100x w299999x late9") == ["m100", "w100x"]
    assert len(words._ids) < MAX_TOKENS + 4 * n + 100
    assert max(map(len, words._ids)) <= MAX_CHARACTERS
    empty = {"captions": [[]] * n, "key": [""] * n, "path": [""] * n}
    table = pq.read_table(icon_index / "metadata.parquet")
    empty |= {name: [None] * n for name in table.column_names if name in ("set",)}
    assert Words(Index(with_metadata(icon_index, tmp_path / "empty", empty))).known("m100") == []


def test_without_bm25s_a_part_number_is_a_mistake_and_a_sentence_is_not(parts, monkeypatch):
    monkeypatch.setattr(words_module, "bm25s", None)
    assert_mistake(call_here(main, "search", parts, "--text", "AX-4003/7"), "bm25s", "--vectors-only")
    for arguments in (["--text", "a bell"], ["--text", "AX-4003/7", "--vectors-only"]):
        monkeypatch.setattr("sys.argv", ["python -m", "search", str(parts), *arguments])
        main()
