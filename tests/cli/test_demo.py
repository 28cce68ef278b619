"""The demo's preparation, on a small archive of the same shape: labels, split, checksums, and no second download."""

import csv
import hashlib
import io
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))
import prepare
import torch

import demo


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for name, path in (("CACHE", tmp_path), ("TRAIN", tmp_path / "train.csv"), ("TEST", tmp_path / "test.csv")):
        monkeypatch.setattr(prepare, name, path)
    monkeypatch.setattr(prepare, "TEST_ROWS", 3)
    return tmp_path


def archive(path, lines):
    def add(tar, name, data):
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))

    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        add(tar, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", "\n".join(lines).encode())
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return path


def rows(path):
    with path.open(newline="") as file:
        return [tuple(row) for row in csv.reader(file)]


def test_labels_are_signs_and_every_text_is_there_once(cache):
    ratings = [2.5, -1.0, 0.99, -0.99, 1.0, -3.0, 2.0, 1.5]
    lines = [f"{i}\t{rating}\ttext {i}, with a comma " for i, rating in enumerate(ratings)]
    prepare.write_rows(archive(cache / "a.tar.gz", [*lines, "9\t2.5\ttext 0, with a comma"]))
    train, test = rows(prepare.TRAIN), rows(prepare.TEST)
    assert train[0] == test[0] == ("text", "label") and len(test) == 4
    kept = {i: "positive" if r > 0 else "negative" for i, r in enumerate(ratings) if abs(r) >= 1}
    assert sorted(train[1:] + test[1:]) == sorted((f"text {i}, with a comma", label) for i, label in kept.items())
    before = prepare.TEST.read_bytes()
    prepare.write_rows(cache / "a.tar.gz")
    assert prepare.TEST.read_bytes() == before


def test_a_file_in_the_cache_is_not_downloaded_again(cache, monkeypatch):
    monkeypatch.setattr(prepare.subprocess, "run", None)
    path = cache / "downloads" / "x.whl"
    path.parent.mkdir()
    path.write_bytes(b"content")
    assert prepare._fetched("x==1", "x.whl", hashlib.sha256(b"content").hexdigest()) == path
    with pytest.raises(SystemExit, match=r"does not have the sha256 .*delete it"):
        prepare._fetched("x==1", "x.whl", "0" * 64)


def test_a_failed_download_says_what_to_do(cache, monkeypatch):
    failed = type("Done", (), {"returncode": 1})
    monkeypatch.setattr(prepare.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(SystemExit, match=r"could not download x==1. Connect .* or put the file x.whl"):
        prepare._fetched("x==1", "x.whl", "0" * 64)
    assert list((cache / "downloads").iterdir()) == []


@pytest.mark.parametrize("bf16", [3e11, 1e11])
def test_products_are_in_bf16_where_that_is_faster(monkeypatch, bf16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(demo, "speed", lambda dtype: bf16 if dtype == torch.bfloat16 else 1e11)
    flags, seconds = demo.precision()
    assert flags == (["--bf16", "true", "--use_cpu", "true"] if bf16 > 1e11 else [])
    assert 60 < seconds < (600 if flags else 3600)
    assert demo.command("zo-sgd", 3, flags)[-len(flags) - 1 :] == ["3", *flags]
