"""Generated data in the format of each task: learnable, small, options of unequal length."""

import csv
import json
import random
from pathlib import Path

GOOD, BAD = ["lovely", "bright", "warm", "clever"], ["dull", "cold", "stale", "clumsy"]
FILLER = ["a", "film", "story", "cast", "with", "and", "the", "very", "some", "music"]
PEOPLE = ["Ann", "Bob", "Christopher", "Dana Lee", "Eve"]
PLACES = ["home", "the old railway station", "school", "the market by the river"]


def sst2(count: int, seed: int) -> list[dict]:
    """Sentences with two telling words; the label follows from them."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        label = rng.randrange(2)
        words = rng.choices(FILLER, k=rng.randint(2, 20)) + rng.choices((BAD, GOOD)[label], k=2)
        rng.shuffle(words)
        rows.append({"sentence": " ".join(words) + " ", "label": label, "idx": len(rows)})
    return rows


def copa(count: int, seed: int) -> list[dict]:
    """The right choice goes where the premise does."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        label, (here, there) = rng.randrange(2), rng.sample(PLACES, 2)
        right, wrong = f"I went to {here}.", f"She ran off to {there} again."
        choices = (right, wrong) if label == 0 else (wrong, right)
        rows.append(
            {
                "premise": f"The road leads to {here}.",
                "choice1": choices[0],
                "choice2": choices[1],
                "question": rng.choice(["cause", "effect"]),
                "label": label,
            }
        )
    return rows


def winogrande(count: int, seed: int) -> list[dict]:
    """The right name is the one that the sentence begins with."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        answer, (one, two) = rng.choice([1, 2]), rng.sample(PEOPLE, 2)
        first, second = (one, two) if answer == 1 else (two, one)
        place = rng.choice(PLACES)
        rows.append(
            {
                "sentence": f"{first} met {second} at {place} because _ 's music was {rng.choice(GOOD)} .",
                "option1": one,
                "option2": two,
                "answer": str(answer),
            }
        )
    return rows


ROWS = {"sst2": sst2, "copa": copa, "winogrande": winogrande}


def write(path: Path, rows: list[dict]) -> Path:
    """The rows as a .csv or .jsonl file."""
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts() -> list[str]:
    """Everything that is said in any of them, for training tokenizers."""
    said = [str(v) for make in ROWS.values() for row in make(200, 0) for v in row.values()]
    return [*said, *["a film It was terrible .", "a film It was great ."] * 300]  # one token each, as for real models
