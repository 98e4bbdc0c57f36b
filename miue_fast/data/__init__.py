"""Images in, poisoned images out. `load`, `shapes`, the poison store, exports and their verification."""

from .align import align, poison_from_images
from .atomic import check_outside, check_writable, only_writer, sweep, write_file, write_files
from .dataset import Dataset
from .export import check_pickle, export_folder, export_npz, export_pickle, export_pt, other_images, remove_others
from .interop import read_pickle
from .owned import LIST, Owned, check_owned, write_owned
from .poison import POISON_FILES, apply_poison, is_poison, load_poison, quantise, random_noise, remove_poison, save_poison
from .shapes import shapes
from .sources import from_arrays, is_tree, load, load_test
from .verify import Report, verify

__all__ = [
    "LIST",
    "POISON_FILES",
    "Dataset",
    "Owned",
    "Report",
    "align",
    "apply_poison",
    "check_outside",
    "check_owned",
    "check_pickle",
    "check_writable",
    "export_folder",
    "export_npz",
    "export_pickle",
    "export_pt",
    "from_arrays",
    "is_poison",
    "is_tree",
    "load",
    "load_poison",
    "load_test",
    "only_writer",
    "other_images",
    "poison_from_images",
    "quantise",
    "random_noise",
    "read_pickle",
    "remove_others",
    "remove_poison",
    "save_poison",
    "shapes",
    "sweep",
    "verify",
    "write_file",
    "write_files",
    "write_owned",
]
