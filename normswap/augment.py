"""Other views of the training images. The teacher answers for the same view, so no view has a wrong label.

Distillation on few images overfits to them; views that student and teacher share are the cure (Beyer et al. 2022,
"Knowledge distillation: A good teacher is patient and consistent", section 3).
"""

import torch
from torch.nn import functional as F
from torchvision.transforms import RandomResizedCrop


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
        with torch.random.fork_rng(devices=[]):  # the transform draws from torch's own generator
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            boxes = [RandomResizedCrop.get_params(image, [scale, 1.0], [0.9, 1.1]) for image in x]
        x = _cropped(x, torch.tensor(boxes, dtype=x.dtype))
    return x


def _cropped(x: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Return a crop of each image `[B, C, H, W]`, resized to the old size, all at once: one by one keeps a GPU waiting.

    Args:
        x: the images.
        boxes: top, left, height and width of each crop in pixels `[B, 4]`.
    """
    size = torch.tensor(x.shape[-2:], dtype=boxes.dtype)  # [2]: H, W
    share = boxes[:, 2:] / size  # [B, 2]
    centre = (2 * boxes[:, :2] + boxes[:, 2:]) / size - 1  # [B, 2], from -1 to 1 over the image
    theta = x.new_zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = share[:, 1].to(x), share[:, 0].to(x)
    theta[:, 0, 2], theta[:, 1, 2] = centre[:, 1].to(x), centre[:, 0].to(x)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)  # [B, 2, 3] -> [B, H, W, 2]
    # Beyond the crop lies the rest of the image, and beyond the image its border: no resize looks further either.
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
