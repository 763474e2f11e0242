"""The frozen text encoders of the zoo and their tokenizers: CLIP in two sizes, T5, Gemma 2.

Each is of the class that the original pipelines use, three layers deep, and trained to tell what
a caption of :mod:`evenkeel.zoo.scene_captions` or :mod:`evenkeel.zoo.emoji_captions` asks for. Every word
of the grammar is one token; other words fall into letters.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evenkeel.zoo.making.loop import Recipe, fit
from evenkeel.zoo.scene_captions import mention, vocabulary, write_caption
from evenkeel.zoo.scenes import SCENE, sample_scenes

TOKENS = 18  # the longest caption has 16 words; CLIP adds two tokens
WIDTHS = {"clip-l": 64, "clip-g": 96, "t5": 96, "gemma": 96}
RECIPES = {
    "clip-l": Recipe(steps=1000, learning_rate=2e-3, seed=121),
    "clip-g": Recipe(steps=1000, learning_rate=2e-3, seed=122),
    "t5": Recipe(steps=2000, learning_rate=2e-3, seed=123),
    "gemma": Recipe(steps=1000, learning_rate=2e-3, seed=124),
}
BATCH = 128
Captions = Callable[[int, np.random.Generator], tuple[list[str], dict[str, Tensor]]]
_CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation


def build(name: str) -> tuple[Any, Any]:
    """Tokenizer and encoder, not trained."""
    if name == "t5":
        return build_t5(vocabulary(), TOKENS, WIDTHS["t5"], layers=3)
    if name == "gemma":
        return _gemma()
    return build_clip(vocabulary(), TOKENS, WIDTHS[name], projection=name == "clip-g")


def train(name: str, work: Path) -> tuple[Any, Any]:
    """The tokenizer and the encoder of that name, trained in ``work`` or continued there."""
    recipe = RECIPES[name]
    torch.manual_seed(recipe.seed)
    tokenizer, encoder = build(name)
    fit_reading(name, tokenizer, encoder, sample_captions, SCENE, recipe, work / name)
    return tokenizer, encoder


def fit_reading(
    name: str,
    tokenizer: Any,
    encoder: Any,
    captions_of: Captions,
    scene: Mapping[str, Sequence[str]],
    recipe: Recipe,
    folder: Path,
) -> None:
    """Train an encoder in place to tell what captions mention.

    Args:
        name: of its kind, a key of ``WIDTHS``.
        tokenizer: its own.
        encoder: not trained, or partly.
        captions_of: (n, generator) -> captions, and attribute -> (n,) what they mention.
        scene: attribute -> its values.
        recipe: how long and how fast.
        folder: of this run.

    """
    width = encoder.config.hidden_size
    heads = nn.ModuleDict({k: nn.Linear(2 * width, len(v) + 1) for k, v in scene.items()})
    both = nn.ModuleDict({"encoder": encoder, "heads": heads})

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        captions, mentions = captions_of(BATCH, rng)
        device = next(module.parameters()).device
        read = _summary(name, encoder, tokenizer, captions, device)
        return reading_loss({k: head(read) for k, head in heads.items()}, mentions)

    fit(both, loss, recipe, folder)
    encoder.eval().cpu()


def reading_loss(scores: Mapping[str, Tensor], mentions: Mapping[str, Tensor]) -> Tensor:
    """Sum of the cross entropies of what captions mention.

    Args:
        scores: attribute -> (n, number of its values + 1); the last is for "not mentioned".
        mentions: attribute -> (n,) value indices, UNSPECIFIED where not mentioned.

    """
    losses = [
        # UNSPECIFIED is -1: the class after the last.
        F.cross_entropy(s, (mentions[name] % s.shape[1]).to(s.device))
        for name, s in scores.items()
    ]
    return torch.stack(losses).sum()


def sample_captions(n: int, rng: np.random.Generator) -> tuple[list[str], dict[str, Tensor]]:
    """Captions of random scenes, and what they mention."""
    return caption_scenes(sample_scenes(n, rng), rng)


def caption_scenes(
    scenes: dict[str, Tensor], rng: np.random.Generator
) -> tuple[list[str], dict[str, Tensor]]:
    """Put scenes into words, leaving some out; and what is mentioned."""
    n = len(scenes["arrangement"])
    rows = [mention({k: int(v[i]) for k, v in scenes.items()}, rng) for i in range(n)]
    captions = [write_caption(row, rng) for row in rows]
    return captions, {k: torch.tensor([r[k] for r in rows]) for k in SCENE}


def tokenize(tokenizer: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, padded on the right to the tokenizer's length, as the pipelines do."""
    tokenizer.padding_side = "right"
    tokens = tokenizer(
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return tokens.input_ids, tokens.attention_mask


def _summary(
    name: str, encoder: Any, tokenizer: Any, captions: list[str], device: torch.device
) -> Tensor:
    """What a denoiser will be given, in one vector (n, 2 width): both what it sees must tell all."""
    ids, mask = (x.to(device) for x in tokenize(tokenizer, captions))
    if name == "t5":  # FLUX masks nothing
        hidden = encoder(ids).last_hidden_state
        return torch.cat([hidden.mean(1), hidden[:, 0]], 1)
    if name == "gemma":
        hidden = encoder(ids, attention_mask=mask).last_hidden_state
        last = hidden[torch.arange(len(ids)), mask.sum(1) - 1]
        return torch.cat([(hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), last], 1)
    out = encoder(ids, output_hidden_states=True)
    pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
    return torch.cat([out.hidden_states[-2].mean(1), pooled], 1)


# ---- tokenizers: words from byte-pair merges that were learned on the words themselves


def _merges(words: list[str], end: str | None) -> list[tuple[str, str]]:
    """Merges that make every word one token."""
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE())
    options: dict[str, Any] = {}
    if end is not None:
        # Ties are broken by the numbers of the pieces, and last letters get theirs in the order of a hash
        # table, another one in every process, unless they are given.
        last = list(dict.fromkeys(word[-1] + end for word in words))
        options = {"end_of_word_suffix": end, "special_tokens": last}
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, show_progress=False, **options
    )
    tokenizer.train_from_iterator(words, trainer)

    learned = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(a, b) for a, b in learned]


