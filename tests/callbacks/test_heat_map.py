"""The heat map: one value, one colour; every cell where it belongs; readable sizes for every shape."""

import numpy as np
import pytest

from moelm.callbacks.heat_map import LOW_COLOUR, NAN_COLOUR, draw_heat_map, heat_colours


def draw(values, **arguments):
    return draw_heat_map(np.asarray(values), **{"low": 0.0, "high": 2.0, "title": "load", **arguments})


def changed_box(before, after):
    """(top, left, bottom, right) of the pixels in which two images differ."""
    rows, columns = np.nonzero((before != after).any(axis=-1))
    return rows.min(), columns.min(), rows.max() + 1, columns.max() + 1


def distance(colour, other):
    return np.abs(np.asarray(colour, dtype=int) - np.asarray(other, dtype=int)).sum()


def test_a_value_has_the_same_colour_whatever_the_other_values():
    alone = heat_colours(np.array([0.4]), 0.0, 2.0)[0]
    for others in ([1.0], [64.0, -3.0], [np.nan, np.inf]):
        np.testing.assert_array_equal(heat_colours(np.array([0.4, *others]), 0.0, 2.0)[0], alone)


def test_dead_uniform_and_twice_loaded_experts_have_distinct_colours():
    dead, starving, uniform, twice = heat_colours(np.array([0.0, 0.02, 1.0, 2.0]), 0.0, 2.0)
    colours = [dead, starving, uniform, twice, NAN_COLOUR]
    for index, colour in enumerate(colours):
        for other in colours[:index]:
            assert distance(colour, other) > 150
    np.testing.assert_array_equal(dead, LOW_COLOUR)


def test_underload_is_blue_overload_is_red_and_balance_is_neutral():
    under, balanced, over = heat_colours(np.array([0.4, 1.0, 1.6]), 0.0, 2.0).astype(int)
    assert under[2] > under[0] + 50
    assert over[0] > over[2] + 50
    assert balanced.min() == balanced.max() > 230


def test_the_colour_moves_away_from_neutral_steadily_on_both_sides():
    ramp = heat_colours(np.linspace(0.01, 2.0, 200), 0.0, 2.0)
    lightness = ramp @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(lightness[:99]) >= -0.5).all()
    assert (np.diff(lightness[100:]) <= 0.5).all()


def test_values_beyond_the_scale_are_clipped_to_its_ends():
    colours = heat_colours(np.array([2.0, 64.0, np.inf, 0.0, -5.0, -np.inf]), 0.0, 2.0)
    assert (colours[:3] == colours[0]).all()
    assert (colours[3:] == LOW_COLOUR).all()


def test_the_scale_is_centred_between_low_and_high():
    np.testing.assert_array_equal(
        heat_colours(np.array([-0.6, 0.0, 0.5]), -1.0, 1.0), heat_colours(np.array([0.4, 1.0, 1.5]), 0.0, 2.0)
    )


def test_nan_is_grey():
    np.testing.assert_array_equal(heat_colours(np.array([[np.nan]]), 0.0, 2.0)[0, 0], NAN_COLOUR)
    uniform, with_nan = np.ones((48, 128)), np.ones((48, 128))
    with_nan[7, 9] = np.nan
    before, after = draw(uniform), draw(with_nan)
    top, left, bottom, right = changed_box(before, after)
    cell = after[top:bottom, left:right].astype(int)
    assert (cell.max(axis=-1) == cell.min(axis=-1)).all()
    assert (cell == NAN_COLOUR[0]).mean() > 0.5


@pytest.mark.parametrize("shape", [(4, 8), (48, 128), (61, 256)])
@pytest.mark.parametrize("value", [0.0, 2.0])
def test_a_value_changes_its_own_cell_and_nothing_else(shape, value):
    uniform = np.ones(shape)
    boxes = []
    for row, column in ((0, 0), (2, 5)):
        changed = uniform.copy()
        changed[row, column] = value
        before, after = draw(uniform), draw(changed)
        boxes.append(changed_box(before, after))
        top, left, bottom, right = boxes[-1]
        expected = heat_colours(np.array(value), 0.0, 2.0)
        assert (after[top:bottom, left:right] == expected).all(axis=-1).mean() > 0.7  # the rest: the number
    (top, left, bottom, right), (lower_top, lower_left, lower_bottom, lower_right) = boxes
    assert (lower_bottom - lower_top, lower_right - lower_left) == (bottom - top, right - left)
    row_pitch, column_pitch = (lower_top - top) / 2, (lower_left - left) / 5
    assert bottom - top <= row_pitch <= bottom - top + 2  # a gap of at most two pixels
    assert right - left <= column_pitch <= right - left + 2


