"""Arms of benchmarks.quality that no other test names: all are recipes, and a soup is a mean of weights."""

import numpy as np
import pytest
import torch
from conftest import save_tiny
from test_quality import recipe_of

from benchmarks import quality
from benchmarks.quality import ARMS, MORE, PLACES, SENTENCES, WITH_CURVE, folder_of, soup
from train.model.clip import load


@pytest.mark.parametrize("name", MORE)
def test_an_arm_of_more_differs_from_ours_in_its_flags_alone(name):
    ours, arm = recipe_of("ours"), recipe_of(f"ours with {name}")
    keys = {word[2:].replace("-", "_") for word in map(str, MORE[name]) if word.startswith("--")}
    assert {key for key in arm if arm[key] != ours[key]} == keys
    assert set(WITH_CURVE) <= set(ARMS)


def test_the_places_of_words(tmp_path):
    without = recipe_of("ours with replay of its own images and A's sentences")
    assert (without["replay"], without["replay_texts"]) == ("own", SENTENCES)
    assert PLACES[SENTENCES].format(tmp_path) == f"{tmp_path}/A.txt"


def test_a_soup_is_the_mean_of_the_seeds_weights(tmp_path, monkeypatch):
    judged = []
    monkeypatch.setattr(quality, "judge", lambda *arguments: judged.append(arguments))
    folders = [folder_of(tmp_path, "ours", seed) for seed in (0, 1, 2)]
    for seed, folder in enumerate(folders):
        (folder / "model").mkdir(parents=True)
        clip = load(f"local-dir:{save_tiny(folder / 'model')}")
        with torch.no_grad():
            for parameter in clip.towers.parameters():
                parameter += seed * torch.sin(100 * parameter)
        clip.save(folder / "model")
    made = soup(tmp_path, folder_of(tmp_path, "soup of ours", 0, 1, 2), folders, False)
    assert made == tmp_path / "arms" / "soup_of_ours-0-1-2"
    assert judged == [(tmp_path, made, False)]
    states = [load(f"local-dir:{folder / 'model'}").towers.model.state_dict() for folder in folders]
    for name, tensor in load(f"local-dir:{made / 'model'}").towers.model.state_dict().items():
        mean = np.mean([state[name].numpy() for state in states], axis=0)
        np.testing.assert_allclose(tensor.numpy(), mean, rtol=1e-5, atol=1e-6)
