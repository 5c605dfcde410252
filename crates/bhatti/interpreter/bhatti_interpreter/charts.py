"""What a figure of matplotlib depicts, in the form that E2B's packages read."""

import re

# A unit at the end of an axis's label, as in `Time (s)`.
UNIT = re.compile(r"\(([^()]*)\)\s*$")

# Relative difference of positions that are the same.
TOLERANCE = 1e-6


def chart_of(figure):
    """Returns the chart, or None if the figure is empty."""
    axes = [ax for ax in figure.axes if ax.has_data() or depicted(ax)]
    if not axes:
        return None
    if len(figure.axes) == 1:
        return chart_of_axes(axes[0])
    title = figure._suptitle.get_text() if figure._suptitle else ""
    return {
        "type": "superchart",
        "title": title or None,
        "elements": [chart_of_axes(ax) for ax in axes],
    }


def chart_of_axes(ax):
    """Returns the chart of one pair of axes."""
    kind = kind_of(ax)
    chart = {"type": kind, "title": ax.get_title() or None, "elements": []}
    if kind == "unknown":
        return chart
    for name, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
        label = axis.get_label_text()
        unit = UNIT.search(label)
        chart[f"{name}_label"] = label or None
        chart[f"{name}_unit"] = unit[1] if unit else None
    if kind in ("line", "scatter"):
        for name, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
            chart.update(ticks(name, axis))
    chart["elements"] = ELEMENTS[kind](ax)
    return chart


def depicted(ax):
    """Returns the artists of data, without texts and lines over the whole width or height."""
    from matplotlib.text import Text

    artists = [*ax.lines, *ax.patches, *ax.collections, *ax.images, *ax.artists]
    return [it for it in artists if not isinstance(it, Text) and not is_across(it, ax)]


def is_across(artist, ax):
    """Whether an artist is a line that `axhline` or `axvline` has drawn."""
    across = (ax.get_xaxis_transform(which="grid"), ax.get_yaxis_transform(which="grid"))
    return any(artist.get_transform() is transform for transform in across)


def kind_of(ax):
    from matplotlib.collections import PathCollection
    from matplotlib.lines import Line2D
    from matplotlib.patches import PathPatch, Rectangle, Wedge

    artists = depicted(ax)

    def all_are(*kinds):
        return bool(artists) and all(isinstance(artist, kinds) for artist in artists)

    if boxes(ax) and all_are(Line2D, PathPatch):
        return "box_and_whisker"
    for kind, artist in (
        ("line", Line2D),
        ("scatter", PathCollection),
        ("pie", Wedge),
        ("bar", Rectangle),
    ):
        if all_are(artist):
            return kind
    return "unknown"


def ticks(name, axis):
    """Returns the ticks of an axis: places, texts and the scale."""
    from matplotlib.dates import num2date

    scale = scale_of(axis)
    low, high = sorted(axis.get_view_interval())
    labels = [label.get_text() for label in axis.get_majorticklabels()]
    shown = [it for it in zip(axis.get_majorticklocs(), labels) if low <= it[0] <= high]
    if scale == "datetime":
        shown = [(num2date(place).isoformat(), text) for place, text in shown]
    return {
        f"{name}_ticks": [it if isinstance(it, str) else float(it) for it, _ in shown],
        f"{name}_tick_labels": [text for _, text in shown],
        f"{name}_scale": scale,
    }


def scale_of(axis):
    converter = type(axis.converter).__name__
    if "Date" in converter:
        return "datetime"
    if "Category" in converter:
        return "categorical"
    return axis.get_scale()


def values(axis, data):
    """Returns places on an axis as users wrote them: times, categories or numbers."""
    from matplotlib.dates import num2date

    scale = scale_of(axis)
    numbers = axis.convert_units(data)
    if scale == "datetime":
        return [num2date(number).isoformat() for number in numbers]
    if scale == "categorical":
        names = {place: name for name, place in axis.units._mapping.items()}
        return [names.get(number, number) for number in numbers]
    return [float(number) for number in numbers]


