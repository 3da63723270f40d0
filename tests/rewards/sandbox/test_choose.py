"""Which back end a machine gives, and what the refusal says."""


import pytest
from emberl.rewards.sandbox import choose
from emberl.rewards.sandbox.pool import Sandbox, SandboxUnavailable

slow = pytest.mark.slow


def test_without_walls_it_refuses_and_names_the_fix(monkeypatch) -> None:
    def fails(name: str, preload: object) -> None:
        raise SandboxUnavailable(f"{name}: not here")

    monkeypatch.setattr(choose, "_tried", fails)
    with pytest.raises(SandboxUnavailable, match=r"zygote: not here; bubblewrap: not here.*apt install bubblewrap"):
        Sandbox()
    with pytest.raises(ValueError, match="allow_unsafe"):
        Sandbox(backend="unsafe")
    with pytest.raises(ValueError, match="chroot"):
        Sandbox(backend="chroot")


@slow
def test_unsafe_only_when_asked_for_and_loudly(monkeypatch) -> None:
    real = choose._tried
    refuse = SandboxUnavailable("no namespaces")

    def tried(name: str, preload):
        if name != "unsafe":
            raise refuse
        return real(name, preload)

    monkeypatch.setattr(choose, "_tried", tried)
    with pytest.warns(RuntimeWarning, match="UNSAFE.*no namespaces"):
        found = Sandbox(workers=1, allow_unsafe=True)
    with found:
        assert found.backend == "unsafe"
        assert found.run_program("print(6 * 7)").stdout == b"42\n"
        assert found.run_program("open('/tmp/emberl-x', 'w')").exit_code == 1  # the filter still holds
