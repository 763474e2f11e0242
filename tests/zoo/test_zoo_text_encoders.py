"""The tokenizers of the zoo: a word is a token, and a token has the same number in every process."""

import pytest
import torch

from evenkeel import zoo
from evenkeel.zoo.making import text_encoders
from evenkeel.zoo.making.text_encoders import RECIPES, TOKENS, build, reading_loss, tokenize
from evenkeel.zoo.making.twins import sd_v2_1
from evenkeel.zoo.scene_captions import vocabulary

NAMES = list(RECIPES)


@pytest.mark.parametrize("name", NAMES)
def test_every_word_is_one_token(name):
    tokenizer, _ = build(name)
    around = len(tokenizer("").input_ids)
    for word in vocabulary():
        assert len(tokenizer(word).input_ids) == around + 1, word
    numbers = {tuple(tokenizer(word).input_ids) for word in vocabulary()}
    assert len(numbers) == len(vocabulary())
    other = tokenizer.decode(tokenizer("quartz 7!").input_ids, skip_special_tokens=True)
    assert other.replace(" ", "") == "quartz7!"  # letter by letter


@pytest.mark.parametrize("end", ["</w>", None])
def test_numbers_of_tokens_do_not_hang_on_the_process(end):
    # The trainer's hash tables are ordered differently every time, also within one process. An encoder that
    # is loaded beside a tokenizer with other numbers reads other words.
    first, *others = (text_encoders._merges(vocabulary(), end) for _ in range(8))
    assert all(merges == first for merges in others)


@pytest.mark.parametrize("name", list(zoo.TWINS))
def test_a_twin_has_the_tokenizer_that_its_text_encoder_was_trained_with(name):
    kinds = {"CLIPTokenizer": "clip-l", "GemmaTokenizer": "gemma"}
    if zoo.twin(name).pictures == "emoji":
        kinds = {"CLIPTokenizer": None}
    pipeline = zoo.load(name)
    saved = [getattr(pipeline, part, None) for part in ("tokenizer", "tokenizer_2")]
    known = [t for t in saved if type(t).__name__ in kinds]
    assert bool(known) == (zoo.twin(name).pictures in ("scenes", "emoji"))
    for tokenizer in known:
        kind = kinds[type(tokenizer).__name__]
        built, _ = build(kind) if kind else sd_v2_1.build_text_encoder()
        assert tokenizer.get_vocab() == built.get_vocab()


def test_captions_are_padded_on_the_right_to_one_length():
    tokenizer, _ = build("t5")
    ids, mask = tokenize(tokenizer, ["a red seven", ""])
    assert ids.shape == mask.shape == (2, TOKENS)
    assert mask.sum(1).tolist() == [4, 1]
    assert (ids[mask == 0] == tokenizer.pad_token_id).all()
    assert (mask.diff(dim=1) <= 0).all()


def test_what_is_not_mentioned_is_the_last_class():
    scores = {"colour": torch.tensor([[9.0, 0, 0], [0, 0, 9]])}
    assert reading_loss(scores, {"colour": torch.tensor([0, -1])}) < 0.01
    assert reading_loss(scores, {"colour": torch.tensor([-1, 0])}) > 5
