"""From a picture to what the model is trained on: crop, color jitter and grayscale, two separate coins."""

from torchvision.transforms import v2

from train.recipe import Augment


def train_transform(size: tuple[int, int], augment: Augment) -> v2.Compose:
    """PIL RGB -> uint8 [3, H, W]; all randomness is torch's global generator on the CPU."""
    steps = [v2.RandomResizedCrop(size, scale=augment.scale, interpolation=v2.InterpolationMode.BICUBIC)]
    if augment.color_jitter_prob:
        steps.append(v2.RandomApply([v2.ColorJitter(*augment.color_jitter)], p=augment.color_jitter_prob))
    if augment.gray_scale_prob:
        steps.append(v2.RandomGrayscale(augment.gray_scale_prob))
    return v2.Compose([*steps, v2.PILToTensor()])
