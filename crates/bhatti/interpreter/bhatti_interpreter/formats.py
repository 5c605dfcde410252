"""Formats of results beside those of IPython: data of tables and charts, JSON, and images."""

import math
import sys

from IPython.core.display_functions import display
from IPython.core.formatters import BaseFormatter, JSONFormatter
from traitlets import ObjectName, Unicode

from .charts import chart_of

DATA = "e2b/data"
CHART = "e2b/chart"


class DataFormatter(BaseFormatter):
    """Shows a data frame of pandas as `{column: [values]}`."""

    format_type = Unicode(DATA)
    print_method = ObjectName("_repr_e2b_data_")
    _return_type = dict

    def __call__(self, value):
        # A data frame exists only if its package has been loaded.
        pandas = sys.modules.get("pandas")
        if pandas is None or not isinstance(value, pandas.DataFrame):
            return super().__call__(value)
        columns = zip(map(str, value.columns), (value.iloc[:, n] for n in range(value.shape[1])))
        return {name: [plain(cell) for cell in column.tolist()] for name, column in columns}


class ChartFormatter(BaseFormatter):
    """Shows what a figure of matplotlib depicts."""

    format_type = Unicode(CHART)
    print_method = ObjectName("_repr_e2b_chart_")
    _return_type = dict

    def __call__(self, value):
        figure = sys.modules.get("matplotlib.figure")
        if figure is None or not isinstance(value, figure.Figure):
            return super().__call__(value)
        try:
            return plain(chart_of(value))
        except Exception:
            # Artists of other packages may have any form. The picture is shown all the same.
            return None


class PlainJsonFormatter(JSONFormatter):
    """Shows lists and dicts as JSON, too."""

    def __call__(self, value):
        if isinstance(value, (list, dict)):
            try:
                return plain(value, other=refuse), {"expanded": True}
            except (TypeError, RecursionError):
                return None
        return super().__call__(value)


def register(formatter):
    """Adds the formats to IPython's."""
    own = {DATA: DataFormatter, CHART: ChartFormatter, "application/json": PlainJsonFormatter}
    for kind, made in own.items():
        formatter.formatters[kind] = made(parent=formatter)
    show_images()


def plain(value, other=str):
    """Returns a value with what JSON has: numbers of numpy become numbers, times become texts.

    Infinities and NaN become None. `other` makes a text of what JSON does not have.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item, other) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, other) for item in value]
    if hasattr(value, "isoformat"):
        # `NaT` of pandas is not a time, and is not equal to itself.
        return value.isoformat() if value == value else None
    if hasattr(value, "tolist"):
        return plain(value.tolist(), other)
    return other(value)


def refuse(value):
    raise TypeError(f"{type(value).__name__} is not in JSON")


def show_images():
    """Makes `show` and `save` of images display them, once the images' package is loaded."""
    try:
        from PIL import Image
    except ImportError:
        return
    save = Image.Image.save

    def save_and_display(image, target, format=None, **options):
        save(image, target, format, **options)
        if isinstance(target, str):
            display(image)

    Image.Image.save = save_and_display
    Image.Image.show = lambda image, *_, **__: display(image)
