"""One image: its modes and orientation, other sizes, what a model reads of it, and the processor of a Hugging Face folder."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fmjax.data.kinds import image as image_kind
from fmjax.data.kinds import pixels
from fmjax.data.kinds.preprocessor_config import PROCESSOR
from fmjax.data.kinds.preprocessor_config import read as read_processor
from fmjax.errors import UserError

RNG = np.random.default_rng(0)
GREYS = RNG.integers(0, 256, (6, 4, 5), np.uint8)
COLOURS = RNG.integers(0, 256, (6, 4, 5, 3), np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    """Returns an image as the bytes of a file."""
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def refused(call: Callable, *args, match: str) -> None:
    """Checks that a call raises a UserError of one line that says so."""
    with pytest.raises(UserError, match=match) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


RED, GREEN = (200, 0, 0), (0, 200, 0)
ALPHA = np.dstack([COLOURS[0], GREYS[0]])
# Pillow's mode -> an image, and what it is read as.
MODES = {
    "L": (Image.fromarray(GREYS[0]), GREYS[0][..., None]),
    "1": (Image.fromarray(GREYS[0] > 127), np.where(GREYS[0] > 127, 255, 0)[..., None]),
    "LA": (Image.fromarray(np.dstack([GREYS[0], GREYS[1]]), "LA"), GREYS[0][..., None]),
    "RGB": (Image.fromarray(COLOURS[0]), COLOURS[0]),
    "RGBA": (Image.fromarray(ALPHA), COLOURS[0]),
    "P": (Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)), np.array([[RED, GREEN], [GREEN, RED]])),
    "CMYK": (Image.new("CMYK", (2, 1), (0, 255, 255, 0)), np.array([[(255, 0, 0)] * 2])),
}
MODES["P"][0].putpalette([*RED, *GREEN])


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    image, expected = MODES[mode]
    assert image.mode == mode
    found = [pixels.load(image, "here")]
    found += [pixels.decode(encoded(image, "TIFF" if mode == "CMYK" else "PNG"), "here")]
    assert all(array.dtype == np.uint8 and np.array_equal(array, expected) for array in found)


# EXIF's orientation -> what is stored of an image as it was taken (EXIF 2.3, 4.6.4: where row 0 and column 0 belong).
ORIENTATIONS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda image: image,  # top, left
    2: lambda image: image[:, ::-1],  # top, right
    3: lambda image: image[::-1, ::-1],  # bottom, right
    4: lambda image: image[::-1],  # bottom, left
    5: lambda image: image.swapaxes(0, 1),  # left, top
    6: lambda image: image.swapaxes(0, 1)[::-1],  # right, top
    7: lambda image: image.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda image: image.swapaxes(0, 1)[:, ::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_photographs_stand_as_they_were_taken(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(ORIENTATIONS[orientation](COLOURS[0]))
    assert np.array_equal(pixels.decode(encoded(stored, exif=exif), "here"), COLOURS[0])


def test_exif_that_cannot_be_read_changes_nothing():
    content = encoded(COLOURS[0], "JPEG", exif=b"Exif\0\0 no head of a TIFF")
    assert np.array_equal(pixels.decode(content, "here"), np.asarray(Image.open(io.BytesIO(content))))


def test_what_an_image_may_be_given_as(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(COLOURS[0]))
    for given in (path, str(path), Image.open(path), COLOURS[0]):
        assert np.array_equal(pixels.load(given, "here"), COLOURS[0])
    assert pixels.load(GREYS[0], "here").shape == (4, 5, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("/nowhere/a.png", 'line 3: "/nowhere/a.png" cannot be read .No such file'),
        ("", 'line 3: "" cannot be read'),
        ("a\0b", 'line 3: "a\0b" cannot be read .embedded null byte'),
        (None, "line 3: None is not an image; give the path of a file"),
        ([1, 2], r"line 3: \[1, 2\] is not an image"),
        (COLOURS[0] / 255, r"line 3: float64 \(4, 5, 3\) is not an image"),
        (COLOURS, r"line 3: uint8 \(6, 4, 5, 3\) is not an image"),
        (COLOURS[:, :0], r"line 3: uint8 \(6, 0, 5, 3\) is not"),
        (Image.new("F", (2, 2)), r"line 3: has more than 8 bits per channel \(mode F\)"),
        (Image.open(io.BytesIO(encoded(COLOURS[0], "JPEG")[:-40])), r"line 3: is not a complete image \(image file is truncated"),
    ],
    ids=["missing", "empty", "nul", "none", "list", "floats", "four axes", "no width", "mode F", "truncated"],
)
def test_what_is_no_image(given, message):
    refused(pixels.load, given, "line 3", match=message)


def test_channels():
    assert np.array_equal(pixels.with_channels(GREYS[0][..., None], 3, "here"), np.dstack([GREYS[0]] * 3))
    grey = pixels.with_channels(COLOURS[0], 1, "here")
    assert grey.shape == (4, 5, 1) and np.abs(grey[..., 0] - COLOURS[0] @ [0.299, 0.587, 0.114]).max() < 1  # ITU-R 601
    colours = COLOURS[0]
    assert pixels.with_channels(colours, 3, "here") is colours
    refused(pixels.with_channels, ALPHA, 3, "line 3", match="line 3: has 4 channels, which cannot be converted to 3")


@pytest.mark.parametrize("channels", [1, 3])
def test_other_sizes(channels):
    image = np.dstack([np.arange(8, dtype=np.uint8).reshape(2, 4) * 8] * channels)
    means = image.reshape(1, 2, 2, 2, channels).mean(axis=(1, 3))
    assert np.array_equal(pixels.resize(image, 1, 2, "box"), means)  # 20, 36
    assert np.array_equal(pixels.resize(image, 4, 8, "nearest"), image.repeat(2, axis=0).repeat(2, axis=1))
    # Half the size by hand: a triangle over four pixels, without what lies outside.
    weights = np.array([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7
    wide = np.repeat(image, 2, axis=0)
    found = pixels.resize(wide, 4, 2, "bilinear").astype(int)
    assert found.shape == (4, 2, channels) and np.abs(found - np.einsum("ow,hwc->hoc", weights, wide)).max() <= 0.5
    assert pixels.resize(image, 2, 4, "lanczos") is image
    for how, resampling in pixels.RESAMPLINGS.items():
        for channel in range(channels):
            theirs = np.asarray(Image.fromarray(image[..., channel]).resize((5, 3), resampling))
            assert np.array_equal(pixels.resize(image, 3, 5, how)[..., channel], theirs)


def test_the_middle():
    image = np.arange(1, 21, dtype=np.uint8).reshape(4, 5, 1)
    assert pixels.center(image, 2, 2)[..., 0].tolist() == [[7, 8], [12, 13]]
    assert pixels.center(image, 3, 3)[..., 0].tolist() == [[2, 3, 4], [7, 8, 9], [12, 13, 14]]
    padded = pixels.center(image[:1, :2], 3, 3)[..., 0]
    assert padded.tolist() == [[0, 0, 0], [0, 1, 2], [0, 0, 0]]


def test_normalising():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)
    found = pixels.normalized(COLOURS, mean, std)
    assert found.dtype == np.float32 and np.abs(found - (COLOURS / 255.0 - mean) / std).max() < 1e-6
    every = pixels.normalized(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), (0.5,), (0.5,))
    assert every.min() == -1 and every.max() == 1


# What transformers 5.24's ViTImageProcessorPil makes of PHOTOGRAPH: the first pixel, the last, and the mean of each channel.
PHOTOGRAPH = np.fromfunction(lambda y, x, c: (37 * y + 91 * x + 53 * c + 7 * x * y) % 256, (7, 10, 3)).astype(np.uint8)
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
FOUR = {"height": 4, "width": 4}
PROCESSORS = {
    "square": (
        {"size": FOUR},
        [-0.22353, -0.00392, 0.13725, -0.2549, 0.0902, 0.0902, 0.00735, 0.02157, 0.02941],
    ),
    "cropped": (
        {"size": {"height": 6, "width": 6}, "do_center_crop": True, "crop_size": FOUR, "resample": 3} | CLIP,
        [0.4559, -0.28134, 0.58169, -0.08425, 0.22893, -0.18619, 0.09367, 0.19516, 0.30795],
    ),
    "shortest edge": (
        {"size": {"shortest_edge": 5}, "do_center_crop": True, "crop_size": FOUR, "resample": 1},
        [0.37255, 0.30196, -0.05098, 0.01961, -0.08235, -0.10588, -0.01569, 0.08382, -0.0201],
    ),
    "not normalised": (
        {"size": FOUR, "do_normalize": False, "resample": 0},
        [0.35686, 0.56471, 0.77255, 0.02353, 0.23137, 0.43922, 0.46667, 0.48627, 0.56863],
    ),
    "larger": (
        {"size": {"height": 9, "width": 9}, "resample": 3, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 0.2]},
        [-0.16863, 0.09412, 0.7549, 0.80392, 2.03922, 3.12745, 0.80954, 1.24464, 1.09598],
    ),
}


def processor(folder: Path, content: object) -> dict:
    (folder / PROCESSOR).write_text(json.dumps(content))
    return read_processor(folder, 4, 3)


def made(settings: dict) -> np.ndarray:
    return image_kind.Processor.of(settings).arrays([PHOTOGRAPH], str)["images"]


@pytest.mark.parametrize("case", PROCESSORS)
def test_processors_make_the_numbers_of_the_reference_and_come_back(case, tmp_path):
    content, expected = PROCESSORS[case]
    settings = processor(tmp_path, content)
    [array] = made(settings)
    assert np.abs(np.concatenate([array[0, 0], array[-1, -1], array.mean(axis=(0, 1))]) - expected).max() < 2e-5
    image_kind.Processor.of(settings).save(tmp_path)
    assert np.array_equal(made(read_processor(tmp_path, 99, 3)), array[None])
    written = json.loads((tmp_path / PROCESSOR).read_text())
    assert {name: written[name] for name in content if name != "do_normalize"} == {
        name: value for name, value in content.items() if name != "do_normalize"
    }


def test_what_a_processor_does_not_say(tmp_path):
    usual = {"image_size": 4, "resize_size": 0, "fit": "stretch", "resize": "bilinear", "channels": 3}
    usual |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert read_processor(tmp_path, 4, 3) == usual == processor(tmp_path, {})
    named = {"image_processor_type": "ViTImageProcessor", "do_convert_rgb": None, "crop_size": None, "size": 4, "crop_pct": None}
    assert processor(tmp_path, named | {"default_to_square": True, "do_center_crop": False, "do_pad": False}) == usual
    old = {"size": 5, "default_to_square": False, "do_center_crop": True, "crop_size": 4, "image_mean": 0.1}
    assert processor(tmp_path, old) == usual | {"resize_size": 5, "fit": "shortest", "mean": (0.1,)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"crop_pct": 0.9}, "crop_pct=0.9 is not supported; remove it if it has no effect"),
        ({"do_resize": False}, "do_resize=false is not supported, only true is"),
        ({"do_rescale": False}, "do_rescale=false is not supported"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor=0.00784.* is not supported, only 0.0039"),
        ({"rescale_factor": "1/255"}, 'rescale_factor="1/255" is not supported'),
        ({"resample": 9}, "resample=9 is not one of 0, 2, 3, 1, 4, 5"),
        ({"resample": [2]}, r"resample=\[2\] is not one of"),
        (
            {"size": {"height": 4, "width": 5}, "do_center_crop": True},
            'size={"height": 4, "width": 5} is not supported, only a square or a shortest_edge',
        ),
        ({"size": FOUR, "do_pad": True, "pad_size": FOUR}, "do_pad=true is not supported with size="),
        ({"size": {"longest_edge": 4}}, 'size={"longest_edge": 4} is not supported'),
        ({"size": {"height": "4", "width": "4"}}, "size=.* is not supported"),
        ({"size": {"shortest_edge": 0}}, "size=.* is not supported"),
        ({"size": 4.5}, "size=4.5 is not supported"),
        ({"size": {"shortest_edge": 4}}, "an image of size=.* is smaller than the crop of 4"),
        ({"size": FOUR, "do_center_crop": True, "crop_size": 5}, "an image of size=.* is smaller than the crop of 5"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean=\[0.5, 0.5\] does not have one number for each of 3 channels"),
        ({"image_mean": ["0.5"] * 3}, "image_mean=.* does not have one number"),
        ({"image_std": [0.5, 0.5, 0]}, r"image_std=\[0.5, 0.5, 0\] does not have one number"),
        (["size"], "contains a JSON list, not an object"),
    ],
    ids=str,
)
def test_processors_that_are_not_handled(tmp_path, content, message):
    refused(processor, tmp_path, content, match=f"{tmp_path / PROCESSOR}: {message}")
