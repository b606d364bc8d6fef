"""What the stage of 2-D images offers."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from scangraph.contracts import Component, ImageFormat, Port

VERSION = "1.0.0"
Resampling = Literal["nearest", "bilinear", "bicubic", "lanczos", "area"]
Filter = Literal["gaussian", "median", "sharpen", "edge", "clahe", "grayscale", "invert"]


class _Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ResizeParameters(_Parameters):
    """Parameters of `image/resize`."""

    width: int | None = Field(None, ge=1, le=65535, description="pixels; unset: as the height and the aspect say")
    height: int | None = Field(None, ge=1, le=65535, description="pixels; unset: as the width and the aspect say")
    keep_aspect: bool = Field(True, description="fit into width and height; unset, both are taken as they are")
    filter: Resampling = Field(
        "area", description="area is the mean of what a pixel covers (and bilinear where it enlarges); all but nearest smooth"
    )
    enlarge: bool = Field(True, description="an image that is smaller may become larger; unset, it stays as it is")

    @model_validator(mode="after")
    def _has_a_size(self) -> Self:
        if self.width is None and self.height is None:
            raise ValueError("give width, height, or both")
        return self


class FilterParameters(_Parameters):
    """Parameters of `image/filter`."""

    filter: Filter = Field(description="what is done; colours are filtered one by one, alpha stays as it is")
    sigma: float = Field(1.5, gt=0, le=100, description="gaussian, sharpen: standard deviation in pixels")
    radius: int = Field(1, ge=1, le=50, description="median: the window has 2 radius + 1 pixels a side; 2 at most for 16 bits")
    amount: float = Field(1.0, gt=0, le=10, description="sharpen: how often the difference to the blurred image is added")
    clip: float = Field(2.0, gt=0, le=100, description="clahe: contrast is raised so many times at most")
    tiles: int = Field(8, ge=1, le=64, description="clahe: tiles a side")


class ConvertParameters(_Parameters):
    """Parameters of `image/convert`."""

    format: ImageFormat = Field("png", description="of the file")
    quality: int = Field(90, ge=1, le=100, description="of JPEG, and of WebP that is not lossless")
    lossless: bool = Field(False, description="of WebP")
    bits: Literal[8, 16] | None = Field(
        None, description="of a value; unset: as the image has, and 8 where the format has no 16"
    )


class DetectParameters(_Parameters):
    """Parameters of `image/detect`."""

    model: str | None = Field(
        None, description="id of an installed detector; unset: the first, real ones before demonstrations"
    )
    confidence: float = Field(0.25, ge=0.001, le=1, description="what is less certain is left out")
    iou: float = Field(
        0.45, gt=0, le=1, description="of two boxes of one class that overlap more, the less certain is left out"
    )
    classes: tuple[str, ...] | None = Field(None, min_length=1, description="names of what is wanted; unset: all")
    max_boxes: int = Field(300, ge=1, le=10000, description="boxes a page at most, the most certain")
    draw: bool = Field(True, description="draw the boxes; unset, the image stays as it is")


def _image(text: str) -> Port:
    return Port(name="image", kind="image2d", description=text)


RESIZE = Component(
    id="image/resize",
    version=VERSION,
    title="Resize an image",
    description="Makes every page of a 2-D image smaller or larger; 8 bits stay 8 bits, 16 stay 16.",
    deployment="imaging",
    inputs=(_image("JPEG, PNG, TIFF or WebP"),),
    outputs=(_image("in the format that it came in"),),
    parameters=ResizeParameters,
)
FILTER = Component(
    id="image/filter",
    version=VERSION,
    title="Filter an image",
    description="Smooths, sharpens, finds edges, evens out contrast (CLAHE), makes grey or inverts every page of a 2-D image.",
    deployment="imaging",
    inputs=(_image("JPEG, PNG, TIFF or WebP"),),
    outputs=(_image("in the format that it came in"),),
    parameters=FilterParameters,
)
CONVERT = Component(
    id="image/convert",
    version=VERSION,
    title="Convert an image",
    description="Gives a 2-D image another file format or depth. PNG and TIFF lose nothing.",
    deployment="imaging",
    inputs=(_image("JPEG, PNG, TIFF or WebP"),),
    outputs=(_image("in the wanted format; where that has one page, a file for each"),),
    parameters=ConvertParameters,
    constraints=("JPEG has no alpha: what is transparent becomes white.", "JPEG and WebP have 8 bits."),
)
DETECT = Component(
    id="image/detect",
    version=VERSION,
    title="Detect objects",
    description="Finds objects in every page of a 2-D image by a YOLO network (ONNX); gives boxes, and draws them.",
    deployment="imaging",
    inputs=(_image("JPEG, PNG, TIFF or WebP"),),
    outputs=(
        _image("with the boxes drawn"),
        Port(name="boxes", kind="report", description="JSON: class, confidence and box in the image's pixels, page by page"),
    ),
    parameters=DetectParameters,
    uses_models=True,
)

COMPONENTS = (RESIZE, FILTER, CONVERT, DETECT)
