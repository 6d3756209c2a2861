"""Other views of the training images. The teacher answers for the same view, so no view has a wrong label.

Distillation on few images overfits to them; views that student and teacher share are the cure (Beyer et al. 2022,
"Knowledge distillation: A good teacher is patient and consistent", section 3).
"""

import torch
from torchvision.transforms import v2


def views(x: torch.Tensor, hflip: float, scale: float, seed: int) -> torch.Tensor:
    """Return a random view of each image `[B, C, H, W]`, the same for the same seed.

    Args:
        x: normalised images.
        hflip: how likely an image is mirrored.
        scale: least share of an image's area that a crop keeps; it is resized to the old size. 1 for no crops.
        seed: draws the views.
    """
    generator = torch.Generator().manual_seed(seed)
    if hflip > 0:
        mirrored = torch.rand(len(x), generator=generator) < hflip
        x = torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(-1), x)  # [B] -> [B, 1, 1, 1]
    if scale < 1:
        size = list(x.shape[-2:])
        crop = v2.RandomResizedCrop(size, scale=(scale, 1.0), ratio=(0.9, 1.1), antialias=True)
        with torch.random.fork_rng(devices=[]):  # the transform draws from torch's own generator
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            x = torch.stack([crop(image) for image in x])
    return x
