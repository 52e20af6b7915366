"""The array type of the maths, named once."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
