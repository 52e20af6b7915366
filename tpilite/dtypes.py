"""How weights are stored, by the names that files give: "F32", "BF16", and how many bytes they take."""

from typing import Any

import numpy as np

# NumPy does not know bfloat16: it comes as uint16 holding its bits.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
