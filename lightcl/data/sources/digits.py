"""scikit-learn's bundled handwritten digits (UCI; 1,797 images of 8x8 pixels)."""

from __future__ import annotations

import numpy as np
from PIL import Image

from lightcl.data.images import ImageSet, Source, SourceRequest, split_off_test
from lightcl.data.sources.decoding import resized
from lightcl.errors import required


def read_digits(request: SourceRequest) -> Source:
    """The digits, their values 0..16 scaled to 0..255."""
    bunch = required("sklearn.datasets", "data", f"for data.source: {request.name}").load_digits()
    scaled = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    size = request.image_size or 8
    pictures = np.stack([np.asarray(resized(Image.fromarray(image), size)) for image in scaled])
    everything = ImageSet(pictures[..., None], bunch.target.astype(np.int64), tuple(str(i) for i in range(10)))
    return split_off_test(everything, request.test_fraction, request.seed)
