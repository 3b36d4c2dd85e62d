"""The networks that appendix D measures with, where they are at hand: pip install -e ".[fid]".

Both libraries fetch their weights themselves, so a machine without them has only CLIP's features.
"""

import tempfile
from functools import cache
from pathlib import Path

import experiment  # noqa: F401  so that the repository is found
import torch
from measures import cluster_diversity

from textinv import prepare_images


@cache
def networks():
    """(LPIPS, clean-fid, ""), or at the end a sentence that says why not."""
    try:
        import lpips
        from cleanfid import fid

        fid.build_feature_extractor("clean", device=torch.device("cpu"))
        return lpips.LPIPS(net="alex", verbose=False), fid, ""
    except Exception as error:  # not installed, no weights: each library fails in its own way
        return None, None, f"no LPIPS and FID, CLIP's features only ({error})"


def lpips_diversity(net, samples, images) -> float:
    """Cluster diversity of PIL images as appendix D has it: the distance is LPIPS."""

    @torch.no_grad()
    def distance(x, y):
        return torch.stack([net(row.expand_as(y), y).flatten() for row in x[:, None]])

    x, y = (prepare_images(pictures, images[0].width) for pictures in (samples, images))
    return cluster_diversity(x, y, distance)


def inception_distance(fid, samples, images) -> float:
    """clean-fid between two lists of PIL images; it reads files."""
    with tempfile.TemporaryDirectory() as folder:
        for kind, pictures in (("samples", samples), ("images", images)):
            (Path(folder) / kind).mkdir()
            for i, picture in enumerate(pictures):
                picture.save(Path(folder) / kind / f"{i}.png")
        device = torch.device("cpu")
        options = dict(num_workers=0, verbose=False, device=device, use_dataparallel=False)
        return fid.compute_fid(f"{folder}/samples", f"{folder}/images", **options)


def measures(samples, everything, count: int) -> dict[str, float]:
    """Both, or nothing where they cannot be had; the word was learnt from the first `count`."""
    net, fid, missing = networks()
    if missing:
        return {}
    diversity = lpips_diversity(net, samples, everything[:count])
    return dict(lpips_diversity=diversity, fid=inception_distance(fid, samples, everything))
