"""examples/medpix.py on a parquet file like the data set's, and examples/medpix.sbatch down to its command."""

import io
import json
import os
import random
import shlex
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image
from processes import ROOT
from train_cases import arguments, metrics

import train
from runtime.files import UserError

sys.path.append(os.path.join(ROOT, "examples"))
import medpix  # noqa: E402

SBATCH = os.path.join(ROOT, "examples", "medpix.sbatch")


def encoded(color: str, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (23, 31), color).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path, rows: list[dict], drop: str = "") -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    columns = {
        "image_id": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "mode": pa.string(),
        "case_id": pa.string(),
        "question": pa.string(),
        "answer": pa.string(),
    }
    columns.pop(drop, None)
    schema = pa.schema(columns.items())
    # As `datasets` writes it: the feature types ride along in the schema's metadata.
    features = {"info": {"features": {"image_id": {"_type": "Image"}, "question": {"_type": "Value"}}}}
    table = pa.Table.from_pylist(rows, schema=schema.with_metadata({"huggingface": json.dumps(features)}))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    parquet.write_table(table, path, row_group_size=2)


def row(content: bytes, question: str = "Is it red?", answer: str = " Yes. ") -> dict:
    image = {"bytes": content, "path": "synpic1.jpg"}
    return {"image_id": image, "mode": "CT", "case_id": "MPX1", "question": question, "answer": answer}


def test_parquet_to_chats(images, tmp_path):
    red, blue = encoded("red", "JPEG"), encoded("blue", "PNG")
    source, target = tmp_path / "parquet", tmp_path / "medpix"
    write_parquet(str(source / "data" / "train-00000-of-00002.parquet"), [row(red), row(red, "Really?"), row(blue)])
    more = [row(blue, "Größer?", "Ja\nund nein"), row(red, answer="  "), row(red, question="")]
    write_parquet(str(source / "data" / "train-00001-of-00002.parquet"), more)
    write_parquet(str(source / "data" / "validation-00000-of-00001.parquet"), [row(blue)])
    assert medpix.convert(str(source), str(target)) == {"train": [4, 2], "validation": [1, 0]}
    chats = [json.loads(line) for line in (target / "train.jsonl").read_text().splitlines()]
    names = []
    for chat, (question, answer) in zip(
        chats, [("Is it red?", "Yes."), ("Really?", "Yes."), ("Is it red?", "Yes."), ("Größer?", "Ja\nund nein")]
    ):
        image, text = chat["messages"][0]["content"]
        assert text == {"type": "text", "text": question}
        assert chat["messages"][1] == {"role": "assistant", "content": answer}
        names.append(image["image_url"]["url"])
    assert [os.path.splitext(name)[1] for name in names] == [".jpg", ".jpg", ".png", ".png"]
    assert [(target / name).read_bytes() for name in names] == [red, red, blue, blue]
    assert len(os.listdir(target / "images")) == 2

    argv = arguments(
        images[0], str(target / "train.jsonl"), tmp_path / "out", max_steps=2, val=str(target / "validation.jsonl")
    )
    train.main(argv)
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2, 2]


@pytest.mark.parametrize("seed", range(8))
def test_splits(seed):
    """From the file's name, else from the nearest folder inside the source, which may itself have any name."""
    draw = random.Random(seed)
    split, other = draw.sample(medpix.SPLITS, 2)
    number, source = f"{draw.randint(0, 9999):04d}", draw.choice(("data/train", "medpix", "test"))
    for inside in (
        f"data/{split}-{number}-of-00004.parquet",
        f"default/{split}/{number}.parquet",
        f"{other}/{split}.parquet",
        f"{other}/{split}/{number}.parquet",
        f"{split}/partial/{number}.parquet",
    ):
        assert medpix.split_of(f"{source}/{inside}", source) == split, inside
    for inside in (f"{number}.parquet", f"default/{number}.parquet", f"my{split}/{number}.parquet"):
        with pytest.raises(UserError, match="a split; name it one of train, validation"):
            medpix.split_of(f"{source}/{inside}", source)


