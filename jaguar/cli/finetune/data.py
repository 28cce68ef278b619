"""Loads train, dev and test splits from files or the hub and tokenises them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaguar.models.load import Loaded
from jaguar.tasks import TASKS, Encoder, Example, MultipleChoice, Sizes, Task, TextClassification
from jaguar.tasks.rows import Row, hub_rows, read_rows
from jaguar.tasks.sampling import drawn, k_shot, train_and_dev
from jaguar.tasks.saved import load_task
from jaguar.tasks.tables import choice_fields


@dataclass(frozen=True)
class Splits:
    """Rows to train on, to choose the model by (there may be none), and to test with."""

    train: list[Row]
    dev: list[Row]
    test: list[Row]


@dataclass(frozen=True)
class Data:
    """Source of labelled data and their prompts; None: the task's own, or as saved beside the model."""

    task: str | None = None
    train_file: str | None = None
    dev_file: str | None = None
    test_file: str | None = None
    dataset: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    choice_columns: tuple[str, ...] | None = None
    template: str | None = None
    verbalizers: tuple[str, ...] | None = None
    max_length: int | None = None
    num_train: int | None = None
    num_dev: int | None = None
    num_eval: int | None = None
    train_set_seed: int = 0
    num_k_shot: int | None = None

    def named(self, source: str) -> str:
        """The task's name: what was given, else that of the task beside the model, else text classification."""
        saved = load_task(source)
        return self.task or (saved.name if saved else TextClassification.name)

    def has_dev(self, source: str) -> bool:
        """Tells whether there are dev rows to choose the model by."""
        return bool(self.dev_file or self.num_k_shot) or self._sizes(self.named(source)).dev > 0

    def _sizes(self, name: str) -> Sizes:
        own = TASKS[name].sizes
        dev = 0 if self.dev_file else own.dev
        return Sizes(
            own.train if self.num_train is None else self.num_train,
            dev if self.num_dev is None else self.num_dev,
            own.test if self.num_eval is None else self.num_eval,
        )

    def _columns(self, name: str) -> dict[str, str]:
        if name == TextClassification.name:
            return self._own_columns
        if name == MultipleChoice.name:
            return self._own_columns | choice_fields(self._choices)
        return TASKS[name].columns

    @property
    def _own_columns(self) -> dict[str, str]:
        return {"text": self.text_column or "text", "label": self.label_column or "label"}

    @property
    def _choices(self) -> tuple[str, ...]:
        return self.choice_columns or ("choice1", "choice2")

    def _refuse_unread(self, name: str) -> None:
        """Rejects options that the task ignores."""
        tables = (TextClassification.name, MultipleChoice.name)
        for flag, value, readers in (
            ("text_column", self.text_column, tables),
            ("label_column", self.label_column, tables),
            ("choice_columns", self.choice_columns, tables[1:]),
        ):
            if value is not None and name not in readers:
                raise ValueError(f"--{flag} is for --task {' and '.join(readers)}; --task {name} has its own columns")
        if self.dataset and (self.train_file or self.test_file):
            raise ValueError("--dataset and files of your own: give one or the other")
        if self.num_k_shot and (self.num_train is not None or self.num_dev is not None):
            raise ValueError("--num_k_shot says how many rows to take: leave --num_train and --num_dev out")

    def _read(self, name: str, path: str) -> list[Row]:
        columns = self._columns(name)
        hint = f"a file for --task {name} has the columns {', '.join(columns.values())}"
        if name in (TextClassification.name, MultipleChoice.name):
            choices = ", --choice_columns" if name == MultipleChoice.name else ""
            hint = f"name others with --text_column{choices} and --label_column"
        return read_rows(path, columns, hint)

    def test_rows(self, source: str) -> list[Row]:
        """The rows that `jaguar eval` scores.

        Raises:
            ValueError: there are none, or they are malformed.
        """
        name = self.named(source)
        self._refuse_unread(name)
        if self.test_file:
            rows = self._read(name, self.test_file)
        else:
            (rows,) = hub_rows(*self._hub(name, "--test_file"), ("validation",), self._columns(name))
        return drawn(rows, self._sizes(name).test, self.train_set_seed)

    def splits(self, source: str) -> Splits:
        """All rows, sampled as the benchmark does (or k-shot); `source` is the model, which may remember its task.

        Raises:
            ValueError: files are missing or malformed, or too small for what was asked.
        """
        name, seed = self.named(source), self.train_set_seed
        self._refuse_unread(name)
        sizes = self._sizes(name)
        if bool(self.train_file) != bool(self.test_file):
            missing = "--test_file" if self.train_file else "--train_file"
            raise ValueError(f"{missing} is missing: give both files, or none to read the task's data set")
        if self.train_file and self.test_file:
            pool, held_out = self._read(name, self.train_file), self._read(name, self.test_file)
        else:
            pool, held_out = hub_rows(
                *self._hub(name, "--train_file and --test_file"), ("train", "validation"), self._columns(name)
            )
        test = drawn(held_out, sizes.test, seed)
        if self.num_k_shot:
            field = TASKS[name].label_field
            train, dev = k_shot(pool, lambda row: row[field], self.num_k_shot, seed)
        else:
            train, dev = train_and_dev(pool, sizes.train, sizes.dev if not self.dev_file else 0, seed)
        if self.dev_file:
            dev = drawn(self._read(name, self.dev_file), self.num_dev, seed)
        return Splits(train, dev, test)

    def _hub(self, name: str, files: str) -> tuple[str, str | None]:
        hub = TASKS[name].hub
        if self.dataset:
            return self.dataset, hub[1] if hub else None
        if hub is None:
            raise ValueError(f"--task {name} has no data set of its own: give {files}, or --dataset")
        return hub

    # -- prompts ---------------------------------------------------------------------------------------------------

    def make_task(self, source: str, loaded: Loaded, rows: Sequence[Row]) -> Task:
        """The task: what was given, else what lies beside the model, else what the rows say.

        Raises:
            ValueError: prompt, labels and model do not fit each other.
        """
        name = self.named(source)
        saved = load_task(source)
        saved = saved if saved is not None and saved.name == name else None
        if name == TextClassification.name:
            return self._classification(saved if isinstance(saved, TextClassification) else None, loaded, rows)
        if self.verbalizers:
            raise ValueError(
                f"--verbalizers are for --task {TextClassification.name}; --task {name} has its own options"
            )
        if loaded.kind == "classifier":
            raise ValueError(
                f"--task {name} needs a causal or masked language model; a {type(loaded.model).__name__} has no head "
                "for tokens"
            )
        if name == MultipleChoice.name:
            if isinstance(saved, MultipleChoice) and self.template is None:
                return saved
            return MultipleChoice(self.template or "{text}", self._choices)
        if self.template:
            raise ValueError(f"--task {name} has a prompt of its own; --template is for data of your own")
        return TASKS[name]()

    def _classification(
        self, saved: TextClassification | None, loaded: Loaded, rows: Sequence[Row]
    ) -> TextClassification:
        if saved and not {row["label"] for row in rows} <= set(saved.labels):
            saved = None  # it was tuned for other labels
        template = self.template or (saved.template if saved else "{text}")
        if loaded.kind == "classifier":
            if self.verbalizers:
                raise ValueError("--verbalizers are for language models; a sequence classifier has its own classes")
            return TextClassification(template, saved.labels if saved else _classifier_labels(loaded, rows))
        if loaded.kind == "masked" and "{mask}" not in template:
            template += " {mask}"
        labels = saved.labels if saved else tuple(class_names(rows))
        verbalizers = self.verbalizers or (saved.verbalizers if saved else tuple(f" {label}" for label in labels))
        return TextClassification(template, labels, verbalizers)

    def examples(self, task: Task, rows: Sequence[Row], loaded: Loaded) -> list[Example]:
        """The rows as tokens; texts are cut at `max_length`, or where they were when the model was tuned.

        Raises:
            ValueError: a row does not fit the task or the model; file and line are named.
        """
        encoder = Encoder(loaded.tokenizer, loaded.kind, loaded.max_length, self.max_length or loaded.cut)
        return encoder([task.question(row, loaded.kind == "masked") for row in rows])


def class_names(rows: Sequence[Row]) -> list[str]:
    """The labels that occur, sorted: as numbers if all of them are whole numbers, else as text."""
    labels = {row["label"] for row in rows}
    try:
        return sorted(labels, key=lambda label: (int(label), label))
    except ValueError:
        return sorted(labels)


def _classifier_labels(loaded: Loaded, rows: Sequence[Row]) -> tuple[str, ...]:
    """The classes in the order of the model's outputs: by its own names, by number, or sorted if it has no names yet.

    Raises:
        ValueError: the data has other labels than the model has classes; guessing an order could invert them.
    """
    config, found = loaded.model.config, class_names(rows)
    own = [str(config.id2label[i]) for i in range(config.num_labels)]
    spelling = {label.casefold(): label for label in found}
    if set(spelling) <= {name.casefold() for name in own}:
        return tuple(spelling.get(name.casefold(), name) for name in own)
    numbers = [str(i) for i in range(config.num_labels)]
    if set(found) <= set(numbers):
        return tuple(numbers)
    if own == [f"LABEL_{i}" for i in range(config.num_labels)] and len(found) == config.num_labels:
        return tuple(found)
    raise ValueError(f"the classes of the model are {', '.join(own)}, the labels of the data {', '.join(found)}")
