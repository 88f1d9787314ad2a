"""Has DVC write a project's code keys anew before `dvc repro` (`-s` too), `dvc exp run`, `dvc status`, `dvc commit`.

Python runs this file when it starts (phone_model_dvc_hook.pth beside it), so it imports nothing but sys. When DVC's
repository class is imported, these methods of it first run `python -m pipeline.keys` in the project, if it has one: in
the project itself, because an experiment may be another commit in another folder.
"""

import sys

_MODULE = "dvc.repo"
_METHODS = ("reproduce", "status", "commit")


class _Finder:
    """Finds dvc.repo once, as Python would have, and wraps its class when it has run."""

    def find_spec(self, name, path=None, target=None):
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_wrap(module):
            execute(module)
            for method in _METHODS:
                setattr(module.Repo, method, _refreshing(getattr(module.Repo, method)))

        spec.loader.exec_module = execute_and_wrap
        return spec


def _refreshing(method):
    from functools import wraps

    @wraps(method)
    def run(repo, *arguments, **options):
        _refresh(repo.root_dir)
        return method(repo, *arguments, **options)

    return run


def _refresh(root):
    import os
    import subprocess

    if not os.path.exists(os.path.join(root, "pipeline", "keys", "__main__.py")):
        return
    command = [sys.executable, "-m", "pipeline.keys"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        from dvc.exceptions import DvcException

        raise DvcException(done.stderr.strip().removeprefix("error: ") or "the code keys could not be written")


sys.meta_path.insert(0, _Finder())
