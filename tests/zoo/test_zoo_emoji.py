"""Pictures of emoji: what is drawn is what captions say, and no training sees the pairs that are held out."""

import numpy as np
import pytest
import torch

from evenkeel import zoo
from evenkeel.errors import EvenkeelError
from evenkeel.zoo import emoji
from evenkeel.zoo.emoji import GROUNDS, NOTHING, OBJECTS, SCENE, is_held_out, sample_scenes
from evenkeel.zoo.emoji_captions import (
    caption_scenes,
    read_caption,
    reference_images,
    sample_prompts,
    vocabulary,
)
from evenkeel.zoo.emoji_evaluation import MATCHES, EmojiEvaluator
from evenkeel.zoo.handwriting import UNSPECIFIED


def test_no_training_picture_shows_a_held_out_pair():
    seen, held = (sample_scenes(2000, np.random.default_rng(0), held_out=h) for h in (False, True))
    for scenes, expected in ((seen, False), (held, True)):
        pairs = [
            (a, b)
            for a, b in zip(scenes["first"].tolist(), scenes["second"].tolist(), strict=True)
            if b != NOTHING
        ]
        assert len(pairs) > 1000 and all(a != b for a, b in pairs)
        assert {is_held_out(a, b) for a, b in pairs} == {expected}
        assert {a for a, _ in pairs} == set(range(len(OBJECTS)))
        alone = (scenes["second"] == NOTHING).float().mean()
        assert abs(alone - emoji.ALONE) < 0.05
    everything = [(i, j) for i in range(len(OBJECTS)) for j in range(len(OBJECTS)) if i != j]
    share = np.mean([is_held_out(i, j) for i, j in everything])
    assert abs(share - 1 / emoji.HELD_OUT) < 0.02


def test_captions_say_what_they_were_told():
    rng = np.random.default_rng(1)
    captions, mentioned = caption_scenes(sample_scenes(500, rng), rng)
    words = set(vocabulary())
    for i, caption in enumerate(captions):
        assert read_caption(caption) == {k: int(v[i]) for k, v in mentioned.items()}, caption
        assert set(caption.split()) <= words
    open_ones = (mentioned["background"] == UNSPECIFIED).float().mean()
    assert 0.05 < open_ones < 0.16


def test_the_first_stands_left_on_its_background():
    navy, mint = (tuple(GROUNDS).index(name) for name in ("navy", "mint"))
    scene = {
        "first": torch.tensor([OBJECTS.index("heart"), OBJECTS.index("frog")]),
        "second": torch.tensor([OBJECTS.index("frog"), NOTHING]),
        "background": torch.tensor([navy, mint]),
    }
    pair, alone = emoji.render(scene, np.random.default_rng(0))
    assert pair.shape == (3, 64, 64) and pair.min() >= 0 and pair.max() <= 1
    left, right = pair[:, 28:36, 12:20].mean((1, 2)), pair[:, 28:36, 44:52].mean((1, 2))
    assert left.argmax() == 0 and right.argmax() == 1  # a red heart, a green frog
    assert alone[:, 28:36, 28:36].mean((1, 2)).argmax() == 1
    assert pair[:, -2:].mean() < 0.4 < alone[:, -2:].mean()
    assert pair[:, :2].mean() > pair[:, -2:].mean()  # lighter above


def test_sprites_that_are_nowhere_say_where_they_belong(monkeypatch, tmp_path):
    monkeypatch.setattr(zoo, "places_of", lambda name: [tmp_path / name])
    with pytest.raises(EvenkeelError, match=r"sprites.*zoo/.*EVENKEEL_ZOO"):
        emoji.sheet_file()


def test_the_evaluator_sees_what_is_asked_for_and_nothing_else():
    evaluator = EmojiEvaluator(zoo.path_of(emoji.TWIN))
    prompts, others = sample_prompts(300, 5), sample_prompts(300, 6)
    shown = evaluator.matches(reference_images(prompts, 5).float() / 255, prompts)
    assert shown.shape == (300, len(MATCHES)) and len(MATCHES) == len(SCENE)
    assert shown.nanmean(0).min() > 0.97
    wrong = evaluator.matches(reference_images(others, 5).float() / 255, prompts)
    assert wrong[:, 0].mean() < 0.1 and wrong.nanmean(0).max() < 0.5
    swapped = ["a fox and a heart on mint"] * 20
    drawn = ["a heart and a fox on mint"] * 20
    seen = evaluator.matches(reference_images(drawn, 1).float() / 255, swapped).nanmean(0)
    assert seen[0] < 0.1 and seen[1] < 0.1 and seen[2] > 0.9
