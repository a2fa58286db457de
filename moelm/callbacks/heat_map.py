"""A matrix (layers by experts) drawn on a fixed colour scale, so that steps and runs compare by eye."""

import math
from bisect import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Array = npt.NDArray[np.floating[Any]]
Pixels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

LOW_COLOUR: Colour = (16, 16, 20)  # at or below `low`: off the ramp, so that 0 and nearly 0 do not look alike
NAN_COLOUR: Colour = (150, 150, 150)
RAMP = np.array(  # ColorBrewer RdBu reversed, without its darkest ends: they would be confused with LOW_COLOUR
    [
        *((33, 102, 172), (67, 147, 195), (146, 197, 222), (209, 229, 240)),
        (247, 247, 247),
        *((253, 219, 199), (244, 165, 130), (214, 96, 77), (178, 24, 43)),
    ],
    dtype=np.float64,
)
INK: Colour = (40, 40, 40)
LINE: Colour = (170, 170, 170)
PAD = 16  # pixels around everything
MAX_TITLE_WIDTH = 1540


def heat_colours(values: Array, low: float, high: float, low_apart: bool = True) -> Pixels:
    """The colour of each value, uint8 [..., 3]: a function of that value alone, never of the others.

    Blue below the middle of [low, high], near-white at it, red above, the last red from `high` on; at or below `low`
    near-black, or without `low_apart` the first blue; grey for NaN.
    """
    position = (np.clip(values, low, high) - low) / (high - low) * (len(RAMP) - 1)
    channels = [np.interp(position, np.arange(len(RAMP)), RAMP[:, channel]) for channel in range(3)]
    colours: Pixels = np.nan_to_num(np.stack(channels, axis=-1)).round().astype(np.uint8)
    if low_apart:
        colours[values <= low] = LOW_COLOUR
    colours[np.isnan(values)] = NAN_COLOUR
    return colours


