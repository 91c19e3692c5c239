"""A small data set in the layout of Flickr8k: coloured shapes, each with five captions that describe it."""

import csv
import itertools
import random

from PIL import Image, ImageDraw

COLORS = ("red", "green", "blue", "yellow", "white", "black", "purple", "orange")
SHAPES = ("circle", "square", "triangle")
GROUNDS = ("gray", "brown", "pink", "navy")
TEMPLATES = (
    "A {color} {shape} on a {ground} ground, seen from above .",
    "One {shape}, {color}, lies on {ground} .",
    'The sign says "{color} {shape}" on {ground} paper .',
    "There is a {color} {shape} against a {ground} wall .",
    "A {ground} picture with a {color} {shape} in it",
)


def draw(color, shape, ground, rng, size=48):
    """An image of one shape at a random place."""
    image = Image.new("RGB", (size, size), ground)
    pen = ImageDraw.Draw(image)
    side = rng.randint(20, 30)
    x, y = rng.randint(0, size - side), rng.randint(0, size - side)
    box = (x, y, x + side, y + side)
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    else:
        pen.polygon([(x, y + side), (x + side, y + side), (x + side // 2, y)], fill=color)
    return image


def make_flickr8k(folder, num_images=320, seed=0):
    """Write Images/ and captions.txt for `num_images` images into `folder` and return it."""
    rng = random.Random(seed)
    kinds = list(itertools.product(COLORS, SHAPES, GROUNDS))
    (folder / "Images").mkdir(parents=True)
    with open(folder / "captions.txt", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for i in range(num_images):
            color, shape, ground = rng.choice(kinds)
            draw(color, shape, ground, rng).save(folder / "Images" / f"{i:05d}.jpg", quality=95)
            for template in TEMPLATES:
                writer.writerow([f"{i:05d}.jpg", template.format(color=color, shape=shape, ground=ground)])
    return folder
