"""CIFAR-10, CIFAR-100 and Fashion-MNIST: torchvision's download, or a folder with an earlier download."""

from __future__ import annotations

import numpy as np
from PIL import Image

from lightcl.data.images import ImageSet, Source, SourceRequest
from lightcl.data.sources.decoding import resized
from lightcl.errors import RequestError, required
from lightcl.storage.files import cache_folder

CLASSES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion-mnist": "FashionMNIST"}
"""torchvision's class per source."""


def read_torchvision_set(request: SourceRequest) -> Source:
    """Both splits. Raises RequestError where the images are missing and cannot be downloaded."""
    kind = getattr(required("torchvision.datasets", "data", f"for data.source: {request.name}"), CLASSES[request.name])
    root = request.path or cache_folder() / "downloads"
    splits: list[ImageSet] = []
    for train in (True, False):
        try:
            data = kind(root, train=train, download=request.download)
        except (RuntimeError, OSError) as error:
            # torchvision's own text advises an argument of its Python classes.
            if request.download:
                said = str(error).replace(" You can use download=True to download it", "")
                why, first = f"the download failed: {said}", "set data.path to a folder that holds"
            else:
                why, first = "data.download is false", "set data.download=true, or data.path to a folder that holds"
            raise RequestError(
                f"data.source {request.name!r}: not found under {root} and not downloaded ({why}); {first} "
                "torchvision's copy, or use data.source=parquet with data.path for a local copy in parquet files"
            ) from error
        images = np.asarray(data.data)
        pictures = images if images.ndim == 4 else images[..., None]
        if request.image_size and request.image_size != pictures.shape[1]:
            small = np.stack([np.asarray(resized(Image.fromarray(p.squeeze()), request.image_size)) for p in pictures])
            pictures = small if small.ndim == 4 else small[..., None]
        splits.append(ImageSet(pictures, np.asarray(data.targets, dtype=np.int64), tuple(data.classes)))
    return Source(*splits)
