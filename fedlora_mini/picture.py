"""A figure that a notebook shows whether or not pyplot was imported, and that nothing has to close."""

from io import BytesIO

from matplotlib.figure import Figure


class Picture(Figure):
    """matplotlib's `Figure`, able to show itself."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()
