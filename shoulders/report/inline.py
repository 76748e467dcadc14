"""Pictures as data URIs, which are part of the page."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image as Pillow

from shoulders.report.markup import Image


def jpeg(image: Pillow.Image, alt: str, side: int) -> Image:
    """A picture as JPEG, shrunk to at most ``side`` px."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    return _inline(small, alt, "JPEG", quality=82)


def png(image: Pillow.Image, alt: str) -> Image:
    """A picture as PNG, without loss; for small pictures."""
    return _inline(image, alt, "PNG", optimize=True)


def _inline(image: Pillow.Image, alt: str, form: str, **settings: Any) -> Image:
    data = io.BytesIO()
    image.save(data, form, **settings)
    code = base64.b64encode(data.getvalue()).decode()
    return Image(f"data:image/{form.lower()};base64,{code}", alt, image.size)