def _numbered(pieces: list[str]) -> dict[str, int]:
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


def build_clip(
    words: Sequence[str], tokens: int, width: int, *, projection: bool = False
) -> tuple[Any, Any]:
    """A CLIP tokenizer for which every word is one token, and a text encoder of three layers."""
    import transformers as tf

    merges = _merges(list(words), "</w>")
    pieces = ["<|startoftext|>", "<|endoftext|>", *_CHARACTERS, *(c + "</w>" for c in _CHARACTERS)]
    vocab = _numbered(pieces + [a + b for a, b in merges])
    tokenizer = tf.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=tokens)
    config = tf.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_attention_heads=width // 32,
        num_hidden_layers=3,
        max_position_embeddings=tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = tf.CLIPTextModelWithProjection if projection else tf.CLIPTextModel
    return tokenizer, kind(config)


def build_t5(words: Sequence[str], tokens: int, width: int, layers: int) -> tuple[Any, Any]:
    """A T5 tokenizer with a piece for each word, and for each character otherwise; an encoder."""
    import transformers as tf

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + w, -1.0) for w in words]
    pieces += [(c, -8.0) for c in _CHARACTERS]
    tokenizer = tf.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=tokens)
    config = tf.T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=24,
        d_ff=192,
        num_layers=layers,
        num_heads=4,
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    return tokenizer, tf.T5EncoderModel(config)


def _gemma() -> tuple[Any, Any]:
    import transformers as tf
    from tokenizers.processors import TemplateProcessing

    words = vocabulary()
    merges = _merges([*words, *("▁" + w for w in words)], None)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    vocab = _numbered([*special, *_CHARACTERS, "\n", " ", *(a + b for a, b in merges)])
    tokenizer = tf.GemmaTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)
    # As in Gemma's own file; without it an empty caption would have no token at all.
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    config = tf.Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTHS["gemma"],
        intermediate_size=192,
        head_dim=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TOKENS,
        use_cache=False,
    )
    return tokenizer, tf.Gemma2Model(config)
