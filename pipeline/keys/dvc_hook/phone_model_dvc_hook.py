"""What DVC does otherwise in a project of this pipeline; in every other one it does what it always does.

- Code keys are written anew before `dvc repro` (`-s` too), `dvc exp run`, `dvc status` and `dvc commit` compare hashes:
  `python -m pipeline.keys` runs in the project itself, because an experiment may be another commit in another folder.
- What was computed before comes back from the run cache also where a stage has outputs with `persist`. DVC excludes
  these, because what lies there might decide the result; here a stage keeps of it only what its own keys vouch for.
- `dvc checkout`, and so `dvc exp run`, deletes nothing because a model or variant left the lists.

Python runs this file when it starts (phone_model_dvc_hook.pth beside it), so it imports nothing but sys.
"""

import sys

_MODULE = "dvc.repo"
_METHODS = ("reproduce", "status", "commit")


class _Finder:
    """Finds dvc.repo once, as Python would have, and changes DVC when it has run."""

    def find_spec(self, name, path=None, target=None):
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_change(module):
            execute(module)
            for method in _METHODS:
                setattr(module.Repo, method, _refreshing(getattr(module.Repo, method)))
            _restore_persisting()
            _keep_unlisted()

        spec.loader.exec_module = execute_and_change
        return spec


def _is_ours(root):
    import os

    return os.path.exists(os.path.join(root, "pipeline", "keys", "__main__.py"))


def _refreshing(method):
    from functools import wraps

    @wraps(method)
    def run(repo, *arguments, **options):
        if _is_ours(repo.root_dir):
            _refresh(repo.root_dir)
        return method(repo, *arguments, **options)

    return run


def _refresh(root):
    import subprocess

    command = [sys.executable, "-m", "pipeline.keys"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        from dvc.exceptions import DvcException

        raise DvcException(done.stderr.strip().removeprefix("error: ") or "the code keys could not be written")


def _restore_persisting():
    from dvc.stage import cache

    can_hash, create = cache._can_hash, cache.StageCache._create_stage

    def can_hash_persisting(stage):
        persisting = [out for out in stage.outs if out.persist and _is_ours(stage.repo.root_dir)]
        for out in persisting:
            out.persist = False
        try:
            return can_hash(stage)
        finally:
            for out in persisting:
                out.persist = True

    def create_replacing(self, *arguments, **options):
        stage = create(self, *arguments, **options)
        checkout = stage.checkout
        stage.checkout = lambda **options: checkout(force=_is_ours(self.repo.root_dir), **options)
        return stage

    cache._can_hash, cache.StageCache._create_stage = can_hash_persisting, create_replacing


def _keep_unlisted():
    checkout = sys.modules["dvc.repo.checkout"]
    remove = checkout._remove_unused_links
    checkout._remove_unused_links = lambda repo: [] if _is_ours(repo.root_dir) else remove(repo)


sys.meta_path.insert(0, _Finder())