def draw_heat_map(
    values: Array,
    *,
    low: float,
    high: float,
    title: str,
    row_label: str = "layer",
    column_label: str = "expert",
    row_names: Sequence[str] | None = None,
    marks: str | None = None,
    low_apart: bool = True,
    no_data: str = "no data",
    group_rows: int = 0,
) -> Pixels:
    """An image uint8 [height, width, 3], as `SummaryWriter.add_image(dataformats="HWC")` takes it.

    `values` is [rows, columns]. The size depends on the shape and the texts alone; the width stays within
    1,800 pixels up to 1,540 columns. Numbers stand in the cells if all fit. `marks` says in the key what a
    value at or below `low` means ("dead"); without `low_apart` it is drawn as the first blue. `no_data` says what NaN
    means. A line is drawn after each `group_rows` rows. Texts should be ASCII: Pillow's own font has little else.
    Raises ValueError for an empty or not two-dimensional matrix, low >= high, or a wrong number of row names.
    """
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"a heat map needs a non-empty [rows, columns] matrix, got the shape {values.shape}")
    if not low < high:
        raise ValueError(f"a heat map needs low < high, got low={low} and high={high}")
    n_rows, n_columns = values.shape
    if row_names is not None and len(row_names) != n_rows:
        raise ValueError(f"{n_rows} rows need {n_rows} row names, got {len(row_names)}")

    tick_font, label_font, title_font = (ImageFont.load_default(size=size) for size in (14, 16, 21))
    names = [str(row) for row in range(n_rows)] if row_names is None else list(row_names)
    names = [_shortened(name, tick_font, 160) for name in names]
    cell_height, cell_width = _cell_size(n_rows, n_columns, 17 if group_rows else 12)
    grid = _coloured_cells(values, low, high, low_apart, cell_height, cell_width)
    grid_height, grid_width = grid.shape[:2]
    title = _shortened(title, title_font, MAX_TITLE_WIDTH)
    key = _key(low, high, marks, low_apart, no_data, tick_font)

    row_ticks_width = max(round(tick_font.getlength(name)) for name in names) + 8
    left = PAD + 30 + row_ticks_width
    width = max(left + grid_width + PAD, round(title_font.getlength(title)) + 2 * PAD, key.width + 2 * PAD)
    left += (width - left - grid_width - PAD) // 2  # a small grid under a long title stands in the middle
    top = PAD + 36
    bottom = top + grid_height
    canvas = Image.new("RGB", (width, bottom + 56 + key.height + PAD), "white")
    draw = ImageDraw.Draw(canvas)

    draw.text((width / 2, PAD + 12), title, INK, title_font, anchor="mm")
    draw.rectangle((left - 1, top - 1, left + grid_width, bottom), outline=LINE)
    canvas.paste(Image.fromarray(grid), (left, top))
    for row in range(0, n_rows, _tick_step(cell_height, 17)):
        y = top + row * cell_height + cell_height // 2
        draw.line((left - 5, y, left - 2, y), LINE)
        draw.text((left - 8, y), names[row], INK, tick_font, anchor="rm")
    for column in range(0, n_columns, _tick_step(cell_width, tick_font.getlength(str(n_columns)) + 14)):
        x = left + column * cell_width + cell_width // 2
        draw.line((x, bottom + 1, x, bottom + 4), LINE)
        draw.text((x, bottom + 14), str(column), INK, tick_font, anchor="mm")
    for row in range(group_rows, n_rows, group_rows) if group_rows else ():
        y = top + row * cell_height - 1
        draw.line((left - 8, y, left + grid_width, y), INK, 2)
    decimals = max(2, 1 - math.floor(math.log10(max(abs(low), abs(high)))))  # two digits of the largest
    _write_numbers(draw, values, grid, (left, top), tick_font, decimals)
    draw.text((left + grid_width / 2, bottom + 36), column_label, INK, label_font, anchor="mm")
    upright = _turned(_shortened(row_label, label_font, grid_height + 60), label_font)
    canvas.paste(upright, (left - row_ticks_width - 30, top + (grid_height - upright.height) // 2))
    canvas.paste(key, ((width - key.width) // 2, bottom + 56))
    return np.array(canvas, dtype=np.uint8)


def _cell_size(n_rows: int, n_columns: int, least_height: int) -> tuple[int, int]:
    """(height, width) in pixels: large for few cells, readable for many, and never more pixels than that needs, since
    a picture is made while training waits. Up to 60 rows are at least `least_height` high."""
    width = min(max(round(700 / n_columns), min(8, 1100 // n_columns)), 84)
    height = min(max(round(300 / n_rows), least_height if n_rows <= 60 else 6), 900 // n_rows, 56)
    return max(height, 1), max(width, 1)


def _coloured_cells(
    values: Array, low: float, high: float, low_apart: bool, cell_height: int, cell_width: int
) -> Pixels:
    """The grid alone, [rows * cell_height, columns * cell_width, 3]; NaN hatched, large cells set apart."""
    enlarged = heat_colours(values, low, high, low_apart).repeat(cell_height, axis=0).repeat(cell_width, axis=1)
    y, x = np.ogrid[: enlarged.shape[0], : enlarged.shape[1]]
    is_nan = np.isnan(values).repeat(cell_height, axis=0).repeat(cell_width, axis=1)
    enlarged[is_nan & ((y + x) % 8 < 2)] = (200, 200, 200)
    if min(cell_height, cell_width) >= 8:
        gap = 2 if min(cell_height, cell_width) >= 24 else 1
        enlarged[((y + 1) % cell_height < gap) | ((x + 1) % cell_width < gap)] = (222, 222, 222)
    return enlarged


def _write_numbers(
    draw: ImageDraw.ImageDraw, values: Array, grid: Pixels, corner: tuple[int, int], font: Font, decimals: int
) -> None:
    """Writes each value into its cell, black on light and white on dark, if the longest of them fits."""
    cell_height, cell_width = grid.shape[0] // values.shape[0], grid.shape[1] // values.shape[1]
    if cell_height < 20 or cell_width < 34:
        return
    texts = [[f"{value:.{decimals}f}" if abs(value) < 100 else f"{value:.3g}" for value in row] for row in values]
    longest = max((text for row in texts for text in row), key=len)
    if font.getlength(longest) > cell_width - 6:
        return
    for row, column in np.ndindex(*values.shape):
        if np.isnan(values[row, column]):
            continue
        x, y = column * cell_width + cell_width // 2, row * cell_height + cell_height // 2
        is_dark = float(grid[y, x] @ np.array([0.299, 0.587, 0.114])) < 140
        draw.text((corner[0] + x, corner[1] + y), texts[row][column], "white" if is_dark else INK, font, anchor="mm")


def _key(low: float, high: float, marks: str | None, low_apart: bool, no_data: str, font: Font) -> Image.Image:
    """One line: the swatch of `low` if it is apart, the ramp with its ends and middle named, the swatch of NaN."""
    low_text = _shortened(f"{low:g}" if marks is None else f"{low:g} ({marks})", font, 400)
    low_width = 26 + round(font.getlength(low_text)) + 40 if low_apart else 40
    ramp_width, ramp_left = 240, low_width
    nan_left = ramp_left + ramp_width + 40
    key = Image.new("RGB", (nan_left + 26 + round(font.getlength(no_data)), 40), "white")
    draw = ImageDraw.Draw(key)
    step = (high - low) / ramp_width
    shown = low + step * (0.5 + np.arange(ramp_width, dtype=np.float64))  # never `low` itself: it has its swatch
    swatches = [(ramp_left, shown, 1), (nan_left, np.array([np.nan]), 18)]
    if low_apart:
        swatches.append((0, np.array([low], dtype=np.float64), 18))
        draw.text((26, 9), low_text, INK, font, anchor="lm")
    for left, values, cell_width in swatches:
        swatch = _coloured_cells(values[None], low, high, low_apart, 18, cell_width)
        key.paste(Image.fromarray(swatch), (left, 0))
    draw.text((nan_left + 26, 9), no_data, INK, font, anchor="lm")
    for share, text in ((0.0, f"{low:g}"), (0.5, f"{(low + high) / 2:g}"), (1.0, f"{high:g}+")):
        x = ramp_left + round(share * (ramp_width - 1))
        draw.line((x, 18, x, 21), LINE)
        draw.text((x, 30), text, INK, font, anchor="mm")
    return key


def _tick_step(cell_size: int, needed: float) -> int:
    """The smallest power of two of cells that is at least `needed` pixels."""
    step = 1
    while step * cell_size < needed:
        step *= 2
    return step


def _shortened(text: str, font: Font, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    n_kept = bisect(range(len(text)), width, key=lambda n: font.getlength(text[:n] + "...")) - 1
    return text[: max(n_kept, 0)] + "..."


def _turned(text: str, font: Font) -> Image.Image:
    """The text as an image that reads from bottom to top, 24 pixels wide."""
    line = Image.new("RGB", (max(round(font.getlength(text)), 1) + 2, 24), "white")
    ImageDraw.Draw(line).text((1, 12), text, INK, font, anchor="lm")
    return line.rotate(90, expand=True)