@pytest.mark.parametrize(
    "rows, drop, message",
    [
        ([row(b"")], "", "row 1: image_id holds no image bytes"),
        ([row(encoded("red", "PNG")), {**row(b""), "image_id": None}], "", "row 2: image_id holds no image bytes"),
        ([row(encoded("red", "PNG"))], "case_id", "has no column 'case_id'"),
    ],
)
def test_bad_parquet(rows, drop, message, tmp_path):
    write_parquet(str(tmp_path / "in" / "train-0.parquet"), rows, drop)
    with pytest.raises(UserError, match=message):
        medpix.convert(str(tmp_path / "in"), str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["in"]


def test_a_page_that_is_damaged():
    """Found while rows are read, whatever pyarrow raises then."""

    class Damaged:
        schema_arrow = SimpleNamespace(names=medpix.COLUMNS)

        def iter_batches(self, **_):
            yield SimpleNamespace(to_pylist=lambda: [row(b"x")])
            raise OSError("Unexpected end of stream")

    rows = medpix.rows_of("a.parquet", lambda path: Damaged())
    assert next(rows)["question"] == "Is it red?"
    with pytest.raises(UserError, match="^a.parquet: not a valid parquet file .*end of stream"):
        next(rows)


def test_other_mistakes(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match="no .*parquet in this folder"):
        medpix.convert(str(tmp_path), str(tmp_path / "out"))
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match="not a valid parquet file"):
        medpix.convert(str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(UserError, match="already exists"):
        medpix.convert(str(tmp_path), str(tmp_path))


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow: pip install pyarrow"):
        medpix.convert(str(tmp_path), str(tmp_path / "out"))


# --------------------------------------------------------------------------------------------------- the Slurm job


def dry_run(**changes) -> subprocess.CompletedProcess:
    slurm = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NUM_NODES": "8", "SLURM_JOB_NODELIST": "gpu[01-08]"}
    slurm |= {"SLURM_SUBMIT_DIR": ROOT, "HEAD_NODE": "gpu01", "DRY_RUN": "1", "PATH": os.environ["PATH"]}
    slurm |= {"CKPT": "/data/my model", "DATA": "/data/medpix", "OUT": "/data/run"}
    environment = {name: value for name, value in (slurm | changes).items() if value is not None}
    return subprocess.run(["bash", SBATCH], env=environment, capture_output=True, text=True, timeout=30)


def test_the_job_script_launches_the_recipe():
    assert subprocess.run(["bash", "-n", SBATCH], timeout=30).returncode == 0
    result = dry_run()
    assert result.returncode == 0, result.stderr
    command = shlex.split(result.stdout)
    assert command[0] == "srun" and command[command.index("torchrun") :][:5] == [
        "torchrun", "--nnodes", "8", "--nproc-per-node", "8",
    ]  # fmt: skip
    assert command[command.index("--rdzv-endpoint") + 1] == "gpu01:21234"
    args = train.parse_args(command[command.index(os.path.join(ROOT, "train.py")) + 1 :])
    recipe = train.parse_args(["--ckpt", "x", "--data", "y", "--out", "z"])  # whose defaults are the recipe's numbers
    for name in ("optimizer", "lr", "min_lr", "betas", "eps", "weight_decay", "max_grad_norm", "max_length", "dtype"):
        assert getattr(args, name) == getattr(recipe, name)
    assert (args.tp, args.pp, args.micro_batch_size, args.global_batch_size, args.max_steps) == (8, 8, 1, 64, 100)
    assert args.freeze == ["vision_tower", "projector", "embeddings"] and args.activation_checkpointing and args.resume
    assert (args.ckpt, args.data, args.out) == ("/data/my model", "/data/medpix/train.jsonl", "/data/run")
    with open(SBATCH, encoding="utf-8") as file:
        directives = dict(line[10:].strip().partition("=")[::2] for line in file if line.startswith("#SBATCH "))
    assert (directives["nodes"], directives["gpus-per-node"], directives["ntasks-per-node"]) == ("8", "8", "1")


def test_the_job_script_without_an_allocation():
    """Where there is no Slurm, DRY_RUN=1 prints what would run."""
    env = {"PATH": os.environ["PATH"], "CKPT": "c", "DATA": "d", "OUT": "o", "REPO": ROOT, "DRY_RUN": "1"}
    result = subprocess.run(["bash", SBATCH], env=env, capture_output=True, text=True, timeout=30)
    assert result.returncode == 0 and "--nnodes 8" in result.stdout and "HEAD_NODE:20000" in result.stdout, (
        result.stderr
    )


def test_the_job_script_passes_the_warning_on(tmp_path):
    """Slurm's signal to the script reaches srun, whose end and status the script then waits for."""
    (tmp_path / "srun").write_text(
        "#!/bin/bash\ntrap 'echo saved; sleep 0.5; echo ended; exit 7' USR1\necho started\n"
        "while :; do sleep 0.1; done\n"
    )
    (tmp_path / "srun").chmod(0o755)
    slurm = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NUM_NODES": "8", "SLURM_SUBMIT_DIR": ROOT, "HEAD_NODE": "gpu01"}
    slurm |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CKPT": "c", "DATA": "d", "OUT": str(tmp_path / "out")}
    with subprocess.Popen(["bash", SBATCH], env=slurm, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "started\n"
        job.send_signal(signal.SIGUSR1)
        assert job.stdout.read() == "saved\nended\n"
    assert job.returncode == 7


def test_the_job_script_in_a_container_and_its_mistakes():
    command = shlex.split(dry_run(CONTAINER="pytorch.sqsh").stdout)
    assert command[command.index("--container-image") + 1] == "pytorch.sqsh"
    assert "/data/my model:/data/my model" in command[command.index("--container-mounts") + 1]
    result = dry_run(CKPT=None)
    assert result.returncode != 0 and "set CKPT to the checkpoint folder" in result.stderr
    result = dry_run(SLURM_SUBMIT_DIR="/nowhere")
    assert result.returncode == 2 and "no train.py in /nowhere" in result.stderr
