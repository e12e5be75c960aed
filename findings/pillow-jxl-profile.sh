#!/usr/bin/env bash
# pillow-jxl-plugin saves pictures without their colour profile, and reads them back as sRGB.
#
# With a wide-gamut picture one hands its profile to save, image.save(..., icc_profile=profile), as
# Pillow's JPEG, PNG, WebP and TIFF writers want it (PNG and TIFF take it from the picture
# themselves). The plugin reads profiles, and writes EXIF and XMP. One would guess that it writes
# the profile as well, or raises.
#
# What happens: _save (pillow_jxl/JpegXLImagePlugin.py) does not look at icc_profile, given or in
# the picture's info, and the encoder has no parameter for it; use_original_profile=True changes
# nothing. The file says sRGB: the same numbers, which now mean other colours. A data set converted
# to lossless JPEG XL has its Display P3 and Adobe RGB pictures turned pale for good, because
# nothing in the file tells of it. No warning.
#
# Exits with 1 if the profile comes back, or the other formats lose it.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 pillow-jxl-plugin==1.3.8
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import io
import sys
from importlib.metadata import version

import pillow_jxl  # noqa: F401 (registers the format)
from PIL import Image, ImageCms

print(*(f"{name} {version(name)}" for name in ("pillow-jxl-plugin", "pillow")))
SRGB = ImageCms.createProfile("sRGB")


def swapped():
    """A profile whose first channel is green and second is red: any mistake is plain to see."""
    data = bytearray(ImageCms.ImageCmsProfile(SRGB).tobytes())
    places = {}
    for i in range(int.from_bytes(data[128:132], "big")):
        entry = 132 + 12 * i  # tag, offset, length
        places[bytes(data[entry : entry + 4])] = entry
    red, green = (places[tag] + 4 for tag in (b"rXYZ", b"gXYZ"))
    data[red : red + 8], data[green : green + 8] = data[green : green + 8], data[red : red + 8]
    return bytes(data)


def shown(image):
    """The colour of the first pixel in sRGB."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    return ImageCms.profileToProfile(image, source, SRGB, outputMode="RGB").getpixel((0, 0))


profile = swapped()
image = Image.new("RGB", (16, 16), (250, 20, 20))
image.info["icc_profile"] = profile
print(f"the picture: {image.getpixel((0, 0))}, which means {shown(image)} in sRGB")
kept = {}
for name, options in (
    ("PNG", {}),
    ("TIFF", {}),
    ("WEBP", {"lossless": True}),
    ("JPEG", {"quality": 100, "subsampling": 0}),
    ("JXL", {"lossless": True}),
    ("JXL", {"lossless": True, "use_original_profile": True}),
):
    file = io.BytesIO()
    image.save(file, name, icc_profile=profile, **options)
    back = Image.open(file)
    back.load()
    kept.setdefault(name, set()).add(back.info.get("icc_profile") == profile)
    print(f"{name} {options}: {back.getpixel((0, 0))}, means {shown(back)}")
as_described = kept.pop("JXL") == {False} and all(value == {True} for value in kept.values())
sys.exit(0 if as_described else 1)
PYTHON
