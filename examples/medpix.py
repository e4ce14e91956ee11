"""MedPix-VQA for train.py: the data set's parquet files become chats (jsonl) and image files.

    hf download mmoukouba/MedPix-VQA --repo-type dataset --local-dir medpix-parquet
    python examples/medpix.py medpix-parquet medpix        # writes medpix/train.jsonl, validation.jsonl, images/

Each row has an image (`image_id`: the encoded file's bytes and its path, as Hugging Face `datasets` stores images), a
`mode`, a `case_id`, a `question` and an `answer`, and becomes one chat: image and question, then the answer. Images
are copied as they are, once each: several questions may be about the same one. Rows without a question or an answer are
left out and counted. A parquet file's name says its split, as in `data/train-00000-of-00004.parquet`; or else a folder
below the data set's does, as in `default/train/0000.parquet`.

Needs pyarrow (`pip install pyarrow`), which nothing else here does.
"""

import argparse
import glob
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from runtime.files import UserError, reading  # noqa: E402
from runtime.launch import run_program  # noqa: E402

COLUMNS = ("image_id", "mode", "case_id", "question", "answer")
SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"BM": ".bmp", b"RIFF": ".webp"}
SPLITS = ("train", "validation", "valid", "dev", "test")
ROWS_AT_ONCE = 64  # a row holds a whole image


def convert(source: str, target: str) -> dict[str, list[int]]:
    """Write `target`/SPLIT.jsonl and `target`/images/ from the parquet files under `source`.

    Returns [chats, rows left out] by split.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError("reading parquet files needs pyarrow: pip install pyarrow") from None
    files = sorted(glob.glob(os.path.join(glob.escape(source), "**", "*.parquet"), recursive=True))
    if not files:
        raise UserError(f"{source}: no *.parquet in this folder; download the data set into it")
    if os.path.exists(target):
        raise UserError(f"{target}: already exists; choose a new folder or remove it")
    partial, counts, lines = f"{target.rstrip('/')}.partial-{os.getpid()}", {}, {}
    os.makedirs(os.path.join(partial, "images"))
    try:
        for path in files:
            split = split_of(path, source)
            if split not in lines:
                lines[split] = open(os.path.join(partial, f"{split}.jsonl"), "w", encoding="utf-8")  # noqa: SIM115
            for number, row in enumerate(rows_of(path, parquet.ParquetFile), 1):
                chat = chat_of(row, partial, f"{path} row {number}")
                if chat is not None:
                    lines[split].write(json.dumps(chat, ensure_ascii=False) + "\n")
                counts.setdefault(split, [0, 0])[chat is None] += 1
        for file in lines.values():
            file.close()
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return counts


def split_of(path: str, source: str) -> str:
    """The name of a split that the file's name begins with, else that of the nearest folder inside `source`."""
    *folders, name = os.path.relpath(path, source).split(os.sep)
    names = [re.split(r"[-._]", name)[0], *reversed(folders)]
    found = [name for name in names if name in SPLITS]
    if not found:
        raise UserError(f"{path}: neither its name nor a folder's says a split; name it one of {', '.join(SPLITS)}")
    return found[0]


def rows_of(path: str, open_parquet: Callable) -> Iterator[dict]:
    """The rows of a parquet file, as many in memory as ROWS_AT_ONCE says. Raises UserError, wherever it is damaged."""
    with reading(path, "parquet file"):
        file = open_parquet(path)
        if missing := [name for name in COLUMNS if name not in file.schema_arrow.names]:
            raise UserError(f"{path}: has no column {missing[0]!r}; MedPix-VQA has {', '.join(COLUMNS)}")
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(COLUMNS)):
            yield from batch.to_pylist()


def chat_of(row: dict, folder: str, where: str) -> dict | None:
    """One row as a chat, its image written to `folder`/images under the hash of its bytes; None if a text is empty."""
    image = row["image_id"]
    content = image.get("bytes") if isinstance(image, dict) else None
    if not content:
        raise UserError(f"{where}: image_id holds no image bytes")
    if not all(isinstance(row[name], str) and row[name].strip() for name in ("question", "answer")):
        return None
    suffix = next((suffix for magic, suffix in SUFFIXES.items() if content.startswith(magic)), "")
    name = os.path.join("images", hashlib.sha256(content).hexdigest()[:24] + suffix)
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        with open(path, "wb") as file:
            file.write(content)
    question = [{"type": "image_url", "image_url": {"url": name}}, {"type": "text", "text": row["question"].strip()}]
    answer = {"role": "assistant", "content": row["answer"].strip()}
    return {"messages": [{"role": "user", "content": question}, answer]}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder with the data set's parquet files")
    parser.add_argument("target", help="new folder for the jsonl files and the images")
    args = parser.parse_args(argv)
    for split, (chats, left_out) in convert(args.source, args.target).items():
        print(f"{os.path.join(args.target, split)}.jsonl: {chats} chats, {left_out} rows left out", file=sys.stderr)


if __name__ == "__main__":
    run_program(main)
