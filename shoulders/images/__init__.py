"""Images: sources (folders, parquet files, tar shards), decoding, views, batches."""

from shoulders.images.decode import MAX_PIXELS, Undecodable, decode, decode_with_size
from shoulders.images.image_set import Collection, ImageSet
from shoulders.images.loader import batches, evaluation_batches, listed_batches
from shoulders.images.skips import SkipReport
from shoulders.images.source import ImageSource, image_id
from shoulders.images.sources import call_source, open_images, open_source
from shoulders.images.views import (
    WHOLE_IMAGE,
    View,
    central_view,
    longest_side,
    min_decode_side,
    random_view,
    render,
)

__all__ = [
    "MAX_PIXELS",
    "WHOLE_IMAGE",
    "Collection",
    "ImageSet",
    "ImageSource",
    "SkipReport",
    "Undecodable",
    "View",
    "batches",
    "call_source",
    "central_view",
    "decode",
    "decode_with_size",
    "evaluation_batches",
    "image_id",
    "listed_batches",
    "longest_side",
    "open_images",
    "open_source",
    "random_view",
    "render",
    "min_decode_side",
]
