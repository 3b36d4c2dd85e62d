"""The networks that appendix D measures with, LPIPS and Inception: pip install -e ".[fid]".

Both libraries download their weights, so a machine without a network has only CLIP's features.
"""

import tempfile
from functools import cache
from pathlib import Path

import torch
from measures import cluster_diversity

from models.images import prepare_images


@cache
def load_networks():
    """Return (LPIPS, clean-fid, ""), or (None, None, a sentence that says why not)."""
    try:
        import lpips
        from cleanfid import fid

        fid.build_feature_extractor("clean", device=torch.device("cpu"))
        return lpips.LPIPS(net="alex", verbose=False), fid, ""
    except Exception as error:  # not installed, no weights: each library fails in its own way
        return None, None, f"no LPIPS and FID, CLIP's features only ({error})"


def lpips_diversity(net, samples, images) -> float:
    """Return the cluster diversity of PIL images as in appendix D, where the distance is LPIPS."""

    @torch.no_grad()
    def distance(x, y):
        return torch.stack([net(row.expand_as(y), y).flatten() for row in x[:, None]])

    x, y = (prepare_images(pictures, images[0].width) for pictures in (samples, images))
    return cluster_diversity(x, y, distance)


def inception_distance(fid, samples, images) -> float:
    """Return the FID between two lists of PIL images; clean-fid reads files."""
    with tempfile.TemporaryDirectory() as folder:
        for kind, pictures in (("samples", samples), ("images", images)):
            (Path(folder) / kind).mkdir()
            for i, picture in enumerate(pictures):
                picture.save(Path(folder) / kind / f"{i}.png")
        device = torch.device("cpu")
        options = dict(num_workers=0, verbose=False, device=device, use_dataparallel=False)
        return fid.compute_fid(f"{folder}/samples", f"{folder}/images", **options)


def network_measures(samples, everything, count: int) -> dict[str, float]:
    """Return both, or nothing where they cannot be had; the word was learnt from the first `count`
    of `everything`."""
    net, fid, missing = load_networks()
    if missing:
        return {}
    diversity = lpips_diversity(net, samples, everything[:count])
    return dict(lpips_diversity=diversity, fid=inception_distance(fid, samples, everything))
