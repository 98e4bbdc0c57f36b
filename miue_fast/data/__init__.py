"""Images in, poisoned images out. `load`, `shapes`, the poison store, exports and their
verification.
"""

from .align import align, poison_from_images
from .atomic import (
    check_outside,
    check_system,
    check_writable,
    only_writer,
    sweep,
    write_file,
    write_files,
)
from .dataset import Dataset
from .export import IMAGES, NOTE, check_folder, export_folder, exported_files, other_files
from .export_file import EXPORTS, check_file, check_pickle, export_npz, export_pickle, export_pt
from .interop import read_pickle
from .owned import LIST, Owned, check_owned, write_owned
from .poison import (
    POISON_FILES,
    apply_poison,
    budget,
    is_poison,
    load_poison,
    quantise,
    random_noise,
    read_manifest,
    save_poison,
)
from .preflight import check_room
from .shapes import shapes
from .sources import check_selection, from_arrays, is_tree, load, load_test
from .verify import Verification, verify

__all__ = [
    "EXPORTS",
    "IMAGES",
    "LIST",
    "NOTE",
    "POISON_FILES",
    "Dataset",
    "Owned",
    "Verification",
    "align",
    "apply_poison",
    "budget",
    "check_file",
    "check_folder",
    "check_outside",
    "check_owned",
    "check_pickle",
    "check_room",
    "check_selection",
    "check_system",
    "check_writable",
    "export_folder",
    "export_npz",
    "export_pickle",
    "export_pt",
    "exported_files",
    "from_arrays",
    "is_poison",
    "is_tree",
    "load",
    "load_poison",
    "load_test",
    "only_writer",
    "other_files",
    "poison_from_images",
    "quantise",
    "random_noise",
    "read_manifest",
    "read_pickle",
    "save_poison",
    "shapes",
    "sweep",
    "verify",
    "write_file",
    "write_files",
    "write_owned",
]
