"""Open an adapter of any known format for `ties-peft convert`, with what its files do not say themselves."""

from __future__ import annotations

from ..errors import AdapterError, RecipeError
from . import recognise, sources
from .adapter import Adapter, read_config
from .base_names import ConversionOptions, base_names, not_in_base, renaming_remark
from .module_names import accepted_names
from .to_peft import read_as_peft


def open_as_peft(source: str, options: ConversionOptions, whole: bool = False) -> tuple[Adapter, list[str]]:
    """Open an adapter of any known format; return it as PEFT's, and remarks on what was converted.

    Args:
        source: a folder, a file or a Hub id.
        options: of the user.
        whole: as in `read_as_peft`.
    Raises: AdapterError if it is no adapter, or cannot be converted exactly; RecipeError for options that do not apply to it.
    """
    files = sources.find_files(source)
    config = read_config(files.folder, source)
    file = recognise.recognise(files, config, source)
    if file is None or (file.format.name == "PEFT" and config is not None):
        given = [f"--{name}" for name in ("part", "alpha") if getattr(options, name) is not None]
        if given and not (whole and given == ["--part"]):
            raise RecipeError(f"{', '.join(given)} is for files that are not PEFT's, and '{source}' is. Leave it out.")
        return _rename_modules(Adapter.load(source, base=options.base), options, source)
    if not file.is_plain:
        recognise.refuse_file(file, config, source)
    converted = read_as_peft(file, config, options, source, whole)
    return Adapter(converted.config, converted.tensors, source, origin=converted.origin), []


def _rename_modules(adapter: Adapter, options: ConversionOptions, label: str) -> tuple[Adapter, list[str]]:
    """Return an adapter of PEFT's under the names that --modules lists, if it was given, and a remark on new names."""
    if options.modules is None:
        return adapter, []
    known = base_names(options, None) or []
    names = accepted_names(known, exactly=True)
    paths = {name: m.path if name.startswith(m.path) else name for name, m in adapter.layout.items()}
    missing = [path for path in paths.values() if path not in names]
    if missing:
        raise AdapterError(not_in_base(label, missing, len(adapter.layout), known))
    renamed = {path: names[path] for path in paths.values() if names[path] != path}
    inside = {name: renamed[path] + name[len(path) :] for name, path in paths.items() if path in renamed}
    return (adapter.renamed(renamed | inside) if renamed else adapter), renaming_remark(renamed)
