"""Tiny models with random weights, a real tokenizer for them, and text: made anew in a fraction of a second."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY, CONTEXT, LAYERS = 101, 128, 3

# A spread of the weights that keeps activations near 1, so that the models write varied text.
_SPREAD = {"initializer_range": 0.2, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
_NEW = _SPREAD | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_GROUPED = _NEW | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
_OPT = {k: v for k, v in _NEW.items() if k not in ("initializer_range", "intermediate_size")}

CONFIGURATIONS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_GROUPED),
    "mistral": MistralConfig(**_GROUPED),
    "qwen2": Qwen2Config(**_GROUPED),
    "qwen3": Qwen3Config(**_GROUPED),
    "gemma2": Gemma2Config(**_GROUPED),
    "phi3": Phi3Config(**_GROUPED),
    "opt": OPTConfig(**_OPT, init_std=0.2, ffn_dim=64, word_embed_proj_dim=32),
    "gpt2": GPT2Config(**_SPREAD, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=CONTEXT),
    "gpt_neox": GPTNeoXConfig(**_NEW),
}
FAMILIES = list(CONFIGURATIONS)


def model_of(family: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A float32 model of the family in eval mode; ``changes`` go to its configuration."""
    known = CONFIGURATIONS[family]
    config = type(known)(**{**known.to_dict(), **changes})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def with_experts() -> PreTrainedModel:
    """A float32 Mixtral in eval mode, whose experts are parameters of three dimensions."""
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tokenizer_of_characters(
    start: bool = False, end: bool = False, extra: int = 0
) -> PreTrainedTokenizerFast:
    """One token a printable ASCII character; ``start`` and ``end`` frame a text as Llama's and T5's do."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    words = ["<unk>", "<s>", "</s>", *characters, *(f"<extra{i}>" for i in range(extra))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    frame = " ".join(["<s>"] * start + ["$A"] + ["</s>"] * end)
    raw.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """A Hugging Face folder with both."""
    model.save_pretrained(folder)
    (tokenizer or tokenizer_of_characters()).save_pretrained(folder)
    return folder


def text_of(characters: int, seed: int = 0) -> str:
    """So many random letters and spaces."""
    drawn = torch.randint(0, 27, (characters,), generator=torch.Generator().manual_seed(seed))
    return "".join("abcdefghijklmnopqrstuvwxyz "[i] for i in drawn.tolist())
