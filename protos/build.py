"""Generate the gRPC stubs beside the .proto files whenever the package is built."""

from pathlib import Path

from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildProtos(build_py):
    """build_py that runs protoc first; the output directory equals the Python package, so imports need no editing."""

    def run(self) -> None:
        import grpc_tools
        from grpc_tools import protoc

        protos = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("pressd/v1/*.proto"))
        includes = [f"-I{ROOT}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
        outputs = [f"--python_out={ROOT}", f"--pyi_out={ROOT}", f"--grpc_python_out={ROOT}"]
        if protoc.main(["protoc", *includes, *outputs, *protos]) != 0:
            raise SystemExit("protoc failed; see its message above")
        super().run()
