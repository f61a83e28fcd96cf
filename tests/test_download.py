"""Published data is fetched from a hub on this machine here: asks first, goes on where a connection broke off."""

import http.server
import io
import json
import threading
import zipfile
from collections import namedtuple

import huggingface_hub
import pytest
from conftest import fails_in_one_line, run, save_clip, save_llm
from test_formats import jpeg

import data
from lmeye import UserError

Server = namedtuple("Server", "files requests options")
COMMIT = "0123456789" * 4


@pytest.fixture
def server(monkeypatch):
    """As much of the hub as its client asks for, with `files`, which notes the `requests` (method, path, Range) and
    obeys `options`: cut (bytes after which it hangs up), ranges (whether it knows them)."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        for i, color in enumerate(("red", "green", "blue", "white")):
            z.writestr(f"{i}.jpg", jpeg(color))
    chat = [{"image": f"{i}.jpg", "conversations": [{"from": "human", "value": "<image>\nwhat color is it?"},
                                                    {"from": "gpt", "value": "red"}]} for i in range(4)]
    records = json.dumps(chat).encode()
    one, two = (f"/datasets/{data.PUBLISHED[stage][1]}/resolve/main/" for stage in (1, 2))
    files = {one + "chat.json": records, one + "images.zip": archive.getvalue(),
             two + "llava_instruct_150k.json": records}
    requests, options = [], {"cut": None, "ranges": True}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            requests.append((self.command, self.path, self.headers.get("Range")))
            if self.path not in files:
                self.send_error(404)
                return
            content = files[self.path]
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if options["ranges"] else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("ETag", f'"{abs(hash(self.path)):x}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(content[start:][:options["cut"]])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        point_hub_at(monkeypatch, f"http://127.0.0.1:{httpd.server_port}")
        yield Server(files, requests, options)
        httpd.shutdown()


def point_hub_at(monkeypatch, url):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # whole chunks are kept where a connection breaks
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)  # between its tries


@pytest.fixture
def flags(tmp_path):
    return ["--llm", save_llm(tmp_path / "llm"), "--clip", save_clip(tmp_path / "clip"), "--steps", 2]


def test_nothing_is_downloaded_without_a_word(server, flags, tmp_path):
    result = run("train.py", "--stage", 1, *flags, cwd=tmp_path)
    assert fails_in_one_line(result) and "--download" in result.stderr and "--data" in result.stderr
    assert "GB" in result.stdout and "out/data/llava-cc3m-595k" in result.stdout  # size and place
    assert not any(method == "GET" and path in server.files for method, path, _ in server.requests)
    assert not list(tmp_path.glob("out/data/*/*"))


def test_with_agreement_the_files_are_fetched_and_the_second_time_nothing_is_asked_of_the_hub(server, tmp_path, capsys):
    records, pictures = data.published(1, tmp_path, True)
    folder = tmp_path / "data" / "llava-cc3m-595k"
    assert (records, pictures) == ([str(folder / "chat.json")], [str(folder / "images.zip")])
    for path, content in server.files.items():
        if "CC3M" in path:
            assert (folder / path.split("/")[-1]).read_bytes() == content
    assert len(data.read_records(records, pictures, 1)[0]) == 4
    size = sum(len(content) for path, content in server.files.items() if "CC3M" in path)
    assert f"{size / 1e9:.2f} GB" in capsys.readouterr().out
    before = len(server.requests)
    assert data.published(1, tmp_path, False) == (records, pictures) and len(server.requests) == before


def test_stage_2_says_how_to_fetch_cocos_pictures_which_are_not_on_the_hub(server, tmp_path):
    with pytest.raises(UserError) as told:
        data.published(2, tmp_path, True)
    pictures = tmp_path / "data" / "llava-instruct-150k" / "train2017.zip"
    assert f"curl -L -C - --create-dirs -o {pictures} {data.COCO_PICTURES}" in str(told.value)
    assert len(list(pictures.parent.glob("*.json"))) == 1  # the records are there
    with zipfile.ZipFile(pictures, "w") as archive:
        archive.writestr("train2017/0.jpg", jpeg())
    before = len(server.requests)
    assert data.published(2, tmp_path, False)[1] == [str(pictures)] and len(server.requests) == before


def test_train_takes_what_was_downloaded(server, flags, tmp_path):
    pictures = next(content for path, content in server.files.items() if path.endswith(".zip"))
    (tmp_path / "out/data/llava-instruct-150k").mkdir(parents=True)
    (tmp_path / "out/data/llava-instruct-150k/train2017.zip").write_bytes(pictures)
    for stage in (1, 2):
        result = run("train.py", "--stage", stage, *flags, "--download", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    before = len(server.requests)
    assert run("train.py", "--stage", 1, *flags, cwd=tmp_path).returncode == 0
    assert len(server.requests) == before


@pytest.mark.parametrize("ranges", (True, False))
def test_a_broken_download_goes_on_where_it_ended(server, tmp_path, ranges):
    server.options.update(cut=200, ranges=ranges)
    if not ranges:  # each try begins anew and is cut off again
        with pytest.raises(UserError, match="try again"):
            data.published(1, tmp_path, True)
        assert not list((tmp_path / "data" / "llava-cc3m-595k").glob("*.json"))  # nothing that is half a file
        server.options.update(cut=None)
    records, pictures = data.published(1, tmp_path, True)
    for path, content in server.files.items():
        if "CC3M" in path:
            assert (tmp_path / "data" / "llava-cc3m-595k" / path.split("/")[-1]).read_bytes() == content
    if ranges:
        assert "bytes=200-" in [asked for method, path, asked in server.requests if path.endswith("chat.json")]


def test_a_full_disk_is_told_before_anything_is_fetched(server, tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(10, 9, 1))
    with pytest.raises(UserError, match="no room"):
        data.published(1, tmp_path, True)
    assert not any(method == "GET" and path in server.files for method, path, _ in server.requests)


def test_a_hub_that_is_not_there_is_told_in_one_line(flags, tmp_path, monkeypatch):
    point_hub_at(monkeypatch, "http://127.0.0.1:9")
    result = run("train.py", "--stage", 1, *flags, "--download", cwd=tmp_path)
    assert fails_in_one_line(result) and "can't be fetched" in result.stderr and "--data" in result.stderr
