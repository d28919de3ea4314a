"""ResNet-50 and GPT-2 on a GPU, against PyTorch on the same one.

python -m benchmarks.gpu --out benchmarks/gpu
python -m benchmarks.gpu --tiny     # the smallest sizes, on whatever there is

Each row is a process; all take turns. MFU is the share of the device's peak
that the matrix products and convolutions of the model would take: 6 operations
a weight and token, 3 times the forward pass of the convolutions.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from benchmarks import contest, report
from benchmarks.contest import OURS, Contender, Result
from benchmarks.passes import Setting
from launch import host

# Peak operations a second of dense matrix products, by the makers' data
# sheets: float32 without and with TF32, float16 or bfloat16.
_PEAKS = {
    "H200": (67e12, 495e12, 989e12),
    "H100": (67e12, 495e12, 989e12),  # SXM; PCIe is slower
    "A100": (19.5e12, 156e12, 312e12),
    "L40S": (91.6e12, 183e12, 362e12),
    "L4": (30.3e12, 60e12, 121e12),
    "V100": (15.7e12, 15.7e12, 125e12),  # no bfloat16
    "T4": (8.1e12, 8.1e12, 65e12),
}
_WHOLE, _TINY = ("resnet50", "gpt2"), ("tiny_resnet", "tiny_gpt")
_PRECISIONS = ["float32_no_tf32", "float32", "mixed_float16", "mixed_bfloat16"]
_XLA = {"compiles": True}
CONTENDERS = (
    Contender(OURS, "dist_amp_fit"),
    Contender(f"{OURS}, XLA", "dist_amp_fit", _XLA),
    Contender("Keras fit", "keras_fit"),
    Contender("PyTorch", "pytorch"),
    Contender("PyTorch, compiled", "pytorch", _XLA),
)


def peak_of(gpu: str | None, setting: Setting) -> float | None:
    """Operations a second that the GPU can do in a precision, if known."""
    for name, (float32, tf32, half) in _PEAKS.items():
        if name in re.split(r"[ ,-]", gpu or ""):
            if setting.precision != "float32":
                return half
            return tf32 if setting.allows_tf32 else float32
    return None


def table(results: dict[str, Result], setting: Setting, gpu: str | None) -> str:
    """Markdown: a row for each contender, fastest first."""
    work, peak = setting.work, peak_of(gpu, setting)
    length = getattr(work.sizes, "length", 1)  # tokens in an example
    lines = [
        f"| contender | {'tokens' if length > 1 else 'images'}/s | MFU | "
        "ms a step: median | 90% | GPU MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    ran = [item for item in results.items() if item[1].error is None]
    for name, result in sorted(ran, key=lambda item: -item[1].median):
        examples = result.median * work.batch_size
        mfu = f"{examples * work.sizes.flops / peak:.1%}" if peak else "?"
        times = sorted(1e3 / rate for rate in result.steps_per_sec)
        late = times[int(0.9 * len(times))]
        lines.append(
            f"| {name} | {examples * length:,.0f} | {mfu} | "
            f"{statistics.median(times):.1f} | {late:.1f} | "
            f"{result.device_mib:,.0f} |"
        )
    return "\n".join(lines + report.failures(results))


def settings(arguments: argparse.Namespace, records: str) -> Iterator[Setting]:
    """All combinations that are asked for."""
    images, text = _TINY if arguments.tiny else _WHOLE
    base = Setting(images, steps=arguments.steps)
    wanted = {
        "images": base,
        "records": dataclasses.replace(base, records=records),
        "text": dataclasses.replace(base, workload=text),
    }
    for name in arguments.inputs:
        for precision in arguments.precisions:
            yield dataclasses.replace(
                wanted[name],
                precision=precision.removesuffix("_no_tf32"),
                allows_tf32=not precision.endswith("_no_tf32"),
                batch_size=arguments.batch_size,
            )


def main() -> int:
    """Prints a table for each setting; writes OUT.json."""
    arguments = _read_arguments()
    contenders = [c for c in CONTENDERS if c.name in arguments.contenders]
    gpu, rows = next(iter(host.gpus_of_the_driver()), None), []
    print(f"{report.heading()}GPU: {gpu or 'none'}\n")
    with tempfile.TemporaryDirectory() as directory:
        wanted = list(settings(arguments, directory))
        for name in {s.workload for s in wanted if s.records}:
            _write_records(name, directory)
        for setting in wanted:
            able = [
                c
                for c in contenders
                if c.module != "pytorch" or not setting.records
            ]
            results = contest.hold(setting, able, passes=arguments.passes)
            title = f"{report.title(setting)}{_details(setting)}"
            print(f"{title}\n\n{table(results, setting, gpu)}\n", flush=True)
            rows += report.rows({setting: results})
    if arguments.out:
        path = arguments.out.with_suffix(".json")
        path.write_text(json.dumps({"gpu": gpu, "rows": rows}, indent=1) + "\n")
    return int(any(row["error"] for row in rows))


def _write_records(name: str, directory: str) -> None:
    """In a process of its own: TensorFlow would take the GPU's memory."""
    command = [sys.executable, "-m", "benchmarks.records", name, directory]
    subprocess.run(command, check=True)


def _details(setting: Setting) -> str:
    tf32 = "" if setting.allows_tf32 else " without TF32"
    return f"{tf32}{', TFRecord' if setting.records else ''}"


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [contender.name for contender in CONTENDERS]
    for flag, choices in (
        ("--inputs", ["images", "records", "text"]),
        ("--precisions", _PRECISIONS),
        ("--contenders", names),
    ):
        parser.add_argument(flag, nargs="+", choices=choices, default=choices)
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="in a pass")
    parser.add_argument(
        "--batch_size", type=int, default=0, help="the workload's own if 0"
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, help="writes OUT.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
