"""Images in, poisoned images out. `load`, `shapes`, the poison store, exports and their verification."""

from .align import align, poison_from_images
from .atomic import check_writable, sweep, write_file, write_files
from .dataset import Dataset
from .export import export_folder, export_npz, export_pickle, export_pt
from .interop import read_pickle
from .poison import apply_poison, is_poison, load_poison, quantise, random_noise, save_poison
from .shapes import shapes
from .sources import from_arrays, load, load_test
from .verify import Report, verify

__all__ = [
    "Dataset",
    "Report",
    "align",
    "apply_poison",
    "check_writable",
    "export_folder",
    "export_npz",
    "export_pickle",
    "export_pt",
    "from_arrays",
    "is_poison",
    "load",
    "load_poison",
    "load_test",
    "poison_from_images",
    "quantise",
    "random_noise",
    "read_pickle",
    "save_poison",
    "shapes",
    "sweep",
    "verify",
    "write_file",
    "write_files",
]
