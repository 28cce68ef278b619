"""Tiny models, a tokenizer and labelled text, made from nothing: what the tests of the command line run on."""

import csv
import functools
import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from helpers import synthetic
from helpers.synthetic import BAD, FILLER, GOOD
from jaguar.cli import commands as cli

TEMPLATE = r"Review: {text}\nSentiment:"


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, label): the label follows from the words."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        label = rng.choice(["negative", "positive"])
        words = rng.choices(FILLER, k=rng.randint(2, 9)) + rng.choices(GOOD if label == "positive" else BAD, k=2)
        rng.shuffle(words)
        rows.append((" ".join(words), label))
    return rows


def write_csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def write_jsonl(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text(
        "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows), encoding="utf-8"
    )
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "[PAD]", *FILLER, *GOOD, *BAD, "Review", "Sentiment", ":", "negative", "positive"]
    base = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=base, unk_token="[UNK]", pad_token="[PAD]", model_max_length=64)


def causal_lm(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def classifier(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=1,
        num_labels=2,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def later_wins(words):
    """A command line with only the last of several values of a flag, so that tests can change what all have."""
    parts = [[]]
    for word in words:
        if word.startswith("--"):
            parts.append([])
        parts[-1].append(word)
    return [word for part in {part[0]: part for part in parts if part}.values() for word in part]


def refused(capsys, *argv, code=2):
    """Runs a command line that must be refused (2) or fail (1), and returns its one line."""
    try:
        found = cli.main(list(argv))
    except SystemExit as stop:
        found = stop.code
    error = capsys.readouterr().err
    assert found == code and error.count("\n") == 1 and "Traceback" not in error, error
    return error


# -- one tiny model of each architecture ------------------------------------------------------------------------------

_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_SMALL |= {"vocab_size": 400, "max_position_embeddings": 128}
_GROUPED = _SMALL | {"num_key_value_heads": 2}
ARCHITECTURES = {
    "opt": ("OPT", "CausalLM", _SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1}),
    "llama": ("Llama", "CausalLM", _GROUPED),
    "mistral": ("Mistral", "CausalLM", _GROUPED | {"sliding_window": 64}),
    "qwen": ("Qwen2", "CausalLM", _GROUPED),
    "gpt2": ("GPT2", "LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 400}),
    "roberta": ("Roberta", "MaskedLM", _SMALL | {"max_position_embeddings": 130, "pad_token_id": 1}),
    "bert": ("Bert", "MaskedLM", _SMALL),
}


def architecture(name, seed=0, scale=4.0, **more):
    """A random model; weights are scaled so that its logits differ by more than rounding."""
    family, head, options = ARCHITECTURES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**(options | more))
    model = getattr(transformers, f"{family}For{head}" if head != "LMHeadModel" else f"{family}{head}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
    return model.eval()


@functools.cache
def tokenizer_of(name):
    """A trained tokenizer of the architecture's kind: WordPiece for BERT, byte-level BPE for the others."""
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    if name == "bert":
        special = {"cls_token": "[CLS]", "pad_token": "[PAD]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
        special["mask_token"] = "[MASK]"
        base = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        base.normalizer = normalizers.BertNormalizer()
        base.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=380, special_tokens=list(special.values()), show_progress=False)
    else:
        special |= {"mask_token": "<mask>"} if name == "roberta" else {}
        base = Tokenizer(models.BPE())
        base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        base.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=380, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
        )
    base.train_from_iterator(synthetic.texts(), trainer)
    first, last = ("[CLS]", "[SEP]") if name == "bert" else ("<s>", "</s>")
    around = {"bert": f"{first} $A {last}", "roberta": f"{first} $A {last}", "gpt2": None, "qwen": None}
    if shape := around.get(name, f"{first} $A"):
        used = [(token, base.token_to_id(token)) for token in (first, last) if token in shape]
        base.post_processor = processors.TemplateProcessing(single=shape, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=base, model_max_length=128, **special)


def saved(folder, name, seed=0, **more):
    """The model and its tokenizer as a folder."""
    model, made = architecture(name, seed, **more), tokenizer_of(name)
    model.config.pad_token_id = made.pad_token_id
    model.config.bos_token_id = model.config.eos_token_id = None
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def scaled(model, scale=6.0):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
    return model.eval()


def recurrent(name="Mamba"):
    torch.manual_seed(0)
    small = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 1}
    if name == "Qwen3_5":
        small |= {"layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 4, "head_dim": 8}
        small |= {"num_key_value_heads": 2, "linear_num_key_heads": 4, "linear_num_value_heads": 4}
        small |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "intermediate_size": 48}
        config = transformers.Qwen3_5TextConfig(**small)
    elif name == "RecurrentGemma":
        config = transformers.RecurrentGemmaConfig(**small, num_attention_heads=4, intermediate_size=48, lru_width=32)
    else:
        config = getattr(transformers, f"{name}Config")(**small)
    return scaled(getattr(transformers, f"{name}ForCausalLM")(config), 4.0)


TEXT = {"text": "text", "label": "label"}


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path
