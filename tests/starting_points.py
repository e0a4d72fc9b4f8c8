"""Small models of the families that people start from: random weights in folders as they are published."""

import json
from pathlib import Path

import open_clip
import torch
from conftest import TINY
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from transformers import AutoConfig, PreTrainedTokenizerFast, RobertaConfig, XLMRobertaConfig

PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
# As published: 512 tokens, and two positions more, which RoBERTa does not use.
ROBERTA = {"max_position_embeddings": 514, "vocab_size": 200, "pad_token_id": 1, **SMALL}
SIGLIP_TEXT = {"context_length": 12, "vocab_size": 200, "width": 16, "heads": 2, "layers": 1}
SIGLIP_TEXT |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
TIMM = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"}
# CoCa's towers as in coca_ViT-B-32, whose image tower pools with attention.
COCA_VISION = {**TINY["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
COCA_TEXT = {**TINY["text_cfg"], "embed_cls": True, "output_tokens": True}
COCA_DECODER = {**TINY["text_cfg"], "attn_pooler_heads": 2}


def tokenizer() -> PreTrainedTokenizerFast:
    """Words, between <s> and </s>, padded with 1, as RoBERTa's."""
    words = Tokenizer(WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    captions = ["a bell", "a house and a tree", "arrow left", "an icon of a red car"]
    words.train_from_iterator(captions, WordLevelTrainer(special_tokens=special, vocab_size=200))
    words.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def save_tower(folder: Path, kind: str) -> Path:
    """A text tower's configuration and tokenizer, as a folder of transformers."""
    folder.mkdir()
    if kind == "roberta":
        RobertaConfig(**ROBERTA).save_pretrained(folder)
    elif kind == "xlm-roberta":
        XLMRobertaConfig(**ROBERTA).save_pretrained(folder)
    else:
        AutoConfig.for_model("bert", vocab_size=200, **SMALL).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_model(folder: Path, kind: str) -> str:
    """A MODEL of a family: "roberta", "xlm-roberta", "bert", "siglip", "coca" or "timm"."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"embed_dim": 16, "vision_cfg": TINY["vision_cfg"], "text_cfg": TINY["text_cfg"]}
    options = {}
    if kind in ("roberta", "xlm-roberta", "bert"):
        tower = save_tower(folder.parent / f"{folder.name}-{kind}", kind)
        config["text_cfg"] = {"hf_model_name": str(tower), "hf_tokenizer_name": str(tower)}
        config["text_cfg"] |= {"hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"}
        tokenizer().save_pretrained(folder)
    elif kind == "siglip":
        config |= {"vision_cfg": TIMM, "text_cfg": {**SIGLIP_TEXT, "hf_tokenizer_name": "."}}
        config |= {"custom_text": True, "init_logit_bias": -10}
        tokenizer().save_pretrained(folder)
    elif kind == "coca":
        config |= {"vision_cfg": COCA_VISION, "text_cfg": COCA_TEXT, "multimodal_cfg": COCA_DECODER}
        config["custom_text"] = True
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS})
    )
    torch.manual_seed(2)
    model = open_clip.create_model(
        f"local-dir:{folder}", load_weights=False, pretrained_text=False, **options
    )
    for parameter in model.parameters():
        if not torch.isfinite(parameter).all() or parameter.abs().max() > 100:
            torch.nn.init.normal_(parameter, std=0.02)  # CoCa leaves one uninitialised
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"
