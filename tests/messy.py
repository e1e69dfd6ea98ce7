"""Folders of photos as people have them: every case at once that a reader of folders must get right.

``python tests/messy.py photos`` makes the folder that README.md shows.
"""

import os
import shutil
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from data_fixtures import save_image
from PIL import Image
from sklearn.datasets import load_digits

CAFE = "001.Caf\u00e9_noir"  # composed in training, and decomposed, as macOS writes it, for testing


@dataclass
class Messy:
    """What a messy folder holds.

    Attributes:
        root: to give as ``data.dataset``.
        said: class names in label order, as prompts say them.
        counts: images by part.
        left_out: files that are no images, by kind.
        copy: names of a test and a training image with the same bytes.
    """

    root: Path
    said: list[str]
    counts: dict[str, int]
    left_out: dict[str, int]
    copy: tuple[str, str]


def litter(folder: Path) -> None:
    """What systems and tools leave in a folder: copies of images among it."""
    image = next(each for each in sorted(folder.rglob("*")) if each.suffix.lower() == ".png")
    for made in (".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/b.png", "@eaDir/c.png", "more/.thumbnails/d.png"):
        (folder / made).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / made)
    shutil.copy(image, folder / "._e.png")
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini"):
        (folder / name).write_bytes(b"made by a tool")


def scans(root: Path) -> Path:
    """Makes a folder of scikit-learn's handwritten digits, not divided, as it looks after some years.

    Beside tools' leftovers, captions and a photo that kshot does not read there are a scan that was cut short in
    copying, copies within a class and across two, smaller ones in another compression, and one that a phone turned.
    """
    digits = load_digits()
    for number, (digit, word) in enumerate({3: "three", 5: "five", 8: "eight", 9: "nine"}.items(), 1):
        for i, values in enumerate(digits.images[digits.target == digit][:40]):
            image = Image.fromarray((values * 255 / 16).astype(np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
            file = root / f"{number:03}.{word}" / f"scan {i:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    three, five, eight, nine = sorted(root.iterdir())
    litter(nine)
    for i in range(12):
        with Image.open(three / f"scan {i:02}.png") as image:
            image.resize((48, 48)).save(three / f"scan {i:02} small.jpg", quality=90)
        shutil.copy(five / f"scan {i:02}.png", five / f"scan {i:02} (1).png")
    shutil.copy(three / "scan 20.png", eight / "which one.png")
    (eight / "half.png").write_bytes((eight / "scan 30.png").read_bytes()[:300])
    turned = Image.Exif()
    turned[0x0112] = 6
    with Image.open(nine / "scan 21.png") as image:
        image.transpose(Image.Transpose.ROTATE_90).save(nine / "scan 21 phone.jpg", exif=turned, quality=95)
    (eight / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (five / "notes.txt").write_text("five, mostly")
    return root


def messy(root: Path) -> Messy:
    """Makes ``root/photos``: an extra level, parts and classes in several spellings, odd files, links and copies."""
    inner = root / "photos" / "photos"
    train, test = inner / "01_Training", inner / "TEST"
    classes = [CAFE, "002.sea__lion", "003.Golden Retriever", "004.rare"]
    for number, name in enumerate(classes):
        for i in range(6):
            save_image(train / name / f"photo {i}.png", seed=100 * number + i)
    for number, name in enumerate((unicodedata.normalize("NFD", CAFE), "002.Sea_Lion", classes[2])):  # none for rare
        for i in range(4):
            save_image(test / name / "day 1" / f"фото-{i}.PNG", seed=1000 + 100 * number + i)
    litter(train / CAFE)
    litter(inner)

    lions = train / classes[1]
    noise = np.random.default_rng(7).integers(0, 256, (14, 20, 4), dtype=np.uint8)
    Image.fromarray(noise[..., :3]).save(lions / "scan.jfif", "JPEG")
    Image.fromarray(noise[..., :3]).save(lions / "no_suffix", "JPEG")
    Image.fromarray(noise[..., :3]).save(lions / "WHY.JPG", "JPEG")
    Image.fromarray(noise, "RGBA").save(lions / "clear.png")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 16).save(lions / "twelve_bits.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(noise[..., :3]).save(lions / "turned.jpg", exif=turned)
    Image.fromarray(noise[:10, ..., :3].repeat(40, 1)).save(lions / "wide.jpg")
    (lions / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    for i in range(2):
        (lions / f"caption{i}.txt").write_text("BM a picture of a sea lion")
    (lions / "gone.png").symlink_to("nowhere.png")
    (lions / "around").symlink_to(inner)

    elsewhere = save_image(root / "elsewhere" / "linked.png", seed=9).parent
    (train / classes[2] / "linked").symlink_to(elsewhere)
    (train / classes[2] / "again.png").symlink_to(save_image(root / "store" / "x.png", seed=10))
    save_image(inner / "loose.png", seed=11)
    (inner / "README.md").write_text("my photos")
    shutil.copy(train / CAFE / "photo 0.png", test / "002.Sea_Lion" / "a copy.png")
    os.utime(test)
    return Messy(
        root=root / "photos",
        said=["Café noir", "sea  lion", "Golden Retriever", "rare"],
        counts={"train": 24 + 7 + 2, "val": 0, "test": 13},
        left_out={".heic": 1, ".txt": 2, "broken links": 1, "links to folders around them": 1, ".md": 1},
        copy=("a copy.png", "photo 0.png"),
    )


if __name__ == "__main__":
    scans(Path(sys.argv[1]))
