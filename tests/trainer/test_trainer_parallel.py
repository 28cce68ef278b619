"""Two processes: every rank takes the same step, of the losses averaged over both, without DDP."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.heads import HEADS, model_of, trained
from helpers.trainers import arguments, classifier, labelled
from jaguar import ZOTrainer

SCRIPT = """
import hashlib, json, logging, os, sys
sys.path.insert(0, {tests!r})
import torch
from helpers.heads import HEADS, model_of, trained
from helpers.trainers import arguments, classifier, labelled
from jaguar import ZOTrainer
logging.disable(logging.WARNING)

def digest(model):
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()

out, rank, world = sys.argv[1], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
# A file and not a port: another process may take a port that is free now.
torch.distributed.init_process_group("gloo", init_method=f"file://{{out}}/store", rank=rank, world_size=world)
args = arguments(out + "/run", 4, per_device_train_batch_size=4, save_strategy="steps", save_steps=2)
model = classifier()
if args.process_index == 1:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)  # nobody but the trainer makes the ranks begin alike
trainer = ZOTrainer(model, args, train_dataset=labelled())
trainer.train()
record = trainer.zeroth_order.last_record
wrapped = type(trainer.model_wrapped).__name__
more = {{"per_device_train_batch_size": 4, "optim_zo": "forward-grad", "coordinates": None}}
forward = ZOTrainer(classifier(), arguments(out + "/forward", 2, **more), train_dataset=labelled())
forward.train()
heads = {{head: trained(out + "/run", model_of(*HEADS[head][:3]), HEADS[head][3], 2, 2) for head in {heads!r}}}
with open(f"{{out}}/{{args.process_index}}.json", "w") as file:
    json.dump([digest(model), wrapped, record.losses, trainer.zeroth_order.steps_done, heads,
               digest(forward.model), forward.zeroth_order.last_record.losses], file)
sys.stdout.flush()
os._exit(0)  # an interpreter that ends with threads of a group may be aborted
"""


# Shares of all labels, and means over labels, shifted labels and rows, also where a process has none that count.
HEADS_TRIED = ["causal", "drops the number of items", "masked, batches without labels", "shifts its labels"]
HEADS_TRIED += ["means of rows", "classes"]


def run(folder, world):
    script = folder / "script.py"
    script.write_text(SCRIPT.format(heads=HEADS_TRIED, tests=str(Path(__file__).parents[1])))
    processes = []
    for rank in range(world):
        env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        env |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        line = [sys.executable, str(script), str(folder)]
        processes.append(subprocess.Popen(line, env=env, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.filterwarnings("ignore:the steps of .*journal.jaguar")  # one goes on with a checkpoint of another folder
def test_two_processes_take_the_steps_of_one(tmp_path):
    folder = tmp_path / "run" / "checkpoint-2"
    folder.mkdir(parents=True)
    (folder / "of_an_earlier_run").touch()
    one, other = run(tmp_path, 2)
    assert one == other  # bit for bit the same model, and the same records
    assert one[1] == "BertForSequenceClassification" and one[3] == 4
    args = arguments(tmp_path / "alone", 4, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    alone = ZOTrainer(classifier(), args, train_dataset=labelled())
    alone.train()
    # One process equals two bit for bit when it sums the same two micro-batches in the order of the ranks.
    assert list(alone.zeroth_order.last_record.losses) == one[2]
    data = b"".join(p.detach().numpy().tobytes() for p in alone.model.parameters())
    assert hashlib.sha256(data).hexdigest() == one[0]
    # The checkpoint of both is whole, and one process goes on from it in the same way, saying what is other.
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "of_an_earlier_run").exists()
    again = ZOTrainer(classifier(), args, train_dataset=labelled())
    with pytest.warns(UserWarning, match=r"not as a run that never stopped: processes 2 then, 1 now$"):
        again.train(resume_from_checkpoint=str(folder))
    assert b"".join(p.detach().numpy().tobytes() for p in again.model.parameters()) == data
    (folder / "rng_state_1.pth").unlink()
    with pytest.raises(ValueError, match=r"rng_state_1\.pth is missing"):
        again.train(resume_from_checkpoint=str(folder))
    # Derivatives are summed as losses are.
    more = {"per_device_train_batch_size": 4, "optim_zo": "forward-grad", "coordinates": None}
    args = arguments(tmp_path / "forward alone", 2, gradient_accumulation_steps=2, **more)
    forward = ZOTrainer(classifier(), args, train_dataset=labelled())
    forward.train()
    assert one[6] == pytest.approx(list(forward.zeroth_order.last_record.losses), rel=1e-5)
    # What a loss is a mean of makes no difference, nor that Trainer multiplies some by the number of processes.
    for head, losses in one[4].items():
        *made, data = HEADS[head]
        assert losses == pytest.approx(trained(tmp_path / "alone", model_of(*made), data, 8, 1), rel=2e-6), head
