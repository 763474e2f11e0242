"""What the nodes call of ComfyUI's module of this name."""

import os

models_dir = "models"
_folders: dict[str, list[str]] = {}


def add_model_folder_path(folder_name, full_folder_path, is_default=False):
    _folders.setdefault(folder_name, []).append(full_folder_path)


def get_filename_list(folder_name):
    return sorted(n for p in _folders[folder_name] if os.path.isdir(p) for n in os.listdir(p))


def get_full_path_or_raise(folder_name, filename):
    for place in _folders[folder_name]:
        if os.path.isfile(found := os.path.join(place, filename)):
            return found
    raise FileNotFoundError(filename)
