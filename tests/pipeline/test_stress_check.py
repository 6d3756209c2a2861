"""Which images the short check on corrupted images sees."""

import pytest
import torch

from normswap import ArgumentError
from normswap.inputs.batches import gather
from normswap.pipeline.stress_check import SEED, shuffled

LIKE = torch.zeros(1, dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 7, 50, 60])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_draw_is_a_random_one_and_labels_stay_with_their_images(count, labelled):
    images, labels = torch.randn(50, 3, 4, 4), torch.arange(50)
    batches = [(images[i : i + 8], labels[i : i + 8] if labelled else None) for i in range(0, 50, 8)]
    ((found, known),) = shuffled(batches, batches, 50, count, LIKE)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(SEED))[:count]
    everything = gather(batches, LIKE)[0]
    assert found.dtype == LIKE.dtype
    assert torch.equal(found, everything[order])
    assert torch.equal(known, order) if labelled else known is None


def test_only_what_is_drawn_is_held():
    """A loader of a whole validation set does not fit into memory."""
    alive = []

    class Loader:
        def __iter__(self):
            for _ in range(20):
                batch = torch.randn(16, 3, 4, 4)
                alive.append(torch.multiprocessing.reductions.StorageWeakRef(batch.untyped_storage()))
                yield batch
                del batch

    ((found, _),) = shuffled(Loader(), Loader(), 320, 8, LIKE.float())
    assert len(found) == 8
    assert len(alive) == 20
    assert all(reference.expired() for reference in alive)


def test_no_images_are_refused():
    with pytest.raises(ArgumentError, match="no images"):
        shuffled([], [], 5, 2, LIKE)
