"""The model that both sides load: weights, a stand-in tokenizer, and for PPO a critic. referee.py runs it as a program.

The tokenizer reads the text "17 9 233" as these three ids, so that neither side can tokenize a prompt differently.
The two ids that are least likely everywhere are renumbered to EOS and PAD, so that a schedule of lengths can force
and forbid the EOS without changing the other samples.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from policylab.config import resolvers
from policylab.config.build import instantiate, model_config
from policylab.models.loading import LoadedModel
from race.work import EOS, PAD, PROMPT_TOKENS

ROOT = Path(__file__).parents[2]
#: Our overrides for each ``--model``.
MODELS = {
    "tiny": ["model=tiny"],
    "gpt2": ["model=gpt2_scratch", "model.vocab_size=50257"],
    "smollm2": ["model=smollm2"],
    "llama": ["model=gpt2_scratch", "model.vocab_size=151936"],
}
#: Instead of the config's own: of Qwen2.5-0.5B's size.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
}


def load(model: str) -> LoadedModel:
    """A model of `MODELS`, loaded as in a run."""
    resolvers.register(ROOT)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", MODELS[model])
    if model in ARCHITECTURES:
        config.model.architecture = ARCHITECTURES[model]
    return instantiate(model_config(config))


def save(model: str, folder: Path, with_critic: bool) -> None:
    """Writes ``folder/policy`` and, for PPO, ``folder/critic`` in Hugging Face format."""
    lm: Any = load(model).lm
    renumber(lm, rarest(lm))
    for settings in (lm.config, lm.generation_config):
        settings.bos_token_id = settings.eos_token_id = EOS
        settings.pad_token_id = PAD
    lm.save_pretrained(folder / "policy")
    stand_in(lm.config.vocab_size).save_pretrained(folder / "policy")
    if with_critic:
        torch.manual_seed(0)
        critic = AutoModelForSequenceClassification.from_pretrained(
            folder / "policy", num_labels=1, dtype=torch.float32
        )
        critic.save_pretrained(folder / "critic")


@torch.no_grad()
def rarest(lm: Any) -> list[int]:
    """The two ids whose largest probability, over sampled and random contexts, is smallest."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, lm.config.vocab_size, (8, PROMPT_TOKENS), generator=generator)
    tokens = lm.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=PROMPT_TOKENS,
        pad_token_id=0,
    )
    greatest = lm(tokens).logits.float().softmax(-1).amax((0, 1))
    return greatest.argsort()[:2].tolist()


@torch.no_grad()
def renumber(lm: Any, ids: list[int]) -> None:
    """Swaps the rows of these ids with those of EOS and PAD, in the embedding and in the head."""
    order = torch.arange(lm.config.vocab_size)
    for new, old in zip((EOS, PAD), ids, strict=True):
        place = int((order == old).nonzero())
        order[new], order[place] = order[place].clone(), order[new].clone()
    embedding, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    for weight in (embedding,) if head is embedding else (embedding, head):
        weight.copy_(weight[order])


def stand_in(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is the decimal ids."""
    words = {"<eos>": EOS, "<pad>": PAD} | {str(i): i for i in range(PAD + 1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


if __name__ == "__main__":
    save(sys.argv[1], Path(sys.argv[2]), with_critic=sys.argv[3] == "ppo")
