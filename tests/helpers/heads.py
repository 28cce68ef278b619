"""Models by what their loss is a mean of, and rows for each."""

import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

from jaguar import ZOTrainer, ZOTrainingArguments

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
QUIET |= {"save_strategy": "no", "logging_strategy": "no"}


SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
BART = {"vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "decoder_attention_heads": 2}
BART |= {"encoder_attention_heads": 2, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48}
T5 = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 2, "pad_token_id": 0}
DISTIL = {"vocab_size": 99, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48}
OPT = SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}


IDS = torch.randint(5, 99, (8, 12), generator=torch.Generator().manual_seed(0))
LENGTHS = (2, 2, 12, 12, 2, 3, 9, 12)


def rows(**columns):
    return [{"input_ids": ids, **{name: column[i] for name, column in columns.items()}} for i, ids in enumerate(IDS)]


def cut(labels, lengths=LENGTHS):
    labels = labels.clone()
    for row, length in zip(labels, lengths, strict=True):
        row[length:] = -100
    return labels


def without(labels, *empty):
    labels = labels.clone()
    labels[list(empty)] = -100
    return labels


UNEVEN = rows(labels=cut(IDS))
PROMPTED = rows(labels=torch.where(torch.arange(12) < 3, -100, cut(IDS, (4, 5, 12, 12, 7, 4, 9, 12))))
CHOICES = [{"input_ids": torch.stack([ids, ids.flip(0)]), "labels": i % 2} for i, ids in enumerate(IDS)]
CLASSES = rows(labels=[0, 1, 1, 0, 1, 1, 1, 0])
UNLABELLED = rows(labels=[0, 1, -100, -100, 1, -100, 1, 0])
NUMBERS = rows(labels=[0.5, -100.0, 2.0, 3.0, -1.0, 0.0, 1.0, 4.0])
SEVERAL = rows(labels=(torch.arange(24).view(8, 3) % 2).float())
TAGS = rows(labels=cut(IDS % 4))
PLACES = rows(start_positions=[1, 2, 3, 4, 5, 6, 0, 1], end_positions=[2, 3, 4, 5, 6, 7, 0, 5])


class Shifting(nn.Module):
    """Shifts its labels itself and takes no num_items_in_batch."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Embedding(99, 16), nn.Linear(16, 99)

    def logits(self, input_ids):
        return self.head(self.inner(input_ids))

    def forward(self, input_ids, labels=None):
        logits = self.logits(input_ids)
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), "logits": logits}


class RowByRow(Shifting):
    """A mean over rows of means over tokens."""

    def forward(self, input_ids, labels=None):
        logits = self.logits(input_ids)
        return {"loss": torch.stack([F.cross_entropy(x, y) for x, y in zip(logits, labels, strict=True)]).mean()}


class Summing(Shifting):
    def forward(self, input_ids, labels=None):
        return {"loss": F.cross_entropy(self.logits(input_ids).flatten(0, 1), labels.flatten(), reduction="sum")}


HEADS = {
    "classes": (tf.BertForSequenceClassification, tf.BertConfig, SMALL, CLASSES),
    "some classes": (tf.DistilBertForSequenceClassification, tf.DistilBertConfig, DISTIL, UNLABELLED),
    "numbers": (tf.RobertaForSequenceClassification, tf.RobertaConfig, SMALL | {"num_labels": 1}, NUMBERS),
    "several classes": (tf.BertForSequenceClassification, tf.BertConfig, SMALL | {"num_labels": 3}, SEVERAL),
    "tags": (tf.BertForTokenClassification, tf.BertConfig, SMALL | {"num_labels": 4}, TAGS),
    "places": (tf.BertForQuestionAnswering, tf.BertConfig, SMALL, PLACES),
    "choices": (tf.BertForMultipleChoice, tf.BertConfig, SMALL, CHOICES),
    "masked": (tf.BertForMaskedLM, tf.BertConfig, SMALL, UNEVEN),
    "masked, batches without labels": (tf.BertForMaskedLM, tf.BertConfig, SMALL, rows(labels=without(IDS, 0, 1, 5))),
    "causal": (tf.LlamaForCausalLM, tf.LlamaConfig, SMALL, UNEVEN),
    "causal, gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config, GPT, UNEVEN),
    "causal, batches without labels": (tf.LlamaForCausalLM, tf.LlamaConfig, SMALL, rows(labels=without(IDS, 0, 1, 5))),
    "causal with prompts": (tf.OPTForCausalLM, tf.OPTConfig, OPT, PROMPTED),
    "drops the number of items": (tf.BartForCausalLM, tf.BartConfig, BART, UNEVEN),
    "drops the number of items, with prompts": (tf.BartForCausalLM, tf.BartConfig, BART, PROMPTED),
    "sequence to sequence": (tf.T5ForConditionalGeneration, tf.T5Config, T5, UNEVEN),
    "sequence to sequence, bart": (tf.BartForConditionalGeneration, tf.BartConfig, BART, UNEVEN),
    "gpt2's classes": (tf.GPT2ForSequenceClassification, tf.GPT2Config, GPT, CLASSES),
    "shifts its labels": (Shifting, None, {}, UNEVEN),
    "shifts its labels, with prompts": (Shifting, None, {}, PROMPTED),
    "means of rows": (RowByRow, None, {}, UNEVEN),
    "a sum": (Summing, None, {}, UNEVEN),
}


def model_of(cls, config, options):
    torch.manual_seed(0)
    return cls(config(**options)) if config else cls()


def trained(folder, model, data, size, micro, *, steps=1, **more):
    others = {name: more.pop(name) for name in ("compute_loss_func",) if name in more}
    args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": micro, "learning_rate": 0.0, **QUIET}
    args |= {"train_sampling_strategy": "sequential", "max_steps": steps, "coordinates": 0.5, "tau": 1e-2}
    trainer = ZOTrainer(model, ZOTrainingArguments(str(folder), **(args | more)), train_dataset=data, **others)
    trainer.train()
    return trainer.zeroth_order.last_record.losses
