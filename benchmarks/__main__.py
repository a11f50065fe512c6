"""`python -m benchmarks`: every performance claim, measured now, on one thread."""

from __future__ import annotations

import argparse
import platform

import torch

from benchmarks import delivery, distributed, health, hessian, overhead, replay, run_store, spectral

__all__ = ["main"]


def main() -> None:
    """Run the benchmarks and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; noisier numbers")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    print(f"{_processor()}, Python {platform.python_version()}, torch {torch.__version__}, 1 thread")
    print("CPU time of the whole process; medians of interleaved rounds\n")
    rounds = 10 if quick else 60
    optimizers = {
        "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    }
    for name, make in optimizers.items():
        timings = overhead.mlp_overhead(make, rounds)
        print(f"MLP 784-1024-1024-10, batch 128, {name}: step {timings['bare'].seconds * 1e3:.1f} ms")
        for which in ("by hand", "streamlens", "idle"):
            print(f"  {which:12s} +{timings[which].over:6.1%}")
        share = timings["streamlens"].over / timings["by hand"].over
        print(f"  streamlens / by hand: {share:.2f}  (at most 1)")
    resnet = overhead.resnet_overhead(2 if quick else 5)
    print(f"ResNet18, batch 128, SGD: step {resnet['bare'].seconds:.2f} s")
    print(f"  streamlens   +{resnet['streamlens'].over:6.2%}  (at most 0.5%)")
    watched = health.mlp_health(10 if quick else 40)
    print(
        f"health() on the MLP: +{watched['health'].over:.1%}; outputs at every tenth step only: "
        f"+{watched['sparser'].over:.1%}"
    )
    print(f"health() on the ResNet18: +{health.resnet_health(1 if quick else 3)['health'].over:.1%}")
    print(f"idle lens: {overhead.idle(40 if quick else 200) * 1e6:.0f} us a step  (at most 30)")
    cost = overhead.operators_200_layers(20 if quick else 60)
    print(f"200 layers x 5 operators: {cost * 1e3:.2f} ms a step  (at most 0.6)")
    for name, seconds in overhead.controllers(30 if quick else 100).items():
        print(f"{name} on 20 layers: {seconds * 1e3:.2f} ms a step")
    found = spectral.spectral_cost(20 if quick else 60)
    print(
        f"spectral norm of 1024 x 1024 under Adam: {found.followed * 1e3:.2f} ms a step, "
        f"1/{found.exact / found.followed:.0f} of the decomposition  (at most 1/50); "
        f"the first {found.first * 1e3:.0f} ms; error at most {found.error:.0e}  (at most 1e-3)"
    )
    curvature = hessian.hessian_cost(2 if quick else 6)
    print(
        f"five Hessian eigenvalues of 38,000 parameters: {curvature.products:.0f} products, "
        f"{curvature.evaluation / curvature.gradient:.0f} gradients' time, {curvature.evaluation:.2f} s; "
        f"error at most {curvature.error:.0e}  (at most 40 products, 1e-3)"
    )
    for key, value in delivery.hand_over(300 if quick else 1500).items():
        print(
            f"handing a frame to {key}: {value:.1f} us" + ("  (at most 20)" if "CPU, 99% of" in key else "")
        )
    for name, message in distributed.measure(2, "FSDP2").items():
        print(f"FSDP2 on 2 ranks, 200 parameters, {name}: {message['bytes']:,.0f} bytes a sampled step")
    for key, value in run_store.run().items():
        print(f"run store, {key}: {value:,.1f}")
    for key, value in run_store.chart(20_000 if quick else 100_000).items():
        print(f"run store, {key}: {value:,.0f}  (at most 200)")
    print(f"replayed frames/s: {replay.run(rounds=3 if quick else 10):,.0f}  (at least 100,000)")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
