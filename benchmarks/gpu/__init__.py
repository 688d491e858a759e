"""Everything there is to measure on a GPU, by one command in nine minutes. It needs no download, and no package but
those of requirements.txt; diffusers' rows are left out where diffusers is not installed.

    python -m benchmarks.gpu                                 # on a GPU, at SD 1.5's size, in 9 minutes
    python -m benchmarks.gpu --size tiny --device cpu        # a rehearsal of every part, in a minute
    python -m benchmarks.gpu --parts base drawing            # some of the parts; all others need "base"

The parts in order of value. Each has a share of the time, and what it leaves goes to the next:

    base      a base model of random weights, in files; what the machine can reach at best
    parity    every network on the GPU next to the CPU in fp32, in each precision and memory layout
    whole     train.py from its files to its checkpoint in few steps; the default run, extrapolated by phase
    step      RPO's training step: seconds, utilisation, memory next to the estimate; on diffusers' U-Net too
    passes    a U-Net pass at batch 2, 8 and 32, in each layout; diffusers' U-Net too
    drawing   seconds a picture at batch 1, 4 and 16; the kernels of a U-Net pass and of a training step
    graphs    what CUDA graphs and torch.compile would save
    release   the job in the shape of the authors' release

A part is a process of its own, so a crash or a full memory ends one part only, and it is stopped when its time is over.
results.json and results.md are written anew after each part. What failed is in them, with its traceback.

--then COMMAND is run by the shell in the time that is left, which it finds in SECONDS_LEFT. The files that --bring
names are then copied to the results in pieces of 15 MiB, for a machine that returns only small files:

    python -m benchmarks.gpu --then "python -m toy.pretrain unet --device cuda --go-on --steps 2000" \\
        --bring weights/toy/unet/diffusion_pytorch_model.safetensors
    cat outputs/gpu/unet-*.safetensors.* > weights/toy/unet/diffusion_pytorch_model.safetensors

On a machine that is lent for one command of ten minutes, and returns the files in $OUT (eight at most):

    run(timeout_s=590, command="set -o pipefail; export PYTHONUNBUFFERED=1;
        python3 -m benchmarks.gpu --out $OUT 2>&1 | tee $OUT/log.txt")

If diffusers is missing there and nothing can be downloaded, two wheels travel with the command in a folder that git
ignores, `carry=[".whl"]`; the command begins with the second line, and a semicolon:

    pip download --no-deps --only-binary=:all: --python-version 3.12 -d .whl diffusers==0.41.0 importlib_metadata==8.7.0
    pip install -q --no-index --no-deps --no-compile --target .site .whl/*.whl && export PYTHONPATH=$PWD/.site
"""
