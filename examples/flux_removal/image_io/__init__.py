"""Read images and masks of any kind as one kind, and write images with what their files held.

- `reading` makes upright 8-bit sRGB of an image file; `mask_reading` makes 0 and 1 of a mask.
- `writing` checks where an image goes, and writes it with profile, EXIF data and transparency.
- `padding` pads an image and its mask alike.
- `options` holds the options of a command line, for training and removal alike.
"""