@pytest.mark.parametrize(
    ("shape", "narrowest", "widest"),
    [
        ((1, 1), 300, 700),
        ((4, 8), 700, 900),
        ((48, 128), 1000, 1200),
        ((61, 256), 1000, 1200),
        ((1, 512), 1000, 1200),
        ((3, 1540), 1500, 1800),
    ],
)
def test_every_shape_gives_an_image_of_a_readable_size(shape, narrowest, widest):
    image = draw(np.ones(shape))
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3
    assert narrowest <= image.shape[1] <= widest
    assert 150 <= image.shape[0] <= 1000


def test_the_size_of_the_image_does_not_depend_on_the_values():
    collapsed = np.zeros((4, 8))
    collapsed[:, 0] = 123456.0
    collapsed[0] = np.nan
    assert draw(collapsed).shape == draw(np.ones((4, 8))).shape


def test_endless_texts_do_not_make_the_image_endless():
    image = draw(
        np.ones((2, 512)),
        title="t" * 1000,
        row_label="r" * 1000,
        column_label="expert",
        row_names=["n" * 1000, "m"],
        marks="d" * 1000,
    )
    assert image.shape[1] <= 1800


def test_title_labels_and_row_names_are_drawn():
    values = np.ones((4, 8))
    image = draw(values)
    for arguments in (
        {"title": "lead"},
        {"row_label": "depth"},
        {"column_label": "column"},
        {"row_names": ["3", "4", "5", "6"]},
    ):
        changed = draw(values, **arguments)
        assert changed.shape == image.shape
        assert (changed != image).any(), arguments


def test_the_number_stands_in_a_large_cell_and_not_in_a_small_one():
    def colours_of_the_change(shape):
        changed = np.ones(shape)
        changed[0, 0] = 1.5
        before, after = draw(np.ones(shape)), draw(changed)
        top, left, bottom, right = changed_box(before, after)
        return len(np.unique(after[top:bottom, left:right].reshape(-1, 3), axis=0))

    assert colours_of_the_change((4, 8)) > 2
    assert colours_of_the_change((48, 128)) == 1
    assert colours_of_the_change((100, 8)) == 1  # wide enough, not high enough


def test_the_input_is_not_modified():
    values = np.array([[0.0, np.nan, 64.0, 1.0]], dtype=np.float32)
    copy = values.copy()
    draw(values)
    heat_colours(values, 0.0, 2.0)
    np.testing.assert_array_equal(values, copy)


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        (np.ones(8), {}, "matrix"),
        (np.ones((0, 8)), {}, "non-empty"),
        (np.ones((4, 8)), {"low": 2.0}, "low < high"),
        (np.ones((4, 8)), {"row_names": ["1"]}, "4 row names"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_reason(values, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(values, **arguments)


def test_a_scale_around_zero_has_no_colour_apart_and_enough_digits():
    values = np.array([[-0.05, 0.0, 0.003, 0.05]])
    low, middle, *_ = heat_colours(values[0], -0.05, 0.05, low_apart=False)
    assert distance(low, LOW_COLOUR) > 150
    assert low[2] > low[0] + 50
    assert middle.min() == middle.max() > 230
    changed = np.array([[-0.05, 0.0, 0.004, 0.05]])
    before, after = (draw(np.tile(each, (4, 1)), low=-0.05, high=0.05, low_apart=False) for each in (values, changed))
    assert ((before.max(axis=-1) < 120) != (after.max(axis=-1) < 120)).any(), "the number in the cell must differ"


def test_groups_of_rows_are_set_apart():
    values = np.ones((6, 8))
    plain, grouped = draw(values), draw(values, group_rows=3)
    top, left, bottom, right = changed_box(draw(values, group_rows=6), grouped)
    assert bottom - top <= 3
    assert right - left > 600
    assert plain.shape[1] == grouped.shape[1]
