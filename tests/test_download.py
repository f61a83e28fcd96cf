"""Published data fetches itself, from a server on this machine here: asks first, goes on where it broke off."""

import http.server
import io
import json
import threading
import zipfile
from collections import namedtuple

import pytest
from conftest import fails_in_one_line, run, save_clip, save_llm
from test_formats import jpeg

import data

Server = namedtuple("Server", "url files requests options")


@pytest.fixture
def server(monkeypatch):
    """A server of published data with `files`, which notes the `requests` (method, path, Range) and obeys `options`:
    cut (bytes after which it hangs up), ranges (whether it knows them)."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        for i, color in enumerate(("red", "green", "blue", "white")):
            z.writestr(f"{i}.jpg", jpeg(color))
    chat = [{"image": f"{i}.jpg", "conversations": [{"from": "human", "value": "<image>\nwhat color is it?"},
                                                    {"from": "gpt", "value": "red"}]} for i in range(4)]
    files = {"/records.json": json.dumps(chat).encode(), "/images.zip": archive.getvalue()}
    requests, options = [], {"cut": None, "ranges": True}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            requests.append((self.command, self.path, self.headers.get("Range")))
            content = files[self.path]
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if options["ranges"] else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if body:
                self.wfile.write(content[start:][:options["cut"]])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_port}"
        names = {name[1:]: url + name for name in files}
        monkeypatch.setattr(data, "PUBLISHED", {1: ("pretrain", names), 2: ("instruct", names)})
        yield Server(url, files, requests, options)
        httpd.shutdown()


@pytest.fixture
def flags(tmp_path):
    return ["--llm", save_llm(tmp_path / "llm"), "--clip", save_clip(tmp_path / "clip"), "--steps", 2]


def test_nothing_is_downloaded_without_a_word(server, flags, tmp_path):
    result = run("train.py", "--stage", 1, *flags, cwd=tmp_path)
    assert fails_in_one_line(result) and "--download" in result.stderr and "--data" in result.stderr
    assert "GB" in result.stdout and "out/data/pretrain" in result.stdout  # size and place
    assert not any(method == "GET" for method, *_ in server.requests)
    assert not list(tmp_path.glob("out/data/*/*"))


def test_with_download_both_stages_fetch_and_train_and_the_second_time_nothing_is_fetched(server, flags, tmp_path):
    for stage in (1, 2):
        result = run("train.py", "--stage", stage, *flags, "--download", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/data/instruct/images.zip").read_bytes() == server.files["/images.zip"]
    before = len(server.requests)
    assert run("train.py", "--stage", 1, *flags, cwd=tmp_path).returncode == 0
    assert len(server.requests) == before


@pytest.mark.parametrize("ranges", (True, False))
def test_a_broken_download_goes_on_where_it_ended(server, flags, tmp_path, ranges):
    server.options.update(cut=100, ranges=ranges)
    result = run("train.py", "--stage", 1, *flags, "--download", cwd=tmp_path)
    assert fails_in_one_line(result) and "goes on" in result.stderr
    assert (tmp_path / "out/data/pretrain/records.json.part").stat().st_size == 100
    server.options.update(cut=None)
    assert run("train.py", "--stage", 1, *flags, "--download", cwd=tmp_path).returncode == 0
    assert ("GET", "/records.json", "bytes=100-") in server.requests
    for name in ("/records.json", "/images.zip"):
        assert (tmp_path / f"out/data/pretrain{name}").read_bytes() == server.files[name]


def test_a_full_disk_is_told_before_anything_is_fetched(server, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(10, 9, 1))
    result = run("train.py", "--stage", 1, *flags, "--download", cwd=tmp_path)
    assert fails_in_one_line(result) and "free" in result.stderr
    assert not any(method == "GET" for method, *_ in server.requests)


def test_a_server_that_is_not_there_is_told_in_one_line(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PUBLISHED", {1: ("pretrain", {"a.json": "http://127.0.0.1:9/a.json"})})
    result = run("train.py", "--stage", 1, *flags, "--download", cwd=tmp_path)
    assert fails_in_one_line(result) and "can't be reached" in result.stderr
