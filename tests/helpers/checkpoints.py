"""Models whose checkpoints differ from their memory, and runs of them."""

import peft
import torch
import transformers
from torch import nn

from jaguar import ZOTrainer, ZOTrainingArguments
from jaguar.trainer import weights

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
ONE = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXPERTS = {"num_experts_per_tok": 2, "num_key_value_heads": 2} | ONE
# Stored as they are in memory, under other names, in pieces, and as parts of larger tensors.
MODELS = {
    "gpt-neox": ("GPTNeoX", "CausalLM", ONE),
    "mixtral": ("Mixtral", "CausalLM", EXPERTS | {"num_local_experts": 4}),
    "qwen2-moe": (
        "Qwen2Moe",
        "CausalLM",
        EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "gpt-oss": ("GptOss", "CausalLM", EXPERTS | {"num_local_experts": 4, "head_dim": 16}),
    "nomic-bert": ("NomicBert", "MaskedLM", {}),
    "tied": ("Llama", "CausalLM", ONE | {"tie_word_embeddings": True}),
    "deberta": ("DebertaV2", "MaskedLM", {}),
    "electra": ("Electra", "MaskedLM", {"embedding_size": 16}),
    "bf16": ("Llama", "CausalLM", ONE),
}
ADAPTERS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "p-tuning with an LSTM": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"
    ),
    "projected prefix": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16
    ),
    "lora and a whole module": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
    "dora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], use_dora=True),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
}


def pretrained(name, seed=0):
    kind, head, more = MODELS[name]
    sizes = SIZES | ({"type_vocab_size": 1} if name == "nomic-bert" else {}) | more
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}For{head}")(getattr(transformers, f"{kind}Config")(**sizes))
    return model.to(torch.bfloat16) if name == "bf16" else model


class Plain(nn.Module):
    """A module without `save_pretrained`, with tied and transposed weights and a buffer."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(60, 8), nn.Linear(8, 60, bias=False)
        self.head.weight = self.embed.weight
        self.middle = nn.Linear(8, 8)
        self.middle.weight = nn.Parameter(torch.randn(8, 8).t())
        self.register_buffer("scale", torch.rand(()))

    def forward(self, input_ids, labels):
        logits = self.head(self.middle(self.embed(input_ids))) * self.scale
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def adapted(name, seed=0):
    base = pretrained("tied" if name == "untouched" else "bf16", 0).float()
    torch.manual_seed(seed)
    if name == "two adapters":
        config = ADAPTERS["lora and a whole module"]
        model = peft.get_peft_model(base, config())
        model.add_adapter("other", peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"], r=2))
        return model
    if name == "transformers' own":
        base.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
        return base
    return peft.get_peft_model(base, ADAPTERS[name]())


def make(name, seed=0):
    """A model of that name; its seed decides all that its checkpoint holds."""
    if name == "plain":
        return Plain(seed)
    return pretrained(name, seed) if name in MODELS else adapted(name, seed)


def rows(count=32):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (count, 9), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(folder, model, steps=4, **more):
    options = {"learning_rate": 1e-2, "coordinates": 1.0, "tau": 1e-2, "save_steps": 2, "use_cpu": True} | more
    args = ZOTrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
        **options,
    )
    return ZOTrainer(model, args, train_dataset=rows(), eval_dataset=rows(8))


def bits(model):
    return {name: tensor.detach().clone() for name, tensor in weights.kept(model).items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def resumed(folder, tmp_path, model=None, **more):
    run = trainer(tmp_path / "resumed", make("tied", seed=1) if model is None else model, **more)
    run.train(resume_from_checkpoint=str(folder))
    return run
