"""One review at a time writes to a decisions file, and only its own page can make it write."""

import http.client
import json
import re
import subprocess
import threading

import pytest
from conftest import ROOT, command, environment
from starlette.testclient import TestClient

from data_prep.build.decisions import Decision, read_decisions
from data_prep.errors import UserError
from data_prep.review.decision_store import DecisionStore
from data_prep.review.server import app
from data_prep.shards import Shards

JSON = {"content-type": "application/json"}


def decision(number: int) -> Decision:
    return Decision(f"{number:016x}", f"{number}.png", "drop")


def test_the_second_store_of_a_file_is_refused(tmp_path):
    path = tmp_path / "decisions.csv"
    (tmp_path / "link.csv").symlink_to(path)
    first = DecisionStore(path)
    for name in (path, tmp_path / "link.csv"):
        with pytest.raises(UserError, match=r"another review page writes to it .host .*, process [0-9]+"):
            DecisionStore(name)
    first.decide(decision(1))
    first.close()
    second = DecisionStore(path)
    second.decide(decision(2))
    second.close()
    assert list(read_decisions(path)[0].values()) == [decision(1), decision(2)]
    path.write_text("no header")
    for _ in range(2):  # a mistake leaves no lock
        with pytest.raises(UserError, match="its header is"):
            DecisionStore(path)


def serving(shards, decisions, *options) -> tuple[subprocess.Popen, str]:
    arguments = command("data_prep", "review", shards, "--decisions", decisions, "--port", 0, *options)
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment(), stdout=-1, stderr=subprocess.STDOUT, text=True
    )
    return process, process.stdout.readline()


def test_two_servers_lose_no_answered_decision(icon_shards, tmp_path):
    shards, path = Shards(icon_shards, "train"), tmp_path / "decisions.csv"
    first, line = serving(icon_shards, path)
    try:
        address = re.search(r"http://(\S+)", line)[1]
        second, refused = serving(icon_shards, path)
        assert second.wait(60) == 2
        assert refused.startswith(f"error: {path}: another review page writes to it")
        answered, numbers = [], iter(range(40))

        def decide() -> None:
            client = http.client.HTTPConnection(address)
            for number in numbers:
                key = shards.key(number)
                body = {"split": "train", "number": number, "key": key, "action": "drop"}
                client.request("POST", "/api/decide", json.dumps(body), JSON)
                answer = client.getresponse()
                answer.read()
                if answer.status == 200:
                    answered.append(key)

        lock = threading.Lock()
        source = numbers
        numbers = iter(lambda: _next(source, lock), None)
        threads = [threading.Thread(target=decide) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        first.kill()  # an answer is on disk before it is sent
        first.wait()
    assert len(answered) == 40
    assert {subject.key for subject in read_decisions(path)[0]} == set(answered)
    third, line = serving(icon_shards, path)  # a kill leaves no lock
    third.kill()
    third.wait()
    assert line.startswith("review page: http://127.0.0.1:")
    assert "token" not in line


def _next(numbers, lock) -> int | None:
    with lock:
        return next(numbers, None)


def test_only_its_own_page_can_write(icon_shards, tmp_path):
    path = tmp_path / "decisions.csv"
    key = Shards(icon_shards, "train").key(0)
    body = json.dumps({"split": "train", "number": 0, "key": key, "action": "drop"})
    with TestClient(app(icon_shards, path), "http://localhost:8001") as page:
        for status, headers in (
            (403, {**JSON, "origin": "http://evil.example"}),
            (403, {**JSON, "origin": "http://localhost:9000"}),
            (403, {**JSON, "origin": "null"}),
            (403, {**JSON, "origin": "http://localhost:8001", "sec-fetch-site": "cross-site"}),
            (415, {"origin": "http://localhost:8001", "content-type": "text/plain"}),
            (415, {"content-type": "application/x-www-form-urlencoded"}),
        ):
            for act in ("decide", "remove", "undo"):
                answer = page.post(f"/api/{act}", content=body, headers=headers)
                assert (answer.status_code, list(answer.json())) == (status, ["error"])
        assert read_decisions(path)[0] == {}
        kind = "application/json; charset=utf-8"
        answer = page.post(
            "/api/decide", content=body, headers={"content-type": kind, "origin": "http://localhost:8001"}
        )
        assert answer.status_code == 200
    assert [subject.key for subject in read_decisions(path)[0]] == [key]


def test_another_host_asks_for_the_token(icon_shards, tmp_path):
    private = app(icon_shards, tmp_path / "decisions.csv", "0.0.0.0")
    token = private.state.token
    assert len(token) > 20
    with TestClient(private, "http://workstation:8001") as stranger:
        for path in ("/", "/api/status", "/image/train/0", "/?token=", "/?token=wrong", "/?token=%C3%A9"):
            answer = stranger.get(path)
            assert (answer.status_code, list(answer.json())) == (403, ["error"])
        assert stranger.post("/api/undo", json={}).status_code == 403
        opened = stranger.get(f"/?token={token}")
        assert opened.url == "http://workstation:8001/"
        assert "<title>" in opened.text
        assert stranger.get("/api/status").status_code == 200  # by the cookie
        assert stranger.get("/image/train/0?px=32").status_code == 200
        assert stranger.post("/api/undo", json={}).json()["error"] == "there is nothing to undo"
    process, line = serving(icon_shards, tmp_path / "other.csv", "--host", "0.0.0.0")
    process.terminate()
    process.wait()
    assert re.search(r"http://0\.0\.0\.0:\d+/\?token=[\w-]{20,} ", line)