def line_elements(ax):
    return [points(ax, line.get_label(), *line.get_data(orig=True)) for line in depicted(ax)]


def scatter_elements(ax):
    return [points(ax, it.get_label(), *it.get_offsets().T) for it in depicted(ax)]


def points(ax, label, x, y):
    pairs = zip(values(ax.xaxis, x), values(ax.yaxis, y))
    return {"label": label, "points": [list(pair) for pair in pairs]}


def bar_elements(ax):
    bars = [(it, bar) for it in ax.containers for bar in it.patches]
    bars = bars or [(None, bar) for bar in depicted(ax)]
    elements = []
    for container, bar in bars:
        is_level = getattr(container, "orientation", "vertical") == "horizontal"
        axis = ax.yaxis if is_level else ax.xaxis
        (left, bottom), (right, top) = bar.get_bbox().get_points()
        centre = (bottom + top) / 2 if is_level else (left + right) / 2
        elements.append(
            {
                "label": tick_label(axis, centre),
                "value": bar.get_width() if is_level else bar.get_height(),
                "group": container.get_label() if container else "",
            }
        )
    return elements


def pie_elements(ax):
    return [
        {
            "label": wedge.get_label(),
            "angle": round(abs(wedge.theta2 - wedge.theta1), 3),
            "radius": wedge.r,
        }
        for wedge in depicted(ax)
    ]


def box_elements(ax):
    found = boxes(ax)
    # The axis of the places has a tick for each box.
    is_level = has_fixed_ticks(ax.yaxis) and not has_fixed_ticks(ax.xaxis)
    axis = ax.yaxis if is_level else ax.xaxis
    # The columns of a point: the place of the box, and the value.
    columns = [1, 0] if is_level else [0, 1]
    lines = [line.get_xydata()[:, columns] for line in ax.lines]
    return [box_element(axis, box[:, columns], lines) for box in found]


def box_element(axis, box, lines):
    """Returns a box with the lines that belong to it. A point is a place and a value."""
    (left, low), (right, high) = box.min(axis=0), box.max(axis=0)
    centre = (left + right) / 2
    medians = [
        line[0, 1]
        for line in lines
        if len(line) == 2
        and line[0, 1] == line[1, 1]
        and low <= line[0, 1] <= high
        and is_near(sorted(line[:, 0]), [left, right]).all()
    ]
    upright = [line[:, 1] for line in lines if len(line) and is_near(line[:, 0], centre).all()]
    whiskers = [line for line in upright if len(line) == 2 and {low, high} & set(line)]
    ends = [low, high, *(end for line in whiskers for end in line)]
    least, most = min(ends), max(ends)
    outliers = [value for line in upright for value in line if not least <= value <= most]
    return {
        "label": tick_label(axis, centre),
        "min": float(least),
        "first_quartile": float(low),
        "median": float(medians[0]) if medians else None,
        "third_quartile": float(high),
        "max": float(most),
        "outliers": [float(value) for value in outliers],
    }


def boxes(ax):
    """Returns the corners of each box: a rectangle that is a path or a closed line."""
    from matplotlib.patches import PathPatch

    shapes = [it.get_path().vertices for it in ax.patches if isinstance(it, PathPatch)]
    shapes += [line.get_xydata() for line in ax.lines]
    # A box with notches has more corners.
    return [it for it in shapes if len(it) in (5, 6, 11, 12) and is_near(it[0], it[-1]).all()]


def has_fixed_ticks(axis):
    from matplotlib.ticker import FixedLocator

    return isinstance(axis.get_major_locator(), FixedLocator)


def tick_label(axis, place):
    """Returns the text of the tick at a place, or the place."""
    for at, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels()):
        if is_near(at, place) and label.get_text():
            return label.get_text()
    return str(float(place))


def is_near(places, place):
    import numpy

    return numpy.isclose(places, place, rtol=TOLERANCE, atol=TOLERANCE)


ELEMENTS = {
    "line": line_elements,
    "scatter": scatter_elements,
    "bar": bar_elements,
    "pie": pie_elements,
    "box_and_whisker": box_elements,
}
