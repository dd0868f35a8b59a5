"""The kind of images: from any value to the model's numbers, sizes found in the data, rectangles, padding and its mask."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from support.sources import MemoryRecords

from fmjax.contracts import Column
from fmjax.data.kinds import image
from fmjax.data.kinds.preprocessor_config import PROCESSOR
from fmjax.errors import RecordError, UserError

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (6, 8, 3), np.uint8)
SETTINGS = {
    "image_size": 0, "channels": 0, "resize_size": 0, "resize": "bilinear", "fit": "stretch", "mean": (0.5,), "std": (0.5,)
}  # fmt: skip


def bytes_of(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def columns(*pictures: object) -> list[Column]:
    return [Column(MemoryRecords({"image": picture} for picture in pictures), "image")]


def test_bytes_paths_and_arrays_are_one_image(tmp_path):
    processor = image.Processor(image_size=(6, 8))
    (tmp_path / "a.png").write_bytes(bytes_of(PICTURE))
    values = [PICTURE, bytes_of(PICTURE), str(tmp_path / "a.png"), tmp_path / "a.png", Image.fromarray(PICTURE)]
    assert all(np.array_equal(processor.load(value, "here"), PICTURE) for value in values)
    batch = processor.arrays(values, str)
    assert set(batch) == {"images"} and batch["images"].shape == (5, 6, 8, 3)
    np.testing.assert_allclose(batch["images"][1], PICTURE / np.float32(127.5) - 1, atol=1e-6)
    with pytest.raises(RecordError, match="here: is not a complete image"):
        processor.load(bytes_of(PICTURE)[:-30], "here")


def test_sizes_are_found_in_the_data():
    square = PICTURE[:, :6]
    fitted = image.Processor.fit(columns(square, bytes_of(square)), SETTINGS)
    assert fitted.image_size == (6, 6) and fitted.sizes() == {"image_size": 6, "channels": 3} and fitted.unit == "images"
    assert image.Processor.fit([], SETTINGS | {"image_size": 4, "channels": 1}).sizes() == {"image_size": 4, "channels": 1}
    with pytest.raises(RecordError, match="line 2: is 6 x 8 pixels, but line 1 is 6 x 6; resize all of them"):
        image.Processor.fit(columns(square, PICTURE), SETTINGS)
    with pytest.raises(RecordError, match="line 2: has 1 channels, but line 1 has 3"):
        image.Processor.fit(columns(square, square[..., 0]), SETTINGS | {"image_size": 3})
    with pytest.raises(UserError, match="line 1: is 6 x 8 pixels, not square; set task.image_size"):
        image.Processor.fit(columns(PICTURE), SETTINGS)


def test_rectangles():
    processor = image.Processor.of(SETTINGS | {"image_size": (4, 10), "channels": 3})
    assert processor.image_size == (4, 10) and processor.sizes() == {"channels": 3}
    expected = np.asarray(Image.fromarray(PICTURE).resize((10, 4), Image.Resampling.BILINEAR))
    assert np.array_equal(processor.resized(PICTURE, "here"), expected)
    assert processor.arrays([PICTURE], str)["images"].shape == (1, 4, 10, 3)
    for wrong in ({"fit": "shortest"}, {"resize_size": 12}):
        with pytest.raises(UserError, match=r"task.image_size=\(4, 10\): only square crops are supported"):
            image.Processor.of(SETTINGS | {"image_size": (4, 10), "channels": 3} | wrong)


@pytest.mark.parametrize(("size", "inner"), [((12, 12), (9, 12)), ((6, 20), (6, 8)), ((3, 4), (3, 4)), ((2, 9), (2, 2))])
def test_images_fit_into_a_canvas_and_a_mask_says_where_they_are(size, inner):
    processor = image.Processor(image_size=size, fitting="pad", mean=(0.1, 0.2, 0.3), std=(0.5,))
    other = RNG.integers(0, 256, (5, 5, 3), np.uint8)
    batch = processor.arrays([PICTURE, other], str)
    assert batch["images"].shape == (2, *size, 3) and batch["images"].dtype == np.float32
    mask = batch["pixel_mask"]
    assert mask.shape == (2, *size) and mask.dtype == np.int32
    assert mask[0].sum() == inner[0] * inner[1] and mask[0, : inner[0], : inner[1]].all()
    expected = processor.normalized(np.asarray(Image.fromarray(PICTURE).resize(inner[::-1], Image.Resampling.BILINEAR)))
    np.testing.assert_array_equal(batch["images"][0, : inner[0], : inner[1]], expected)
    assert not batch["images"][mask == 0].any()
    side = min(size)
    assert mask[1].sum() == side * side


PROCESSORS = {
    "square": image.Processor(image_size=(8, 8), resample="bicubic", mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2)),
    "cut": image.Processor(image_size=(8, 8), resize_size=9, fitting="shortest", mean=(0.5,) * 3, std=(0.5,) * 3),
    "grey": image.Processor(image_size=(8, 8), channels=1),
    "rectangle": image.Processor(image_size=(8, 6), mean=(0.5,) * 3, std=(0.5,) * 3),
    "padded": image.Processor(image_size=(8, 6), fitting="pad", mean=(0.5,) * 3, std=(0.5,) * 3),
    "plain": image.Processor(image_size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_processors_are_stored_and_restored(case, tmp_path):
    processor = PROCESSORS[case]
    processor.save(tmp_path / "new")
    restored = image.Processor.restore(tmp_path / "new")
    assert restored == processor and restored.sha256 == processor.sha256
    assert image.Processor.of(json.loads(json.dumps(processor.settings()))).sha256 == processor.sha256
    assert len({one.sha256 for one in PROCESSORS.values()}) == len(PROCESSORS)
    with pytest.raises(UserError, match=f"{PROCESSOR}: no such file; restore it"):
        image.Processor.restore(tmp_path)
