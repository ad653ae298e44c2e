"""The Hub, mocked: it stands in for `transformers.trainer.hf_api`."""

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace


class Hub:
    """Keeps what is uploaded: `{path in the repository: bytes}` of each call, and the call's arguments."""

    def __init__(self):
        self.files, self.calls, self.jobs = [], [], []
        self.error, self.slow = None, False

    def create_repo(self, name, **kwargs):
        self.created = name, kwargs
        return SimpleNamespace(repo_id=f"me/{Path(name).name}")

    def upload_folder(self, *, folder_path, path_in_repo=None, run_as_future=False, **kwargs):
        folder = Path(folder_path)
        inside = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert not any(path.is_symlink() for path in folder.rglob("*"))
        self.files.append({f"{path_in_repo}/{name}" if path_in_repo else name: inside[name] for name in inside})
        self.calls.append(kwargs | {"path_in_repo": path_in_repo, "run_as_future": run_as_future})
        if not run_as_future:
            return "commit"
        job = Future()
        self.jobs.append(job)
        if not self.slow:
            job.set_exception(self.error) if self.error else job.set_result("commit")
        return job
