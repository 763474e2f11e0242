"""The one room through which everything that the library writes goes to disk and comes back.

A file is of a `Kind`: a name, a version, the keys of its header. Its digest is over header and tensors,
so that nothing in it changes unseen; it is written whole or not at all; nothing in it can execute; and
whatever is wrong with it is one `StorageError` that names the file and what to do.

How a module uses it:

>>> import tempfile, torch
>>> from pathlib import Path
>>> place = Path(tempfile.mkdtemp())
>>> KIND = Kind("thing", 1, "make it again", keys=("made_for",))           # once, at the top
>>> SCHEMA = {"weight": Tensors(torch.float32, ("n", 2), low=0.0)}
>>> header = {"made_for": {"steps": 20, "note": None}}
>>> file = write_tensors(place / "a.safetensors", KIND, header, {"weight": torch.ones(3, 2)})
>>> header, tensors = read_tensors(file, KIND)                             # digest already checked
>>> with KIND.valid(file):                                  # what it says is checked before use
...     check_json(header["made_for"], {"steps": Number(int, low=1), "note": (str, None)})
...     check_tensors(tensors, SCHEMA)["n"]
3

`write_json` and `read_json` do the same for a file without tensors; `write_folder` and `read_folder`
for a result of several files, which appears as one; `claim` for a folder of finished work that belongs
to one run. Of a folder, whatever writes a file may be given in place of its content:

>>> folder = write_folder(place / "b", KIND, {"made_for": "b"}, {"x.txt": "x", "y.bin": b"y"})
>>> header, paths = read_folder(folder, KIND)
>>> header["made_for"], paths["x.txt"].read_text()
('b', 'x')
"""

from evenkeel.storage.atomic import workplace as workplace
from evenkeel.storage.atomic import write_atomically as write_atomically
from evenkeel.storage.checks import Number as Number
from evenkeel.storage.checks import Tensors as Tensors
from evenkeel.storage.checks import check_configuration as check_configuration
from evenkeel.storage.checks import check_json as check_json
from evenkeel.storage.checks import check_tensors as check_tensors
from evenkeel.storage.digests import digest as digest
from evenkeel.storage.digests import json_safe as json_safe
from evenkeel.storage.digests import json_text as json_text
from evenkeel.storage.digests import parse_json as parse_json
from evenkeel.storage.digests import valid_json as valid_json
from evenkeel.storage.files import Kind as Kind
from evenkeel.storage.files import kind_of as kind_of
from evenkeel.storage.files import read_foreign_tensors as read_foreign_tensors
from evenkeel.storage.files import read_json as read_json
from evenkeel.storage.files import read_tensors as read_tensors
from evenkeel.storage.files import safetensors_bytes as safetensors_bytes
from evenkeel.storage.files import write_json as write_json
from evenkeel.storage.files import write_tensors as write_tensors
from evenkeel.storage.lock import alone as alone
from evenkeel.storage.manifest import claim as claim
from evenkeel.storage.manifest import listed as listed
from evenkeel.storage.manifest import read_folder as read_folder
from evenkeel.storage.manifest import write_folder as write_folder
from evenkeel.storage.outputs import FileOutput as FileOutput
from evenkeel.storage.outputs import FolderOutput as FolderOutput
from evenkeel.storage.outputs import check_folder as check_folder
